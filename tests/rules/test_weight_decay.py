"""The weights as an average of the updates, and the timescale that weight decay gives them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.rules import weight_decay

numbers = st.floats(1e-6, 1e3)


@pytest.mark.parametrize("scheduled", [False, True])
def test_adamw_averages_its_updates(scheduled):
    """Sheet check 1: θ_T = Π(1 - η_iλ)·θ₀ - Σ η_i·Π_{j>i}(1 - η_jλ)·u_i with torch's AdamW, float64."""
    lam, steps = 0.3, 25
    rates = [0.05 * (1 - i / 40) if scheduled else 0.05 for i in range(steps)]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, generator=generator, dtype=torch.float64)
    gradients = torch.randn(steps, 7, generator=generator, dtype=torch.float64)
    decayed = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([decayed], lr=0.05, weight_decay=lam)
    closed = start.clone()
    updates = []
    for rate, gradient in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        decayed.grad = gradient
        before = decayed.detach().clone()
        optimizer.step()
        updates.append(((1 - rate * lam) * before - decayed.detach()) / rate)
    for i in range(steps):
        closed = closed * (1 - rates[i] * lam)
    for i in range(steps):
        kept = math.prod(1 - rate * lam for rate in rates[i + 1 :])
        closed = closed - rates[i] * kept * updates[i]
    torch.testing.assert_close(decayed.detach(), closed, rtol=1e-12, atol=1e-12)


@given(numbers, numbers, numbers, st.floats(1.0, 1e6))
def test_inversion(tau, batch, rate, updates):
    """Sheet check 2, the part that needs no power law."""
    run = {"batch_size": batch, "learning_rate": rate, "total_examples": batch * updates}
    decay = weight_decay.from_timescale(tau, **run)
    assert weight_decay.timescale(weight_decay=decay, **run) == pytest.approx(tau, rel=1e-12)


@given(numbers, numbers, numbers, st.floats(2.0, 1e6))
def test_doubling(tau, batch, rate, updates):
    run = {"learning_rate": rate, "total_examples": batch * updates}
    decay = weight_decay.from_timescale(tau, batch_size=batch, **run)
    assert weight_decay.from_timescale(tau, batch_size=2 * batch, **run) == pytest.approx(2 * decay, rel=1e-12)
    longer = run | {"total_examples": 2 * batch * updates}
    assert weight_decay.from_timescale(tau, batch_size=batch, **longer) == pytest.approx(decay / 2, rel=1e-12)


def test_published_setting():
    """610M at 20 tokens a parameter: η 0.016 scaled by width 8, λ 0.1, B 252 of 2048 tokens, D 1.22e10: τ = 0.21."""
    tau = weight_decay.timescale(
        batch_size=252 * 2048, learning_rate=0.016 / 8, weight_decay=0.1, total_examples=1.22e10
    )
    assert tau == pytest.approx(0.21, abs=0.005)


@pytest.mark.parametrize("name", ["batch_size", "learning_rate", "weight_decay", "total_examples"])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_numbers(name, bad):
    good = {"batch_size": 1.0, "learning_rate": 0.1, "weight_decay": 0.1, "total_examples": 10.0}
    with pytest.raises(InputError, match=f"{name} must be finite and > 0, got "):
        weight_decay.timescale(**(good | {name: bad}))


def test_run_shorter_than_an_update():
    with pytest.raises(InputError, match=r"total_examples must be at least batch_size: a run of 10 is less than"):
        weight_decay.from_timescale(0.2, batch_size=11, learning_rate=0.1, total_examples=10)


rates = st.floats(1e-7, 10.0)


@given(decay=numbers, rate=rates, new_rate=rates, batch=st.floats(1.0, 1e5), kappa=st.floats(1e-3, 1e3))
def test_scaling_keeps_the_timescale(decay, rate, new_rate, batch, kappa):
    run = {"total_examples": 1e9}
    tau = weight_decay.timescale(batch_size=batch, learning_rate=rate, weight_decay=decay, **run)
    moved = weight_decay.scale_weight_decay(decay, kappa, learning_rate=rate, new_learning_rate=new_rate)
    found = weight_decay.timescale(batch_size=kappa * batch, learning_rate=new_rate, weight_decay=moved, **run)
    assert found == pytest.approx(tau, rel=1e-12)
    assert moved == pytest.approx(
        weight_decay.from_timescale(tau, batch_size=kappa * batch, learning_rate=new_rate, **run), rel=1e-12
    )


@given(st.floats(0.0, 10.0), st.floats(1e-3, 1e3), rates)
def test_the_three_rules_of_the_sheets(decay, kappa, rate):
    """κλ where η stays (sheet 17), √κ·λ with the square-root rule (sheet 53), λ with the linear rule."""

    def moved(new_rate):
        return weight_decay.scale_weight_decay(decay, kappa, learning_rate=rate, new_learning_rate=new_rate)

    assert moved(rate) == decay * kappa
    assert moved(rate * math.sqrt(kappa)) == pytest.approx(decay * math.sqrt(kappa), rel=1e-12)
    assert moved(rate * kappa) == pytest.approx(decay, rel=1e-12)


def test_scaling_is_the_first_order_of_the_exact_form():
    """(1 - ηλ)^κ = 1 - η̂λ̂ (sheet 53): they part by (ηλ·κ)²/2 at most."""
    rate, new_rate, decay, kappa = 1e-3, 4e-3, 0.1, 16
    exact = (1 - (1 - rate * decay) ** kappa) / new_rate
    moved = weight_decay.scale_weight_decay(decay, kappa, learning_rate=rate, new_learning_rate=new_rate)
    assert 0 < moved - exact < (rate * decay * kappa) ** 2 / 2 / new_rate


def test_scaling_refuses():
    with pytest.raises(InputError, match="weight_decay must be >= 0, got -1"):
        weight_decay.scale_weight_decay(-1, 2, learning_rate=1, new_learning_rate=1)
    with pytest.raises(InputError, match="new_learning_rate must be finite and > 0, got 0"):
        weight_decay.scale_weight_decay(1, 2, learning_rate=1, new_learning_rate=0)
