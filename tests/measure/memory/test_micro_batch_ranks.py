"""The finder over ranks: all agree when one runs out, and a failure of one stops all."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from batchlab.core.errors import BatchlabError
from batchlab.measure.memory.micro_batch import find_micro_batch
from tests.measure.memory.limited import Limited, toy_job, without_freeing
from tests.measure.memory.limited import _quick as _quick
from tests.spine.forked import in_ranks


def _one_rank_runs_out(folder):
    without_freeing(pytest.MonkeyPatch())
    rank = dist.get_rank()
    for limit in range(3, 53):
        found = find_micro_batch(Limited(limit if rank == 1 else 10**6), max_size=4096, start=32)
        assert found.size == limit or (limit + 1 - found.size) / (limit + 1) <= 0.05
        (folder / f"{rank}-{limit}").write_text(f"{found.size} {[each.size for each in found.tries]}")


def test_ranks_agree_when_one_runs_out(tmp_path):
    assert in_ranks(2, tmp_path, _one_rank_runs_out, tmp_path) == [0, 0]
    for limit in range(3, 53):
        assert (tmp_path / f"0-{limit}").read_text() == (tmp_path / f"1-{limit}").read_text()


def _one_rank_fails(folder):
    error = KeyError("broken") if dist.get_rank() == 1 else torch.OutOfMemoryError("CUDA out of memory.")
    try:
        find_micro_batch(Limited(40, error), max_size=64)
    except (KeyError, BatchlabError) as caught:
        (folder / f"{dist.get_rank()}").write_text(f"{type(caught).__name__}: {caught}")


def test_a_rank_that_fails_otherwise_stops_all(tmp_path):
    assert in_ranks(2, tmp_path, _one_rank_fails, tmp_path) == [0, 0]
    assert (tmp_path / "1").read_text() == "KeyError: 'broken'"
    assert (tmp_path / "0").read_text().startswith("BatchlabError: another rank failed in a step with 64 examples")


def _job_under_ranks(folder):
    found = find_micro_batch(toy_job(lambda: nn.Linear(6, 1).double()), device="cpu")
    (folder / f"{dist.get_rank()}").write_text(f"{found.size} {[each.size for each in found.tries]}")


def test_a_job_under_ranks(tmp_path):
    assert in_ranks(2, tmp_path, _job_under_ranks, tmp_path) == [0, 0]
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
