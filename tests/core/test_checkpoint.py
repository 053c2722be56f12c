import math

import pytest
import torch

from batchlab.core.checkpoint import _decode, checkpoints, drop_old, load_checkpoint, newest_whole, save_checkpoint
from batchlab.core.errors import CheckpointError, StorageError


def _state(seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3, generator=g)
    return {
        "model": {"a": weight, "tied": weight, "count": torch.tensor(7), "half": weight.bfloat16()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
            "param_groups": [{"betas": (0.9, 0.99), "on": None}],
        },
        "odd": {"$x": 1, "nan": math.nan, "inf": -math.inf, "pi": 0.1 + 0.2, "big": 2**70, "empty": torch.zeros(0, 4)},
        "view": weight[1:3],
    }


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def test_what_was_saved_is_loaded(tmp_path):
    path = save_checkpoint(tmp_path, 12, _state())
    assert _equal(load_checkpoint(path), _state())


def test_a_tied_tensor_is_stored_once(tmp_path):
    tied = torch.zeros(10_000)
    path = save_checkpoint(tmp_path, 1, {"a": tied, "b": tied})
    assert path.stat().st_size < 2 * tied.numel() * 4


@pytest.mark.parametrize("place", range(20))
def test_a_cut_or_flipped_checkpoint_is_refused_and_the_one_before_is_used(tmp_path, place):
    save_checkpoint(tmp_path, 1, {"x": torch.ones(4)})
    newer = save_checkpoint(tmp_path, 2, {"x": torch.zeros(300)})
    data = bytearray(newer.read_bytes())
    position = place * (len(data) - 1) // 19
    if place % 2:
        data[position] ^= 1 << (place % 8)
    else:
        data = data[:position]
    newer.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(newer)
    state, problems = newest_whole(tmp_path)
    assert torch.equal(state["x"], torch.ones(4))
    assert len(problems) == 1 and newer.name in problems[0]


def test_a_refused_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"x": torch.ones(4)})
    monkeypatch.setattr(
        "batchlab.core.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(tmp_path, 2, {"x": torch.ones(4)})
    assert [path.name[:15] for path in checkpoints(tmp_path)] == ["step-0000000001"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_old_ones_are_dropped_newest_first(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {})
    drop_old(tmp_path, keep=2)
    assert [int(path.name[5:15]) for path in checkpoints(tmp_path)] == [10, 2]


def test_dtypes_are_kept_and_unknown_tensors_and_dtypes_are_named(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"kind": torch.bfloat16})
    assert load_checkpoint(path)["kind"] is torch.bfloat16
    for tree, message in (
        ({"$dtype": "load"}, "the dtype load, which this torch does not know"),
        (
            {"$in_few_bits": "Thing", "parts": {}, "own": [[], [], []]},
            "holds a Thing, which this batchlab does not know",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            _decode(tree, {})


def test_no_code_runs_from_a_checkpoint(tmp_path):
    with pytest.raises(TypeError, match="cannot hold a"):
        save_checkpoint(tmp_path, 1, {"f": print})
    assert checkpoints(tmp_path) == []
