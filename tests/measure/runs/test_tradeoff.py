"""The fit against closed forms, the published noisy quadratic, and its own coverage under simulated noise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.measure.runs.tradeoff import Tradeoff, fit_tradeoff

GRID = [2.0**k for k in range(4, 11)]
SIMULATIONS = 400
FOUR_SIGMA = 4 * math.sqrt(0.95 * 0.05 / SIMULATIONS)  # 0.044


@given(
    s_min=st.floats(1, 1e6),
    b_crit=st.floats(1e-2, 1e6),
    sizes=st.lists(st.integers(1, 10_000), min_size=3, max_size=9, unique=True),
)
def test_the_law_itself_is_recovered(s_min, b_crit, sizes):
    sizes = sorted({max(1.0, b_crit / 50), max(2.0, b_crit), max(3.0, 50 * b_crit)} | set(map(float, sizes)))
    fit = fit_tradeoff(sizes, [s_min * (1 + b_crit / b) for b in sizes])
    assert fit.b_crit.value == pytest.approx(b_crit, rel=1e-6)
    assert fit.s_min.value == pytest.approx(s_min, rel=1e-6)
    assert fit.e_min.value == pytest.approx(s_min * b_crit, rel=1e-6)


def quadratic_steps(batch_size, dimensions=100, share=0.05):
    """Updates until the exact expected loss is 5 % of the first, at the best of 60 rates. Noise covariance H."""
    h = 1.0 / np.arange(1, dimensions + 1)
    rates = np.logspace(-3, math.log10(1.999), 60)[:, None]
    shrink, noise = (1 - rates * h) ** 2, rates**2 * h / batch_size
    square, step = np.ones((60, dimensions)), 0
    while (square @ h).min() > share * h.sum():
        square = shrink * square + noise
        step += 1
    return step


def test_the_noisy_quadratic_gives_its_known_numbers():
    sizes = [2.0**k for k in range(13)]
    fit = fit_tradeoff(sizes, [quadratic_steps(b) for b in sizes])
    assert fit.s_min.value == pytest.approx(24.8, rel=0.03)
    assert fit.b_crit.value == pytest.approx(45.1, rel=0.03)
    assert max(map(abs, fit.residuals)) == pytest.approx(0.064, abs=0.02)
    assert fit.bracketed


@pytest.mark.parametrize(
    ("sizes", "b_crit", "noise", "runs", "shared"),
    [
        (GRID, 100, 0.05, 1, 0.0),
        (GRID, 100, 0.5, 1, 0.0),
        (GRID, 2000, 0.1, 1, 0.0),
        (GRID, 100, 0.1, 3, 0.0),
        (GRID, 100, 0.1, 3, 0.1),
        (GRID[::3], 64, 0.1, 1, 0.0),
    ],
)
def test_intervals_cover_at_their_rate(sizes, b_crit, noise, runs, shared):
    """`shared`: an error that all runs of one batch size have in common, as from its learning rate."""
    random, covered = np.random.default_rng(0), np.zeros(3)
    truth = (100.0, 100.0 * b_crit, float(b_crit))
    every = np.repeat(sizes, runs)
    for _ in range(SIMULATIONS):
        errors = noise * random.standard_normal(len(every))
        errors += np.repeat(shared * random.standard_normal(len(sizes)), runs)
        fit = fit_tradeoff(every, 100 * (1 + b_crit / every) * np.exp(errors))
        found = (fit.s_min, fit.e_min, fit.b_crit)
        covered += [each.low <= value <= each.high for each, value in zip(found, truth, strict=True)]
    assert (np.abs(covered / SIMULATIONS - 0.95) < FOUR_SIGMA).all(), covered / SIMULATIONS


def test_a_narrower_coverage_is_a_narrower_interval_inside():
    steps = [100 * (1 + 64 / b) * f for b, f in zip(GRID, (1.1, 0.95, 1, 1.05, 0.9, 1, 1.02), strict=True)]
    wide, narrow = fit_tradeoff(GRID, steps), fit_tradeoff(GRID, steps, coverage=0.5)
    assert wide.b_crit.low < narrow.b_crit.low < narrow.b_crit.value < narrow.b_crit.high < wide.b_crit.high
    assert narrow.b_crit.coverage == 0.5 and narrow.b_crit.value == wide.b_crit.value


def test_perfect_scaling_leaves_the_critical_batch_unbounded_above():
    fit = fit_tradeoff(GRID, [1e5 / b for b in GRID])
    assert fit.b_crit.value == math.inf == fit.b_crit.high and fit.b_crit.low > 100 * GRID[-1]
    assert fit.s_min.value == 0.0 and fit.e_min.value == pytest.approx(1e5, rel=1e-5)
    assert not fit.bracketed and "no plateau is seen up to batch size 1024" in fit.note
    assert fit.steps(64) == pytest.approx(1e5 / 64, rel=1e-5)


def test_a_plateau_leaves_the_critical_batch_unbounded_below():
    fit = fit_tradeoff(GRID, [50.0 + 0.01 * (-1) ** k for k in range(7)])
    assert fit.b_crit.low == 0.0 and fit.e_min.low == 0.0 and fit.b_crit.high < GRID[0]
    assert fit.s_min.value == pytest.approx(50, rel=1e-3)
    assert not fit.bracketed and "from batch size 16 on: add smaller ones" in fit.note


def test_scatter_that_hides_the_law_is_said():
    fit = fit_tradeoff([16, 32, 64], [100, 30, 95])
    assert (fit.b_crit.low, fit.b_crit.high) == (0.0, math.inf)
    assert not fit.bracketed and "scatter hides the law" in fit.note


def test_steeper_than_the_law_allows_is_its_limit():
    fit = fit_tradeoff(GRID, [1e6 / b**1.5 for b in GRID])
    assert fit.b_crit.value == math.inf and not fit.bracketed


def test_censored_sizes_are_left_out_and_counted():
    steps = [100 * (1 + 64 / b) for b in GRID]
    fit = fit_tradeoff([*GRID, 2048, 4096], [*steps, None, math.inf])
    assert fit.censored == 2 and fit.batch_sizes == tuple(GRID)
    assert fit.b_crit.value == pytest.approx(64, rel=1e-6)
    assert "batch size 2048 is left out: 1 of 1 runs did not reach the target" in fit.note


def test_a_few_censored_runs_do_not_make_a_size_look_fast():
    """Runs stopped at 1.2 times the true steps: dropping them would bias the last size low by 16 %."""
    random, found = np.random.default_rng(0), []
    for _ in range(100):
        every = np.repeat(GRID, 9)
        truth = 100 * (1 + 64 / every)
        steps = truth * np.exp(0.3 * random.standard_normal(len(every)))
        lost = (every == GRID[-1]) & (steps > 1.2 * truth)
        fit = fit_tradeoff(every, [None if gone else s for gone, s in zip(lost, steps, strict=True)])
        if GRID[-1] in fit.batch_sizes:
            found.append(math.log(fit.s_min.value / 100))
    standard_error = np.std(found) / math.sqrt(len(found))
    assert len(found) > 90 and standard_error < 0.01
    assert abs(np.mean(found)) < 0.03


def test_order_does_not_matter_and_units_carry_through():
    steps = [100 * (1 + 64 / b) * f for b, f in zip(GRID, (1.1, 0.95, 1, 1.05, 0.9, 1, 1.02), strict=True)]
    fit, back = fit_tradeoff(GRID, steps), fit_tradeoff(GRID[::-1], steps[::-1])
    assert back == fit
    tokens = fit_tradeoff([512 * b for b in GRID], steps)
    assert tokens.b_crit.value == pytest.approx(512 * fit.b_crit.value, rel=1e-6)
    assert tokens.b_crit.low == pytest.approx(512 * fit.b_crit.low, rel=1e-6)
    assert tokens.s_min.high == pytest.approx(fit.s_min.high, rel=1e-6)


def test_json_both_ways():
    fit = fit_tradeoff(GRID, [1e5 / b for b in GRID])
    assert Tradeoff.from_json(fit.to_json()) == fit


@pytest.mark.parametrize(
    ("sizes", "steps", "coverage", "message"),
    [
        ([16, 64], [10, 5], 0.95, "batch_sizes must hold at least 3 different sizes that reached the target, got 2"),
        ([16, 64, 256], [10, 5, None], 0.95, "at least 3 different sizes that reached the target, got 2"),
        ([16, 16, 16], [10, 5, 4], 0.95, "at least 3 different sizes that reached the target, got 1"),
        ([16, 64, 256], [10, 5], 0.95, "batch_sizes and steps must be of one length, got 3 and 2"),
        (["a", "b", "c"], [10, 5, 4], 0.95, "batch_sizes must be finite and > 0, got 'a'"),
        ([16, 64, 256], [10, 5, "x"], 0.95, "steps must be > 0, or None .* got 'x'"),
        (None, [10, 5, 4], 0.95, "batch_sizes must be a sequence of numbers, got None"),
        ([16, 64, 0], [10, 5, 4], 0.95, "batch_sizes must be finite and > 0, got 0"),
        ([16, 64, 256], [10, 5, 0], 0.95, "steps must be > 0, or None where the target was not reached, got 0"),
        ([16, 64, 256], [10, 5, math.nan], 0.95, "steps must be > 0, or None .* got nan"),
        ([16, 64, 256], [10, 5, 4], 1.0, "coverage must lie in .0, 1., got 1.0"),
    ],
)
def test_bad_input_is_named(sizes, steps, coverage, message):
    with pytest.raises(InputError, match=message):
        fit_tradeoff(sizes, steps, coverage=coverage)
