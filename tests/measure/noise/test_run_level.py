import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.measure.noise.noise_pair import NoisePair
from batchlab.measure.noise.run_level import run_level


def test_it_is_the_law_where_the_noise_scale_is_known():
    """|G|² falls tenfold while tr(Σ) stays: Σ𝓑·w/Σw with w = 1/(1 + 𝓑/B), by hand."""
    grad_sq = np.geomspace(1.0, 0.1, 400)
    noise = 50.0 / grad_sq
    for batch in (8, 64, 512):
        weights = 1 / (1 + noise / batch)
        got = run_level([[NoisePair(g, 50.0) for g in grad_sq]], batch, reach=1)
        assert got.value == pytest.approx((noise * weights).sum() / weights.sum(), rel=1e-3)
        assert run_level([[NoisePair(g, 50.0) for g in grad_sq]], batch).value == pytest.approx(got.value, rel=2e-3)


def test_it_predicts_the_batch_at_which_steps_double():
    """Σ over updates of the noise-free step 1/(1 + 𝓑/B) is the same at any B: S(B) found by counting obeys B_crit."""

    def updates(batch, total=100.0):
        done, count, pairs = 0.0, 0, []
        while done < total:
            noise = 20.0 + 2.0 * done
            pairs.append(NoisePair(1.0, noise))
            done += 1 / (1 + noise / batch)
            count += 1
        return count, pairs

    _, pairs = updates(64)
    b_crit = run_level([pairs], 64).value
    assert b_crit == pytest.approx(120.0, rel=0.02)  # the mean of 20 + 2s over s in 0..100
    assert updates(120)[0] == pytest.approx(2 * 100, rel=0.02)
    assert updates(10**9)[0] == pytest.approx(100, abs=1)


def test_negative_estimates_do_no_harm_and_the_interval_covers():
    """400 runs of 120 noisy updates, truth 80: Binomial(400, 0.95) lies in 364..393 with probability 0.998."""
    rng, covered, values = np.random.default_rng(0), 0, []
    for _ in range(400):
        trace = 80 * rng.chisquare(20, 120) / 20
        grad_sq = 1 + rng.normal(0, 1.2, 120)
        got = run_level([[NoisePair(g, t) for g, t in zip(grad_sq, trace, strict=True)]], 64)
        covered += got.low <= 80 <= got.high
        values.append(got.value)
    assert 364 <= covered <= 393
    assert np.median(values) == pytest.approx(80, rel=0.05)


def test_runs_are_pooled():
    one, other = [NoisePair(1.0, 40.0)] * 30, [NoisePair(1.0, 80.0)] * 30
    assert run_level([one, other], 60).value == pytest.approx((40 * 0.6 + 80 * 3 / 7) / (0.6 + 3 / 7))


def test_bad_input_is_named():
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        run_level([[]], 0)
    with pytest.raises(InputError, match="reach must be at least 1, got 0"):
        run_level([[]], 8, reach=0)
    assert "too few" in run_level([], 8).method
