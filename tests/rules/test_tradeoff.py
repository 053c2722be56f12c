"""The trade-off law: its identities, the quadratic it comes from, the run-level fit, the adaptive schedule."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.rules import tradeoff
from batchlab.rules.learning_rate import saturating

sizes = st.floats(1e-3, 1e7)


@given(sizes, sizes, sizes)
def test_hyperbola_identities(batch, s_min, b_crit):
    steps = tradeoff.steps(batch, s_min=s_min, b_crit=b_crit)
    examples = tradeoff.examples(batch, s_min=s_min, b_crit=b_crit)
    e_min = s_min * b_crit
    assert examples == pytest.approx(batch * steps, rel=1e-12)
    assert tradeoff.steps(b_crit, s_min=s_min, b_crit=b_crit) == pytest.approx(2 * s_min, rel=1e-12)
    assert tradeoff.examples(b_crit, s_min=s_min, b_crit=b_crit) == pytest.approx(2 * e_min, rel=1e-12)
    assert steps > s_min * (1 - 1e-12) and examples > e_min * (1 - 1e-12)
    if 1e-3 < batch / b_crit < 1e3:  # elsewhere the differences lose their digits
        assert (steps / s_min - 1) * (examples / e_min - 1) == pytest.approx(1, rel=1e-9)


@given(sizes, sizes, sizes)
def test_least_steps_inverts_steps(batch, s_min, b_crit):
    steps = tradeoff.steps(batch, s_min=s_min, b_crit=b_crit)
    assert tradeoff.min_steps(steps, batch, b_crit=b_crit) == pytest.approx(s_min, rel=1e-12)


@given(sizes, sizes, sizes, st.floats(0, 1e9) | st.just(math.inf))
def test_ratio_composes_and_is_one_at_home(a, b, c, b_crit):
    ratio = tradeoff.steps_ratio
    assert ratio(a, a, b_crit=b_crit) == 1
    assert ratio(c, b, b_crit=b_crit) * ratio(b, a, b_crit=b_crit) == pytest.approx(
        ratio(c, a, b_crit=b_crit), rel=1e-12
    )


@given(sizes, sizes, st.lists(st.floats(0, 1e9), min_size=3, max_size=3))
def test_ratio_is_monotone_in_the_critical_batch(batch, base, crits):
    values = [tradeoff.steps_ratio(batch, base, b_crit=b) for b in [0.0, *sorted(crits), math.inf]]
    pairs = list(itertools.pairwise(values))
    slack = 1 + 1e-12
    assert all(x <= y * slack for x, y in pairs) if batch < base else all(y <= x * slack for x, y in pairs)


def test_exchange_rate_is_the_slope_of_the_front():
    def at(batch):
        law = {"s_min": 30.0, "b_crit": 70.0}
        return tradeoff.steps(batch, **law), tradeoff.examples(batch, **law)

    for batch in (7.0, 70.0, 700.0):
        (s_low, e_low), (s_high, e_high) = at(batch * (1 - 1e-6)), at(batch * (1 + 1e-6))
        assert tradeoff.exchange_rate(batch, b_crit=70.0) == pytest.approx(
            (e_high - e_low) / (s_low - s_high), rel=1e-4
        )
    assert tradeoff.adaptive_batch_size(70.0, exchange_rate=tradeoff.exchange_rate(50.0, b_crit=70.0)) == (
        pytest.approx(50.0)
    )


def test_quadratic_drop_equals_the_law():
    """L = ½θᵀHθ: B_noise = tr(HΣ)/(GᵀHG), ε_max = |G|²/(GᵀHG), ΔL_max = ½|G|⁴/(GᵀHG); 40,000 draws, 3 standard errors.

    With curvatures from 0.05 to 2 and noise large where they are, B_noise is far from tr(Σ)/|G|², which fails here.
    """
    rng = np.random.default_rng(0)
    d = 20
    h = np.geomspace(0.05, 2, d)
    theta, spread = rng.normal(size=d) / h**0.5, h * rng.uniform(1.0, 3.0, size=d)
    gradient = h * theta
    sq, bent = gradient @ gradient, gradient @ (h * gradient)
    noise_scale, largest, drop_max = (h * spread**2).sum() / bent, sq / bent, 0.5 * sq**2 / bent
    assert abs(math.log(noise_scale / ((spread**2).sum() / sq))) > 0.15
    for batch in (noise_scale / 4, noise_scale, 4 * noise_scale):
        rate = saturating(largest / 2, noise_scale, batch, noise_scale=noise_scale)
        assert rate == pytest.approx(largest / (1 + noise_scale / batch), rel=1e-12)
        drawn = gradient + rng.normal(size=(40_000, d)) * spread / math.sqrt(batch)
        moved = theta - rate * drawn
        drops = 0.5 * (theta @ (h * theta) - moved**2 @ h)
        expected = drop_max * tradeoff.efficiency(batch, noise_scale=noise_scale)
        assert abs(drops.mean() - expected) < 3 * drops.std() / math.sqrt(len(drops))
    assert tradeoff.efficiency(noise_scale, noise_scale=noise_scale) == pytest.approx(0.5)


def _steps_on_the_noisy_quadratic(batch):
    """Sheet check 4: d = 100, h_i = 1/i, Σ = H, θ₀² = 1, to 5 % of the first loss, the best of 60 learning rates."""
    h = 1 / np.arange(1, 101)
    rates = np.geomspace(1e-3, 1.99, 60)[:, None]
    square = np.ones((60, 100))
    for step in range(1, 20_000):
        square = (1 - rates * h) ** 2 * square + rates**2 * h / batch
        if ((h * square).sum(1) <= 0.05 * h.sum()).any():
            return step
    raise AssertionError("no learning rate reached the target")


def test_noisy_quadratic_follows_the_hyperbola():
    batches = [4, 16, 64, 256, 1024, 4096]
    steps = [_steps_on_the_noisy_quadratic(batch) for batch in batches]
    law = [tradeoff.steps(batch, s_min=24.8, b_crit=45.1) for batch in batches]
    assert np.abs(np.log(np.array(steps) / law)).max() < 0.08


def test_adaptive_gain_of_root_noise():
    """𝓑 = 10√s: γ = (∫s^¼)²/(∫√s) = (4/5)²·(3/2) = 24/25."""
    s = (np.arange(200_000) + 0.5) / 200_000
    assert tradeoff.adaptive_gamma(10 * np.sqrt(s)) == pytest.approx(24 / 25, rel=1e-6)
    assert tradeoff.adaptive_gamma([64.0] * 5) == pytest.approx(1, rel=1e-12)


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=20))
def test_adapting_never_loses(noise):
    assert 0 < tradeoff.adaptive_gamma(noise) <= 1 + 1e-12


def test_no_schedule_beats_the_adaptive_batch():
    """Sheet check 5: on S + E/r, 2,000 random positive schedules, near and far."""
    rng = np.random.default_rng(1)
    s = (np.arange(50) + 0.5) / 50
    noise, rate = 10 * np.sqrt(s), 25.0

    def price(batch):
        return np.mean(1 + noise / batch) + np.mean(noise + batch) / rate

    best = np.array([tradeoff.adaptive_batch_size(float(value), exchange_rate=rate) for value in noise])
    for spread in (0.01, 1.0):
        for _ in range(1000):
            assert price(best * np.exp(spread * rng.normal(size=50))) > price(best)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_sizes_are_refused_by_name(bad):
    with pytest.raises(InputError, match=r"batch_size must be finite and > 0, got "):
        tradeoff.steps(bad, s_min=1, b_crit=1)
    with pytest.raises(InputError, match=r"noise_scales must be finite and > 0, got "):
        tradeoff.adaptive_gamma([1.0, bad])


def test_bad_critical_batch():
    with pytest.raises(InputError, match=r"b_crit must be >= 0, got nan"):
        tradeoff.steps_ratio(1, 1, b_crit=math.nan)
    with pytest.raises(InputError, match="noise_scales must hold at least one value"):
        tradeoff.adaptive_gamma([])
