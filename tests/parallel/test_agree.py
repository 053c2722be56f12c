"""Agreement over real gloo processes: every rank ends with the same, to the last bit."""

import json
import math

import pytest
import torch
import torch.distributed as dist

from batchlab.core.facts import Estimate
from batchlab.parallel.agree import agree_min, device_of, from_first_rank
from batchlab.parallel.torchrun import agree_max, is_main
from tests.spine.forked import in_ranks

VALUES = [[3.0, -1.0, math.inf, 0.1], [2.0, 5.0, -math.inf, 0.1 + 2**-56], [2.0 + 2**-40, -1.5, 7.0, 0.3]]
COUNTS = [-(2**62) - 1, 2**62 + 1, 2**62]


def _least_and_largest(folder):
    rank = dist.get_rank()
    pair = dist.new_group([1, 2])
    found = {
        "least": agree_min(VALUES[rank]),
        "largest": agree_max(COUNTS[rank]),
        "pair": agree_min(VALUES[rank], pair) if rank else None,
        "main": is_main(),
        "device": str(device_of()),
    }
    (folder / f"{rank}").write_text(json.dumps(found))


def test_least_and_largest_of_the_ranks(tmp_path):
    """Place by place, in float64 and in 64-bit integers, so that nothing is rounded on the way."""
    assert in_ranks(3, tmp_path, _least_and_largest, tmp_path) == [0, 0, 0]
    for rank in range(3):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert found["least"] == [min(column) for column in zip(*VALUES, strict=True)]
        assert found["pair"] == ([min(column) for column in zip(*VALUES[1:], strict=True)] if rank else None)
        assert found["largest"] == max(COUNTS)
        assert (found["main"], found["device"]) == (rank == 0, "cpu")


RANK_VALUES = [
    {"name": "größer ✓", "parts": (1, 2.5, None, True), "unbounded": math.inf, "nested": {"a": [[]], "b": 1e-300}},
    {"other": "x" * 1000},
    0,
]
SENT = {"name": "größer ✓", "parts": [1, 2.5, None, True], "unbounded": "inf", "nested": {"a": [[]], "b": 1e-300}}


def _from_first(folder):
    rank = dist.get_rank()
    found = [
        from_first_rank(RANK_VALUES[rank]),
        from_first_rank(RANK_VALUES[::-1][rank]),
        from_first_rank([[], {}, ""]),
    ]
    (folder / f"{rank}").write_text(json.dumps(found))


def test_every_rank_gets_what_the_first_one_has(tmp_path):
    """Of whatever length its own is; three in a row do not get mixed up."""
    assert in_ranks(3, tmp_path, _from_first, tmp_path) == [0, 0, 0]
    for rank in range(3):
        assert json.loads((tmp_path / str(rank)).read_text()) == [SENT, 0, [[], {}, ""]]


def test_one_process_alone_agrees_with_itself():
    values = (2.0, math.nan)
    found = agree_min(values)
    assert found[0] == 2.0 and math.isnan(found[1]) and isinstance(found, list)
    assert agree_max(-(2**70)) == -(2**70) and is_main()
    assert from_first_rank(RANK_VALUES[0]) == SENT
    assert from_first_rank(Estimate(1.0, 0.0, 2.0, "given"))["method"] == "given"


def test_what_is_no_json_is_refused_and_nothing_is_pickled():
    with pytest.raises(TypeError, match="cannot be written as JSON: Tensor"):
        from_first_rank({"weights": torch.zeros(2)})
