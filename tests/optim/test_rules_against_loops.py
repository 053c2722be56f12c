"""Each rule equals its paper's formulas in a plain float64 loop, 100 steps, to 1e-12."""

from functools import partial

import pytest
import torch
from torch.optim.adam import adam

from batchlab.optim import lamb, shell
from batchlab.optim.ademamix import AdEMAMix
from batchlab.optim.lamb import LAMB
from batchlab.optim.lars import LARS
from batchlab.optim.lion import Lion
from batchlab.optim.mars import MARS
from batchlab.optim.signum import Signum
from tests.optim import naive
from tests.optim.problem import RATES, STEPS, after, close, gradients, matrix, weights


def loop(rule, **numbers):
    return rule(weights(), gradients, STEPS, rates=RATES, **numbers)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("lr_in_momentum", [False, True])
def test_lars(lr_in_momentum, foreach):
    settings = {"momentum": 0.8, "trust": 0.3, "lr_in_momentum": lr_in_momentum}
    ours = after(partial(LARS, lr=1.0, weight_decay=0.1, foreach=foreach, **settings))
    close(ours, loop(naive.lars, decay=0.1, adapt=matrix, **settings))
    every = after(partial(LARS, lr=1.0, weight_decay=0.1, foreach=foreach, exclude_vectors=False, **settings))
    close(every, loop(naive.lars, decay=0.1, adapt=lambda w: True, **settings))
    assert abs(every[2] - ours[2]).max() > 1e-3


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize("correct", [False, True])
def test_lamb(correct, foreach, monkeypatch):
    """None: by torch's fused Adam, which tensors as small as these would not take."""
    calls, settings = [], {"betas": (0.8, 0.95), "eps": 1e-3}
    monkeypatch.setattr(shell, "SMALL", 0)
    monkeypatch.setattr(lamb, "adam", lambda *args, **numbers: (calls.append(1), adam(*args, **numbers)))
    ours = after(partial(LAMB, lr=1.0, weight_decay=0.3, bias_correction=correct, foreach=foreach, **settings))
    close(ours, loop(naive.lamb, decay=0.3, adapt=matrix, correct=correct, **settings))
    assert len(calls) == (400 if foreach is None else 0)


@pytest.mark.parametrize("foreach", [False, True])
def test_lion(foreach):
    settings = {"betas": (0.8, 0.95)}
    ours = after(partial(Lion, lr=1.0, weight_decay=0.3, foreach=foreach, **settings))
    close(ours, loop(naive.lion, decay=0.3, **settings))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_signum(nesterov, foreach):
    settings = {"momentum": 0.8, "nesterov": nesterov}
    ours = after(partial(Signum, lr=1.0, weight_decay=0.3, foreach=foreach, **settings))
    close(ours, loop(naive.signum, decay=0.3, **settings))


@pytest.mark.parametrize("foreach", [False, True])
def test_ademamix(foreach):
    settings = {"betas": (0.8, 0.95, 0.99), "eps": 1e-3, "alpha": 3.0, "alpha_warmup": 60, "beta3_warmup": 80}
    ours = after(partial(AdEMAMix, lr=1.0, weight_decay=0.3, foreach=foreach, **settings))
    close(ours, loop(naive.ademamix, decay=0.3, **settings))


@pytest.mark.parametrize("foreach", [False, True])
def test_mars(foreach):
    settings = {"betas": (0.9, 0.95), "eps": 1e-3, "gamma": 0.05, "vector_lr": 0.5, "vector_betas": (0.7, 0.9)}
    ours = after(partial(MARS, lr=1.0, weight_decay=0.3, foreach=foreach, **settings))
    close(ours, loop(naive.mars, decay=0.3, **settings))


def test_rules_that_are_adamw_in_a_limit():
    """LAMB without adaptation, AdEMAMix without the slow momentum, MARS without correction of small gradients."""
    settings = {"betas": (0.8, 0.95), "eps": 1e-3}
    adamw = after(partial(torch.optim.AdamW, lr=1.0, weight_decay=0.0, **settings), rates=[0.01] * STEPS)
    decayed = after(partial(torch.optim.AdamW, lr=1.0, weight_decay=0.3, **settings), rates=[0.01] * STEPS)
    assert abs(adamw[0] - decayed[0]).max() > 1e-2
    slow = {"betas": (0.8, 0.95, 0.99), "eps": 1e-3, "alpha": 0.0, "weight_decay": 0.3}
    close(after(partial(AdEMAMix, lr=1.0, **slow), rates=[0.01] * STEPS), decayed)
    same = {"vector_lr": 1.0, "vector_betas": (0.8, 0.95), "gamma": 0.0, "weight_decay": 0.3}
    small = partial(after, rates=[0.01] * STEPS, scale=1e-3)
    close(
        small(partial(MARS, lr=1.0, **same, **settings)),
        small(partial(torch.optim.AdamW, lr=1.0, weight_decay=0.3, **settings)),
    )


def test_the_first_steps_of_mars_and_signum():
    """g before the first step counts as 0: c = g·(1 + γβ₁/(1 - β₁)); Signum's buffer starts from 0."""
    w = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    w.grad = torch.full_like(w, 0.01)
    optimizer = MARS([w], lr=1.0)
    optimizer.step()
    expected = 0.05 * 0.01 * (1 + 0.025 * 0.95 / 0.05)
    torch.testing.assert_close(optimizer.state[w]["exp_avg"], torch.full_like(w, expected), rtol=1e-12, atol=0)
    start = torch.nn.Parameter(torch.tensor([5.0, -5.0]))
    start.grad = torch.tensor([-1.0, 2.0])
    Signum([start], lr=1.0).step()
    assert start.tolist() == [6.0, -6.0]
