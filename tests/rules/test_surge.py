"""The sign-update law from gradient statistics: exact against sampled, its constants, its limits."""

import math

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.rules.learning_rate import surge
from batchlab.rules.surge import large_batch_learning_rate, sign_learning_rate, surge_constants


def _coupled(n=2000, mean=0.002):
    return np.full(n, mean), np.ones(n), np.eye(n) + 0.05 * np.ones((n, n))


def test_constants_and_curve_of_the_coupled_quadratic():
    """Sheet check 2, its numbers."""
    problem = _coupled()
    noise_scale, peak = surge_constants(*problem)
    assert noise_scale == pytest.approx(4125.4, rel=1e-4)
    assert peak == pytest.approx(9.7614e-5, rel=1e-4)
    exact = {1 / 16: 4.593e-5, 1 / 4: 7.806e-5, 1: 9.761e-5, 4: 7.860e-5, 16: 4.771e-5}
    law = {4: 7.809e-5, 16: 4.594e-5}
    for k, expected in exact.items():
        assert sign_learning_rate(k * noise_scale, *problem) == pytest.approx(expected, rel=2e-4)
    for k, expected in law.items():
        fallen = surge(peak, noise_scale, k * noise_scale, noise_scale=noise_scale, beyond_peak="fall")
        assert fallen == pytest.approx(expected, rel=2e-4)
    assert large_batch_learning_rate(problem[0], problem[2]) == pytest.approx(1.980e-5, rel=2e-4)
    assert sign_learning_rate(1e9, *problem) == pytest.approx(1.980e-5, rel=2e-3)


def test_exact_formula_against_sampled_sign_updates():
    """Sheet check 1: 200,000 sign updates, within 1 %: about 4 standard errors at the smallest batch."""
    rng = np.random.default_rng(0)
    n = 6
    mean, std = rng.normal(size=n), rng.uniform(0.5, 2.0, size=n)
    a = rng.normal(size=(n, n))
    hessian = a @ a.T / n + 0.1 * np.eye(n)
    for batch in (1, 4, 16, 64):
        update = np.sign(mean + rng.normal(size=(200_000, n)) * std / math.sqrt(batch))
        curvature = np.einsum("ri,ij,rj->r", update, hessian, update).mean()
        sampled = (update.mean(0) @ mean) / curvature
        assert sign_learning_rate(batch, mean, std, hessian) == pytest.approx(sampled, rel=0.01)


def test_no_peak_without_cross_terms():
    """Sheet check 4: a diagonal Hessian gives Q = 0 and a rise without end."""
    mean, std, hessian = np.full(20, 0.01), np.ones(20), np.diag(np.linspace(1, 2, 20))
    assert surge_constants(mean, std, hessian) == (math.inf, math.inf)
    rates = [sign_learning_rate(batch, mean, std, hessian) for batch in (1, 10, 100, 1e3, 1e4)]
    assert rates == sorted(rates)


def test_negative_cross_terms_have_no_law():
    mean, std, hessian = np.array([1.0, 1.0]), np.ones(2), np.array([[1.0, -0.5], [-0.5, 1.0]])
    with pytest.raises(InputError, match="cross terms"):
        surge_constants(mean, std, hessian)
    assert sign_learning_rate(4, mean, std, hessian) > 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"std": [1.0, 0.0]}, "std must be finite and > 0 in every coordinate"),
        ({"std": [1.0, math.nan]}, "std must be finite and > 0 in every coordinate"),
        ({"mean": [1.0, math.nan]}, "mean must be finite in every coordinate"),
        ({"hessian": [[1.0, 0.3], [0.0, 1.0]]}, "hessian must be symmetric and finite"),
        ({"hessian": [[1.0]]}, "must be vectors of one length n and hessian n x n"),
        ({"batch_size": 0}, "batch_size must be finite and > 0, got 0"),
    ],
)
def test_bad_statistics(change, text):
    good = {"batch_size": 4, "mean": [1.0, 2.0], "std": [1.0, 1.0], "hessian": np.eye(2)}
    with pytest.raises(InputError, match=text):
        sign_learning_rate(**(good | change))


def test_large_batch_limit_needs_every_mean():
    with pytest.raises(InputError, match="non-zero in every coordinate"):
        large_batch_learning_rate([1.0, 0.0], np.eye(2))
