"""The vertex of one parabola: known bowls, the naive fit, Fieller's coverage, and what is not bracketed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.rules.fit import Optimum, batch_optimum, learning_rate_optimum, optimum, timescale_optimum
from batchlab.rules.fit.bowl import vertex

POWERS = 2.0 ** np.arange(10)


def bowl(x, at, curvature=0.01):
    return 2.5 + curvature * np.log(np.asarray(x) / at) ** 2


@given(st.floats(4.0, 100.0), st.floats(1e-4, 1.0), st.floats(1e-6, 1e6))
def test_a_parabola_is_its_own_vertex_in_any_unit(at, curvature, unit):
    found = batch_optimum(unit * POWERS, bowl(POWERS, at, curvature))
    assert found.at.value == pytest.approx(unit * at, rel=1e-6) and found.bracketed
    assert found.at.low <= found.at.value <= found.at.high
    assert found.curvature == pytest.approx(2 * curvature, rel=1e-5)
    assert found.least_loss == pytest.approx(2.5, abs=1e-9)
    assert found.excess(2 * unit * at) == pytest.approx(curvature * math.log(2) ** 2, rel=1e-4)


def test_it_is_the_naive_fit_over_all_within_the_factor():
    rng = np.random.default_rng(0)
    x = np.repeat(POWERS, 2)
    losses = bowl(x, 20) + 0.003 * rng.standard_normal(20)
    for within in (4.0, 16.0, 1e4):
        found = batch_optimum(x, losses, within=within)
        means = losses.reshape(-1, 2).mean(1)
        near = np.abs(np.log(x / POWERS[means.argmin()])) <= math.log(within) + 1e-9
        c2, c1, _ = np.polyfit(np.log(x[near]), losses[near], 2)
        assert found.at.value == pytest.approx(math.exp(-c1 / (2 * c2)), rel=1e-8)
        assert found.fitted == tuple(np.unique(x[near]))
        assert len(found.residuals) == near.sum()
        assert math.exp(vertex(np.log(x), losses, within=within)) == pytest.approx(found.at.value, rel=1e-8)


def test_published_sweeps_of_a_language_model():
    """Bergsma et al. 2025, 610M at 20 tokens a parameter: best of its grid is 252 sequences for λ and for η tuned."""
    sizes = [63, 126, 252, 504, 2016, 4032]
    for losses in ([2.583, 2.570, 2.563, 2.571, 2.625, 2.754], [2.579, 2.565, 2.563, 2.563, 2.637, 2.733]):
        found = batch_optimum(sizes, losses, within=4)
        assert found.bracketed and 126 < found.at.value < 504
        assert found.x == tuple(map(float, sizes))


@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_fiellers_interval_covers_at_its_rate(coverage):
    """600 sweeps of ten batches, two runs each: four standard errors. The bowl's edge is never the best here."""
    inside = 0
    x = np.repeat(POWERS, 2)
    for seed in range(600):
        losses = bowl(x, 22.6) + 0.01 * np.random.default_rng(seed).standard_normal(20)
        found = optimum(x, losses, within=1e6, coverage=coverage).at
        inside += found.low <= 22.6 <= found.high
    assert abs(inside / 600 - coverage) < 4 * math.sqrt(coverage * (1 - coverage) / 600), inside / 600


def test_a_flat_bowl_has_no_bounds_and_says_so_by_infinity():
    rng = np.random.default_rng(1)
    wide = [optimum(POWERS, bowl(POWERS, 22.6, 1e-5) + 0.01 * rng.standard_normal(10), within=1e6) for _ in range(50)]
    found = [each for each in wide if each.bracketed]
    assert found and all(each.at.high == math.inf and each.at.low == 0 for each in found[:5])


def test_three_runs_leave_nothing_to_judge_by():
    found = batch_optimum([64, 128, 256], [2.6, 2.5, 2.6])
    assert (found.at.low, found.at.high) == (0.0, math.inf) and "leave no scatter to judge it by" in found.at.method


@pytest.mark.parametrize(
    ("x", "losses", "note"),
    [
        ([1, 2, 4, 8], [4, 3, 2, 1], "not bracketed: the least loss is at the largest tau tried, 8; try larger ones"),
        ([8, 4, 2, 1], [4, 3, 2, 1], "not bracketed: the least loss is at the smallest tau tried, 1; try smaller ones"),
        (
            [1, 2, 4, 8, 16],
            [3, 2.5, 2.0, 1.0, 1.01],
            "not bracketed: the parabola is least at tau 664.9, outside those tried",
        ),
        (
            [1, 2, 4, 8, 16],
            [1.0, 1.2, 0.99, 1.2, 1.0],
            "not bracketed: the loss has no least in tau, its scatter hides",
        ),
    ],
)
def test_what_is_not_bracketed_has_no_value(x, losses, note):
    found = timescale_optimum(x, losses)
    assert not found.bracketed and found.note.startswith(note)
    assert math.isnan(found.at.value) and (found.at.low, found.at.high) == (0.0, math.inf)
    assert math.isnan(vertex(np.log(x), np.array(losses, dtype=float)))


def test_the_edge_counts_by_means_over_runs():
    found = learning_rate_optimum([1e-3, 1e-3, 2e-3, 2e-3, 4e-3, 4e-3], [2.4, 2.6, 2.45, 2.45, 2.5, 2.5])
    assert found.bracketed and found.losses == pytest.approx((2.5, 2.45, 2.5))


def test_json_both_ways():
    found = batch_optimum(POWERS, bowl(POWERS, 20) + 0.001 * np.cos(POWERS))
    assert Optimum.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1, 2, 3], [1, 2]), {}, "batch_size and loss must be of one length, got 3 and 2"),
        (([1, 2, 4], [1, math.inf, 2]), {}, "loss must be finite, got inf: leave diverged runs out"),
        (([1, 2, 0], [1, 2, 3]), {}, "batch_size must be finite and > 0, got 0"),
        (([1, 2, 2], [1, 2, 3]), {}, "batch_size must hold at least 3 different values within a factor of 16 of the"),
        (([1, 2, 4000], [1, 2, 3]), {}, "within a factor of 16 of the best, 1, got 2"),
        (([1, 2, 4], [1, 2, 3]), {"within": 1}, "within must be finite and > 1, a factor, got 1"),
        (([1, 2, 4], [1, 2, 3]), {"coverage": 0}, "coverage must lie in .0, 1., got 0"),
        ((5, [1]), {}, "batch_size must be a sequence of numbers, got 5"),
    ],
)
def test_bad_sweeps_are_named(arguments, options, message):
    with pytest.raises(InputError, match=message):
        batch_optimum(*arguments, **options)
