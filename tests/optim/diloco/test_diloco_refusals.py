"""What DiLoCo refuses: arguments, inner optimizers, states, and a round that is not finite."""

import copy
import math

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError, NonFiniteError
from batchlab.optim.diloco.diloco import DiLoCo, outer_learning_rate
from batchlab.optim.vrgd.optimizers import VRSGD
from tests.optim.diloco.diloco_fixture import INNER, backward, batch, network, train, weights


def test_a_bad_round_is_named_and_moves_nothing_common():
    model = network()
    optimizer = DiLoCo(INNER["adamw"](model.named_parameters()), inner_steps=2, outer_lr=0.6)
    train(model, optimizer, 3)
    held = copy.deepcopy(optimizer.state_dict()["diloco"])
    backward(model, *batch(0, 3))
    model[2].bias.grad[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"in outer step 2; 2.bias is so on this one, whose inner state must"):
        optimizer.step()
    now = optimizer.state_dict()["diloco"]
    for key in ("theta", "velocity"):
        assert all(map(torch.equal, held[key], now[key]))
    assert model[2].bias.isnan().any()  # nothing was silently made finite
    optimizer.rewind()
    optimizer.state.clear()
    train(model, optimizer, 4)
    assert optimizer.rounds == 3 and weights(model).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner_steps": 0}, "inner_steps must be an integer of at least 1, got 0"),
        ({"inner_steps": 2.5}, "inner_steps must be an integer of at least 1, got 2.5"),
        ({"outer_lr": 0.0}, "outer_lr must be finite and > 0, got 0.0"),
        ({"outer_lr": math.nan}, "outer_lr must be finite and > 0, got nan"),
        ({"outer_lr": None}, "outer_lr must be finite and > 0, got None"),
        ({"outer_momentum": 1.0}, r"outer_momentum must lie in \[0, 1\), got 1.0"),
        ({"outer_momentum": -0.1}, r"outer_momentum must lie in \[0, 1\), got -0.1"),
        ({"outer_momentum": "0.9"}, r"outer_momentum must lie in \[0, 1\), got '0.9'"),
        ({"clip_norm": 0.0}, "clip_norm must be finite and > 0, got 0.0"),
        ({"process_group": 3}, "process_group must be a torch.distributed.ProcessGroup that this rank is in, or None"),
        (
            {"buffers": [("scale", torch.ones(1))]},
            r"buffers must be several tensors, as model.buffers\(\) gives them, go",
        ),
        ({"buffers": torch.ones(2)}, r"buffers must be several tensors, as model.buffers\(\) gives them, got tensor"),
        ({"inner": nn.Linear(1, 1)}, "inner must be the torch.optim.Optimizer of one replica, got Linear"),
    ],
)
def test_bad_input_is_named(arguments, message):
    given_ = {"inner": INNER["sgd"](network().parameters()), "inner_steps": 3, "outer_lr": 0.6} | arguments
    with pytest.raises(InputError, match=message):
        DiLoCo(given_.pop("inner"), **given_)


def test_what_the_inner_optimizer_may_not_be():
    inner = DiLoCo(INNER["sgd"](network().parameters()), inner_steps=2, outer_lr=0.6)
    with pytest.raises(InputError, match="inner must be the torch.optim.Optimizer of one replica, got DiLoCo"):
        DiLoCo(inner, inner_steps=2, outer_lr=0.6)
    through = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, differentiable=True)
    with pytest.raises(InputError, match="inner must have differentiable=False"):
        DiLoCo(through, inner_steps=2, outer_lr=0.6)
    grouped = VRSGD(network().parameters(), lr=0.1)
    with pytest.raises(InputError, match="clip_norm must be None where inner takes its gradient in groups, as VRSGD d"):
        DiLoCo(grouped, inner_steps=2, outer_lr=0.6, clip_norm=1.0)
    complex_ = torch.optim.SGD([("w", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))], lr=0.1)
    with pytest.raises(InputError, match="DiLoCo needs real weights, got a complex w: make it a parameter by torch.vi"):
        DiLoCo(complex_, inner_steps=2, outer_lr=0.6)
    nowhere = torch.optim.SGD(nn.Linear(1, 1, device="meta").parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"param_groups\[0\]\['params'\]\[0\] is on meta: give it some before DiLoCo"):
        DiLoCo(nowhere, inner_steps=2, outer_lr=0.6)


def test_sparse_gradients_are_the_inner_optimizers_but_for_clipping():
    table = nn.Embedding(4, 2, sparse=True)
    for clip_norm in (None, 1.0):
        inner = torch.optim.SGD([("table", table.weight)], lr=0.1)
        optimizer = DiLoCo(inner, inner_steps=1, outer_lr=0.6, clip_norm=clip_norm)
        optimizer.zero_grad()
        table(torch.tensor([1])).sum().backward()
        if clip_norm is None:
            optimizer.step()
            continue
        with pytest.raises(InputError, match="clip_norm needs dense gradients, got a sparse one of table: build it"):
            optimizer.step()


def test_states_of_other_things_are_refused():
    model = network()
    inner = INNER["adamw"](model.named_parameters())
    optimizer = DiLoCo(inner, inner_steps=2, outer_lr=0.6)
    with pytest.raises(InputError, match=r'state_dict must be of DiLoCo \(no "diloco" in it\): load a plain one into'):
        optimizer.load_state_dict(inner.state_dict())
    state = optimizer.state_dict()
    state["diloco"]["theta"] = state["diloco"]["theta"][:3]
    with pytest.raises(InputError, match="state_dict must be of 4 parameters, got 3"):
        optimizer.load_state_dict(state)
    state["diloco"]["theta"] = [torch.zeros(2, 2)] * 4
    with pytest.raises(InputError, match=r"θ of 0.weight must be of shape \(5, 3\), got \(2, 2\)"):
        optimizer.load_state_dict(state)
    with pytest.raises(InputError, match="join needs a process group: give it to set_process_group first"):
        optimizer.join()


def test_outer_rates_are_the_sources_where_it_has_one():
    assert [outer_learning_rate(m) for m in (1, 2, 4, 8)] == [0.4, 0.6, 0.6, 0.8]
    with pytest.raises(InputError, match=r"replicas must be one of \(1, 2, 4, 8\), .* got 3: try outer rates of 0.4"):
        outer_learning_rate(3)
    with pytest.raises(InputError, match="replicas must be an integer of at least 1, got 0"):
        outer_learning_rate(0)
