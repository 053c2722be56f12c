"""AGVM's factors go through checkpoints and outlive the wrapper."""

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from batchlab.core.checkpoint import load_checkpoint, save_checkpoint
from batchlab.core.errors import InputError
from batchlab.optim.agvm.agvm import AGVM
from tests.optim.agvm.given_gradients import pair
from tests.optim.agvm.two_heads import OPTIMIZERS, batch, in_halves, parts, two_heads, weights


def _trained(steps, agvm, model, start=0):
    for step in range(start, start + steps):
        in_halves(agvm, model, batch(step))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_goes_round_through_a_checkpoint(name, tmp_path):
    whole, first, second = two_heads(), two_heads(), two_heads(seed=1)
    make = lambda model: AGVM(OPTIMIZERS[name](parts(model)), start=2, interval=2, alpha=0.5)  # noqa: E731
    one, two, three = make(whole), make(first), make(second)
    _trained(12, one, whole)
    _trained(5, two, first)
    save_checkpoint(tmp_path, 1, {"optimizer": two.state_dict(), "model": first.state_dict()})
    state = load_checkpoint(next(tmp_path.iterdir()))
    second.load_state_dict(state["model"])
    three.load_state_dict(state["optimizer"])
    assert three.factors == two.factors and three.phis == two.phis and not three.due()
    _trained(7, three, second, start=5)
    assert torch.equal(weights(second), weights(whole)) and three.factors == one.factors
    copied = copy.deepcopy(three)
    assert copied.factors == three.factors and copied.param_groups[0] is not three.param_groups[0]
    assert copied.param_groups is copied.optimizer.param_groups


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_distributed_checkpoint_carries_the_factors(name, start):
    first, second = two_heads(), two_heads(seed=1)
    make = lambda model: AGVM(OPTIMIZERS[name](parts(model)), start=start, interval=2, alpha=0.5)  # noqa: E731
    one, two = make(first), make(second)
    _trained(7, one, first)
    second.load_state_dict(first.state_dict())
    get_optimizer_state_dict(second, two)  # takes a step at rate 0 to make a state
    saved = copy.deepcopy(get_optimizer_state_dict(first, one))  # torch loads tensors without a copy
    set_optimizer_state_dict(second, two, saved)
    assert two.factors == one.factors
    _trained(5, one, first, start=7)
    _trained(5, two, second, start=7)
    assert torch.equal(weights(first), weights(second))


def test_a_wrapped_state_outlives_the_wrapper_and_a_bare_state_is_refused():
    model = two_heads()
    agvm = AGVM(OPTIMIZERS["sgd"](parts(model)), start=0, alpha=0.0)
    in_halves(agvm, model, batch(0))
    assert AGVM(agvm.optimizer).factors == agvm.factors
    bare = OPTIMIZERS["sgd"](parts(two_heads())).state_dict()
    message = "the state is of an optimizer without AGVM: load it into that optimizer before AGVM wraps it"
    with pytest.raises(InputError, match=message):
        agvm.load_state_dict(bare)
    agvm.optimizer.load_state_dict(bare)
    with pytest.raises(InputError, match=message):
        agvm.due()


@pytest.mark.parametrize("by", ["AGVM", "the wrapped optimizer"])
def test_a_group_that_was_just_added_is_in_the_state(by):
    _, agvm = pair()
    late = {"params": [torch.nn.Parameter(torch.zeros(3))]}
    (agvm if by == "AGVM" else agvm.optimizer).add_param_group(late)
    state = agvm.state_dict()
    agvm.load_state_dict(state)
    assert agvm.factors == (1.0, 1.0, 1.0)
