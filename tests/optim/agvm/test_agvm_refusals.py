"""What AGVM refuses: arguments, a wrong use of halves, gradients of other kinds."""

import math

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.agvm.agvm import AGVM
from batchlab.optim.vrgd.optimizers import VRSGD
from tests.optim.agvm.given_gradients import F64, give, pair


def wrapped(count=2, **options):
    groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(count)]
    return AGVM(torch.optim.SGD(groups, lr=0.1), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wrapped(1), "optimizer must have a parameter group for each module, two or more, got 1"),
        (lambda: AGVM("sgd"), "optimizer must be a torch.optim.Optimizer other than AGVM, got str"),
        (lambda: AGVM(wrapped()), "optimizer must be a torch.optim.Optimizer other than AGVM, got AGVM"),
        (lambda: wrapped(anchor=2), "anchor must be one of the 2 groups, 0 to 1, got 2"),
        (lambda: wrapped(anchor=-1), "anchor must be an integer of at least 0, got -1"),
        (lambda: wrapped(interval=0), "interval must be an integer of at least 1, got 0"),
        (lambda: wrapped(start=-1), "start must be an integer of at least 0, got -1"),
        (lambda: wrapped(start=1.5), "start must be an integer of at least 0, got 1.5"),
        (lambda: wrapped(alpha=math.nan), r"alpha must lie in \[0, 1\], got nan"),
        (lambda: wrapped(eps=0.0), "eps must be finite and > 0, got 0.0"),
        (
            lambda: wrapped(clamp=(2, 10)),
            r"clamp must be \(low, high\) with 0 < low <= 1 <= high, finite, got \(2, 10\)",
        ),
        (lambda: wrapped(clamp=0.5), r"clamp must be \(low, high\) with 0 < low <= 1 <= high, finite, got 0.5"),
        (
            lambda: AGVM(torch.optim.Adam([{"params": [p]} for p in torch.zeros(2, 1)], differentiable=True)),
            "AGVM cannot be differentiated through: the optimizer's differentiable must be False",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_wrong_use_of_halves_is_told():
    modules, agvm = pair()
    with pytest.raises(InputError, match="step 0 measures: run its backward passes in half"):
        agvm.step()
    with pytest.raises(InputError, match='name must be "A" or "B", got \'C\''), agvm.half("C"):
        pass
    with agvm.half("A"):
        modules[0].grad = torch.ones(3, dtype=F64)
    with pytest.raises(InputError, match="half 'B' is missing: this step has the gradient of the other one alone"):
        agvm.step()
    with pytest.raises(InputError, match="half 'A' of this step was taken already"), agvm.half("A"):
        pass
    agvm.zero_grad()
    modules[0].grad = torch.ones(3, dtype=F64)
    with pytest.raises(InputError, match="the gradients must be zero before the first half"), agvm.half("A"):
        pass
    with pytest.raises(InputError, match="rank_halves needs torch.distributed"), agvm.rank_halves():
        pass


def test_a_module_without_gradient_and_a_frozen_anchor_are_told():
    modules, agvm = pair()
    with pytest.raises(InputError, match=r"param_groups\[1\] \(unnamed\) has no gradient at a measuring step"):
        give(agvm, modules, [[[1.0, 0, 0], None]] * 2)
    modules, agvm = pair(anchor=1)
    modules[1].requires_grad_(False)
    with pytest.raises(InputError, match=r"the anchor, param_groups\[1\], is frozen: choose another anchor"):
        give(agvm, modules, [[[1.0, 0, 0], None]] * 2)
    agvm.zero_grad()
    agvm.param_groups[1]["params"].clear()
    with pytest.raises(InputError, match=r"param_groups\[1\] \(unnamed\) has no gradient"):
        give(agvm, modules[:1], [[[1.0, 0, 0]]] * 2)


def test_sparse_and_complex_gradients_are_refused_by_name():
    table = nn.Embedding(4, 2, sparse=True)
    groups = [{"params": [("table", table.weight)]}, {"params": [("head", nn.Parameter(torch.ones(2)))]}]
    agvm = AGVM(torch.optim.SGD(groups, lr=0.1), start=0)
    with pytest.raises(InputError, match="AGVM takes dense gradients, got a sparse one of table"), agvm.half("A"):
        table(torch.tensor([1])).sum().backward()
    turn = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    agvm = AGVM(torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))]}, {"params": [turn]}], lr=0.1), start=0)
    message = r"AGVM takes real gradients, got torch.complex64 of parameter 0 of param_groups\[1\]"
    with pytest.raises(InputError, match=message), agvm.half("A"):
        turn.abs().sum().backward()


def test_optimizers_that_it_cannot_step_are_refused():
    w, v = (nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(InputError, match="optimizer must take its gradient from .grad, got VRSGD"):
        AGVM(VRSGD([{"params": [w]}, {"params": [v]}], lr=0.1))
