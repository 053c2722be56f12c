"""Contrasts over seeds: Student's t as a case, the level under unequal noise, what must not matter, ratios."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from batchlab.rules.replicates import beyond, independent, mean_of, p_value, ratio_of


def design(cells=12, seed=0):
    random = np.random.default_rng(seed)
    return np.column_stack([np.ones(cells), random.standard_normal((cells, 4))])


def test_one_contrast_is_students_t():
    random = np.random.default_rng(0)
    scores, contrast = random.standard_normal((5, 7)), np.zeros((7, 1))
    contrast[:2, 0] = np.array([1, -1]) / math.sqrt(2)
    t = stats.ttest_1samp(scores[:, 0] - scores[:, 1], 0.0)
    assert p_value(scores, contrast) == pytest.approx(t.pvalue, rel=1e-9)


def test_the_statistic_and_its_correction_term_by_term():
    """F on k·ε̃ and k·ε̃(S - 1), ε̃ by Huynh and Feldt, written out for three contrasts of six seeds."""
    random = np.random.default_rng(1)
    scores, Q = random.standard_normal((6, 5)) * [1, 1, 2, 3, 5], np.linalg.qr(random.standard_normal((5, 4)))[0]
    Q = Q - Q.mean(axis=0)
    Q = np.linalg.qr(Q)[0][:, :3]
    z = scores @ Q
    C = np.cov(z, rowvar=False)
    greenhouse = np.trace(C) ** 2 / (3 * np.trace(C @ C))
    huynh = min(1, (6 * 3 * greenhouse - 2) / (3 * (6 - 1 - 3 * greenhouse)))
    assert greenhouse < huynh < 1
    F = 6 * (z.mean(0) @ z.mean(0)) / np.trace(C)
    assert p_value(scores, Q) == pytest.approx(stats.f.sf(F, 3 * huynh, 3 * huynh * 5), rel=1e-9)


def test_contrasts_span_what_a_design_has_beyond_another():
    whole = design()
    Q = beyond(whole, whole[:, :2])
    assert Q.shape == (12, 3) and np.allclose(Q.T @ Q, np.eye(3)) and np.allclose(Q.T @ whole[:, :2], 0, atol=1e-12)
    both = np.column_stack([independent(whole[:, :2]), Q])
    assert np.allclose(both @ (both.T @ whole), whole)
    assert beyond(whole, whole).shape == (12, 0) and beyond(np.eye(12), whole).shape == (12, 7)


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_what_must_not_matter(seed, scale, offset):
    """Units, an offset of each seed, the order of seeds, another basis of the same contrasts."""
    random = np.random.default_rng(seed)
    scores, Q = random.standard_normal((4, 12)), beyond(design(), design()[:, :2])
    p = p_value(scores, Q)
    rotated = Q @ np.linalg.qr(random.standard_normal((3, 3)))[0]
    shifted = scale * (scores + offset * random.standard_normal((4, 1)))[random.permutation(4)]
    assert p_value(shifted, rotated) == pytest.approx(p, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(("seeds", "unequal"), [(3, False), (5, False), (5, True), (10, True)])
def test_the_level_holds_for_unequal_noise(seeds, unequal):
    """1500 draws without effect at 5 %, within 3.5 errors of 2 points. The F without correction has 9 % for 5 seeds."""
    random, Q = np.random.default_rng(2), beyond(design(25), design(25)[:, :1])
    deviations = np.exp(np.linspace(-1.5, 1.5, 25)) if unequal else np.ones(25)
    p = [p_value(random.standard_normal((seeds, 25)) * deviations, Q) for _ in range(1500)]
    assert 0.03 < np.mean(np.array(p) < 0.05) < 0.07


def test_seeds_that_agree_exactly():
    Q = beyond(design(), design()[:, :1])
    flat, tilted = np.ones((3, 12)) * 7.3, np.tile(design()[:, 1], (3, 1))
    assert p_value(flat, Q) == 1.0 and p_value(1e6 * flat, Q) == 1.0
    assert p_value(tilted, Q) == 0.0 and p_value(tilted, Q[:, :0]) == 1.0


def test_two_seeds_have_one_degree_of_freedom():
    random = np.random.default_rng(3)
    scores, Q = random.standard_normal((2, 12)), beyond(design(), design()[:, :1])
    z = scores @ Q
    F = 2 * (z.mean(0) @ z.mean(0)) / np.trace(np.cov(z, rowvar=False))
    assert p_value(scores, Q) == pytest.approx(stats.f.sf(F, 1, 1), rel=1e-9)


def test_the_mean_has_students_interval():
    found = mean_of(np.array([1.0, 2.0, 6.0]), 0.9, "three")
    low, high = stats.t.interval(0.9, 2, loc=3.0, scale=stats.sem([1.0, 2.0, 6.0]))
    assert (found.value, found.low, found.high) == pytest.approx((3.0, low, high))


def test_the_ratio_covers_at_the_stated_rate():
    """Fieller's interval is exact for Gaussian pairs: 1500 draws at 95 %, within 3.5 errors of 2 points."""
    random, held = np.random.default_rng(4), 0
    for _ in range(1500):
        x, y = random.standard_normal((2, 5)) * 0.3 + np.array([[1.0], [2.0]])
        found = ratio_of(x, y, 0.95, "pairs")
        held += found.low <= 0.5 <= found.high
    assert 0.93 < held / 1500 < 0.97


def test_a_denominator_that_may_be_zero_bounds_nothing():
    found = ratio_of(np.array([1.0, 1.1, 0.9]), np.array([0.1, -0.2, 0.3]), 0.95, "pairs")
    assert (found.low, found.high) == (-math.inf, math.inf) and "may be 0" in found.method
    assert math.isnan(ratio_of(np.array([1.0, 2.0]), np.array([1.0, -1.0]), 0.95, "pairs").value)
    exact = ratio_of(np.array([1.0, 1.0]), np.array([2.0, 2.0]), 0.95, "pairs")
    assert (exact.low, exact.value, exact.high) == (0.5, 0.5, 0.5)
