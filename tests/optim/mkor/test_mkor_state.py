"""MKOR's state goes round, its hooks go with it, and copies are refused."""

import copy
import gc
import math
import weakref

import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.optim.mkor.mkor import MKOR
from tests.optim.mkor.small_mlp import batch, flat, made, mlp, run


@pytest.mark.parametrize("variant", ["exact", "released"])
def test_state_goes_round_and_training_goes_on_the_same(variant):
    settings = {"inv_freq": 3, "gamma": 0.9, "variant": variant, "eps": 4.0}
    model = mlp()
    optimizer = made(model, **settings)
    run(model, optimizer, 10)
    resumed = mlp(seed=1)
    resumed.load_state_dict(model.state_dict())
    other = made(resumed)  # with other settings: the saved ones win
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(flat(run(model, optimizer, 10, start=10)), flat(run(resumed, other, 10, start=10)))
    assert other.report() == optimizer.report()


def test_state_is_plain_and_goes_through_a_checkpoint(tmp_path):
    model = mlp()
    optimizer = made(model, eps=math.inf)
    run(model, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    other = made(mlp())
    other.load_state_dict(loaded)
    assert other.eps == math.inf and torch.equal(other._layers[1].G, optimizer._layers[1].G)


def test_state_of_another_model_is_refused():
    optimizer = made(mlp())
    with pytest.raises(InputError, match="state_dict has no 'mkor': give one of a base alone to base.load_state_dict"):
        optimizer.load_state_dict(optimizer.base.state_dict())
    deeper, wider = mlp(sizes=(5, 6, 6, 3)), mlp(sizes=(5, 8, 3))
    with pytest.raises(InputError, match=r"state_dict must be of the same layers, not in both are \['4'\]"):
        optimizer.load_state_dict(made(deeper).state_dict())
    other = made(wider)
    run(wider, other, 1)
    with pytest.raises(InputError, match=r"state's factor G of layer '0' must be of shape \(7, 7\), got \(8, 8\)"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer._layers[0].A is None


def test_hooks_go_with_the_optimizer_and_keep_nothing_alive():
    model = mlp()
    optimizer = made(model)
    assert len(model[0]._forward_hooks) == 1
    gone = weakref.ref(optimizer)
    copied = copy.deepcopy(model)
    copied(batch(0)[0]).sum().backward()
    assert optimizer._layers[0].take().inputs.rows == 0
    del optimizer
    gc.collect()
    assert gone() is None and not model[0]._forward_hooks
    closed = made(model)
    run(model, closed, 2)
    closed.close()
    assert not model[0]._forward_hooks
    other = copy.deepcopy(model)
    base = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    base.load_state_dict(copy.deepcopy(closed.base.state_dict()))
    assert torch.equal(flat(run(model, closed, 3)), flat(run(other, base, 3)))


def test_a_copy_is_refused_and_named_groups_work():
    model = mlp()
    optimizer = MKOR(model, torch.optim.AdamW(model.named_parameters()))
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    run(model, optimizer, 2)
    with pytest.raises(TypeError, match="MKOR cannot be copied or pickled, it has hooks on a model: use state_dict"):
        copy.deepcopy(optimizer)
