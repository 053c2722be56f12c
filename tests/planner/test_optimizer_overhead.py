"""The optimizer's share of an update against closed forms, and the state's size against real optimizers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.lamb import LAMB
from batchlab.optim.lars import LARS
from batchlab.optim.learned.learned import LearnedOptimizer
from batchlab.optim.learned.weights import fresh_weights
from batchlab.planner.optimizer_overhead import (
    STATE_ELEMENTS,
    learned_temporary_bytes,
    least_accumulation,
    least_batch,
    optimizer_share,
    state_elements,
)

SECONDS = {"fixed_seconds": 0.25, "example_seconds": 0.125}


def test_the_share_of_synthetic_times_is_exact():
    assert optimizer_share(1.0, 6, **SECONDS) == 0.5
    assert optimizer_share(1.0, 6, **SECONDS, accumulation=3) == 0.25
    assert optimizer_share(0.0, 6, **SECONDS) == 0.0


@pytest.mark.parametrize("micro_batch", [None, 1, 6, 7])
@given(
    share=st.floats(0.001, 0.999),
    optimizer=st.floats(1e-6, 10),
    fixed=st.floats(0, 1),
    each=st.floats(1e-4, 1),
)
def test_the_least_batch_is_the_least(micro_batch, share, optimizer, fixed, each):
    """It reaches the share and the next smaller one does not, in floating point too."""
    seconds = {"fixed_seconds": fixed, "example_seconds": each}
    batch = least_batch(share, optimizer, **seconds, micro_batch=micro_batch)

    def reached(batch):
        if micro_batch is None:
            return optimizer_share(optimizer, batch, **seconds)
        return optimizer_share(optimizer, micro_batch, **seconds, accumulation=batch // micro_batch)

    assert reached(batch) <= share
    step = micro_batch or 1
    assert batch == step or reached(batch - step) > share
    if micro_batch is not None:
        assert least_accumulation(share, optimizer, micro_batch, **seconds) == batch // micro_batch


@given(batch=st.integers(1, 10**6), k=st.integers(1, 1000), optimizer=st.floats(1e-3, 10))
def test_the_share_falls_with_the_batch_and_with_accumulation(batch, k, optimizer):
    here = optimizer_share(optimizer, batch, **SECONDS, accumulation=k)
    assert optimizer_share(optimizer, 2 * batch, **SECONDS, accumulation=k) < here
    assert optimizer_share(optimizer, batch, **SECONDS, accumulation=k + 1) < here


def _held(optimizer):
    """Numbers in the state but for the counters of steps."""
    return sum(value.numel() for state in optimizer.state.values() for name, value in state.items() if name != "step")


MAKES = {
    "learned": lambda p: LearnedOptimizer(p, weights=fresh_weights(0)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p),
    "adamw": lambda p: torch.optim.AdamW(p),
    "lars": lambda p: LARS(p, lr=0.1),
    "lamb": lambda p: LAMB(p, lr=0.1),
}


@pytest.mark.parametrize("name", MAKES)
def test_the_state_is_what_the_optimizer_holds(name):
    parameters = [nn.Parameter(torch.ones(shape)) for shape in [(5, 3), (4, 3, 3, 3), (6, 6), (7,), ()]]
    optimizer = MAKES[name](parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    total = sum(parameter.numel() for parameter in parameters)
    assert state_elements([p.shape for p in parameters], name) * total == pytest.approx(_held(optimizer), rel=1e-12)


def test_a_large_matrix_has_twice_adams_state():
    assert state_elements([(1 << 12, 1 << 12)]) == pytest.approx(4 + 6 / 4096)
    assert state_elements([(7, 0), (2,)]) == 7.0
    assert STATE_ELEMENTS["adam"] == 2


def test_temporaries_stay_within_the_bound():
    """By the allocations of a step on a tensor of many chunks; half of the bound would not do."""
    p = nn.Parameter(torch.ones(1 << 17))
    p.grad = torch.ones_like(p)
    optimizer = LearnedOptimizer([p], weights=fresh_weights(0))
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    g_sq, small = 4 * p.numel(), 1 << 16
    assert learned_temporary_bytes(4096) / 2 < most - g_sq < learned_temporary_bytes(4096) + small


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: optimizer_share(-1.0, 8, **SECONDS), "optimizer_seconds must be >= 0, got -1.0"),
        (lambda: optimizer_share(math.nan, 8, **SECONDS), "optimizer_seconds must be >= 0, got nan"),
        (lambda: optimizer_share(math.inf, 8, **SECONDS), "seconds must be finite, got inf"),
        (lambda: optimizer_share(1.0, 0, **SECONDS), "micro_batch must be finite and > 0, got 0"),
        (lambda: optimizer_share(1.0, 8, **SECONDS, accumulation=1.5), "accumulation must be an integer"),
        (lambda: optimizer_share(1.0, 8, example_seconds=0.0), "example_seconds must be finite and > 0"),
        (lambda: least_batch(0.0, 1.0, **SECONDS), r"share must lie in \(0, 1\), got 0.0"),
        (lambda: least_batch(1.0, 1.0, **SECONDS), r"share must lie in \(0, 1\), got 1.0"),
        (lambda: least_batch(0.1, 1.0, **SECONDS, micro_batch=0), "micro_batch must be an integer"),
        (lambda: state_elements([]), "shapes must hold a parameter"),
        (lambda: state_elements([(2,)], "adamx"), "optimizer must be one of .*got 'adamx'"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(InputError, match=word):
        call()
