"""Joining the group that torchrun's environment names, in real processes with such an environment."""

import os
import socket
import time

import pytest
import torch.distributed as dist

from batchlab.parallel.torchrun import agree_max, is_main, process_group
from tests.spine.forked import in_child, in_ranks

LAUNCHED = "TORCHELASTIC_RUN_ID"


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _as_rank(rank, port, function, *arguments):
    """What torchrun sets for one of two ranks on one machine without a GPU."""
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, LAUNCHED: "test", "CUDA_VISIBLE_DEVICES": ""}
    os.environ.update({name: str(value) for name, value in (local | address).items()})
    function(*arguments)


def _two(folder, function):
    """Runs `function(folder)` in two processes as torchrun would start them: a fork that forks its other rank."""
    port = _free_port()
    other = os.fork()
    if other == 0:
        code = 1
        try:
            _as_rank(1, port, function, folder)
            code = 0
        finally:
            os._exit(code)
    _as_rank(0, port, function, folder)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0


def _join(folder):
    with process_group(timeout_seconds=60) as joined:
        rank = dist.get_rank()
        seen = (joined, dist.get_backend(), dist.get_world_size(), agree_max(10 * rank), is_main() == (rank == 0))
        with process_group() as again:
            assert not again
        assert dist.is_initialized(), "the inner one took the outer one's group away"
    (folder / str(rank)).write_text(repr((*seen, dist.is_initialized())))


def test_the_ranks_of_torchrun_are_joined_and_left(tmp_path):
    assert in_child(_two, tmp_path, _join) == 0
    for rank in "01":
        assert (tmp_path / rank).read_text() == repr((True, "gloo", 2, 10, True, False))


def _fail_inside(folder):
    with pytest.raises(KeyError), process_group(timeout_seconds=60):
        agree_max(1)
        raise KeyError("inside")
    (folder / os.environ["RANK"]).write_text(repr(dist.is_initialized()))


def test_a_failure_inside_leaves_the_group_too(tmp_path):
    assert in_child(_two, tmp_path, _fail_inside) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["False", "False"]


def _one_stays_away(folder):
    with process_group(timeout_seconds=3):
        agree_max(0)
        if dist.get_rank() == 0:
            with pytest.raises(RuntimeError):
                agree_max(1)
            (folder / "failed").touch()
        while not (folder / "failed").exists():
            time.sleep(0.01)


def test_a_collective_that_a_rank_does_not_join_fails_in_place_of_hanging(tmp_path):
    assert in_child(_two, tmp_path, _one_stays_away) == 0
    assert (tmp_path / "failed").exists()


def test_without_torchrun_nothing_happens(monkeypatch):
    monkeypatch.delenv(LAUNCHED, raising=False)
    with process_group() as joined:
        assert not joined and not dist.is_initialized() and is_main()


def _own_group(folder):
    os.environ[LAUNCHED] = "test"
    with process_group() as joined:
        assert not joined
    assert dist.is_initialized() and dist.get_world_size() == 2


def test_a_group_that_stands_already_is_kept(tmp_path):
    assert in_ranks(2, tmp_path, _own_group, tmp_path) == [0, 0]
