"""A model's BatchNorms through all kinds of a multigrid run: objects, statistics and optimizer state stay."""

import copy

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.nn import convert_ghost_batchnorm, set_batchnorm_kind


def network():
    return nn.Sequential(
        nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4), nn.BatchNorm1d(4)
    )


def test_kinds_come_and_go_and_all_else_stays():
    model = network()
    parameters, norm, group = list(model.parameters()), model[1], object()
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    x = torch.randn(8, 1, 3, 3, 3)
    for kind, number, name in (
        ("split", 4, "SplitBatchNorm3d"),
        ("split", 2, "SplitBatchNorm3d"),
        ("sync", 2, "SyncBatchNorm"),
        ("split", 2, "SplitBatchNorm3d"),
        ("plain", 1, "BatchNorm3d"),
        ("sync", 4, "SyncBatchNorm"),
        ("plain", 1, "BatchNorm3d"),
    ):
        before = copy.deepcopy(model.state_dict())
        assert set_batchnorm_kind(model, kind, number, group) is model
        assert type(norm).__name__ == name and model[1] is norm
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items() if "split" not in key)
        if kind == "sync":
            assert norm.process_group is group
            plain = copy.deepcopy(model.eval())
            assert torch.equal(model(x), set_batchnorm_kind(plain, "plain")(x))
            model.train()
        else:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert type(model[5]) is nn.BatchNorm1d and norm.num_batches_tracked == 5
    assert not hasattr(norm, "process_group") and not hasattr(norm, "_was")


def test_bad_input():
    with pytest.raises(InputError, match=r"^kind must be one of \['plain', 'split', 'sync'\], got 'group'$"):
        set_batchnorm_kind(network(), "group")
    with pytest.raises(InputError, match="^model must have no SyncBatchNorm of its own, got one at '1'$"):
        set_batchnorm_kind(nn.SyncBatchNorm.convert_sync_batchnorm(network()), "plain")
    model = set_batchnorm_kind(network(), "sync", 2)
    for bad in (0, 1.5):
        with pytest.raises(InputError, match=f"^number must be an integer of at least 1, got {bad}$"):
            set_batchnorm_kind(model, "split", bad)
    model.append(nn.LazyBatchNorm1d())
    with pytest.raises(InputError, match="got one at '6': send a batch through it first$"):
        set_batchnorm_kind(model, "split", 2)
    assert type(model[1]) is nn.SyncBatchNorm, "what is refused must have changed nothing"
    with pytest.raises(InputError, match="got one at '1': call convert_plain_batchnorm first$"):
        set_batchnorm_kind(convert_ghost_batchnorm(network(), 4), "split", 2)
