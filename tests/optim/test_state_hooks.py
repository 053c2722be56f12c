"""Hooks that were registered on an optimizer which wraps another run as torch's do."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from batchlab.optim.agvm.agvm import AGVM
from batchlab.optim.agvm.module_groups import groups_by_module
from batchlab.optim.diloco.diloco import DiLoCo
from batchlab.optim.egn.egn import EGN
from batchlab.optim.mkor.mkor import MKOR


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def sgd(model):
    return torch.optim.SGD(groups_by_module(model, ["0", "2"]), lr=0.1, momentum=0.9)


WRAPPERS = {
    "agvm": lambda model: AGVM(sgd(model)),
    "diloco": lambda model: DiLoCo(sgd(model), inner_steps=2, outer_lr=0.5),
    "mkor": lambda model: MKOR(model, sgd(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_hooks_of_saving_and_loading_run_in_order_and_may_exchange_the_state(name):
    model = network()
    optimizer, told = WRAPPERS[name](model), []
    optimizer.register_state_dict_pre_hook(lambda which: told.append(("save", which is optimizer)))
    optimizer.register_state_dict_post_hook(lambda which, state: state | {"more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda which, state: {k: v for k, v in state.items() if k != "more"})
    optimizer.register_load_state_dict_post_hook(lambda which: told.append(("loaded", which is optimizer)))
    state = optimizer.state_dict()
    assert state["more"] == 1
    optimizer.load_state_dict(state)
    assert told == [("save", True), ("loaded", True)] and state["more"] == 1


@pytest.mark.parametrize("name", [*WRAPPERS, "egn"])
def test_asking_for_the_state_is_no_step(name):
    model, twin = network(), network()
    make = WRAPPERS.get(name, lambda model: EGN(model, momentum=0.9, damping=0.1))
    optimizer, plain = make(model), make(twin)
    get_optimizer_state_dict(model, optimizer)
    x, y = torch.randn(2, 8, 3)[0], torch.randn(8, 2)
    for each, net in ((optimizer, model), (plain, twin)):
        for _ in range(3):
            if name == "egn":
                each.step(x, y)
                continue
            each.zero_grad()
            (net(x) - y).square().mean().backward()
            each.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    for count in ("steps", "rounds", "position"):
        assert getattr(optimizer, count, 0) == getattr(plain, count, 0)


def test_a_copy_of_egn_and_its_model_goes_on_alike():
    model = network()
    optimizer = EGN(model, momentum=0.9, damping=0.1)
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    optimizer.step(x, y)
    other, theirs = copy.deepcopy((model, optimizer))
    optimizer.step(x, y)
    theirs.step(x, y)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert theirs.model is other and other[0].weight is not model[0].weight
