"""Tokens to a loss, their ratio between two optimizers, and the points that nothing dominates."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.measure.runs.token_ratio import (
    TokenRatio,
    advantage_lasts,
    pareto,
    smoothed,
    token_ratio,
    tokens_to_loss,
)


def line(tokens, start=4.0, end=3.0):
    """A straight curve from `start` to `end` over so many tokens, in ten pieces."""
    return [(tokens * k / 10, start + (end - start) * k / 10) for k in range(11)]


@given(tokens=st.floats(1, 1e12), share=st.floats(0.01, 0.99))
def test_a_crossing_on_a_line_is_exact(tokens, share):
    assert tokens_to_loss(line(tokens), 4.0 - share) == pytest.approx(share * tokens, rel=1e-9)


def test_the_first_crossing_of_the_running_minimum():
    """Up to 3.6 between: the minimum before was 3.0, and the line goes from there."""
    curve = [(0, 4.0), (10, 3.0), (20, 3.6), (30, 2.0), (40, 5.0), (50, 1.0)]
    assert tokens_to_loss(curve, 2.5) == 25.0
    assert tokens_to_loss(curve, 3.0) == 10.0
    minimum = list(zip([x for x, _ in curve], np.minimum.accumulate([y for _, y in curve]), strict=True))
    for loss in (3.5, 2.9, 2.2, 1.5):
        assert tokens_to_loss(curve, loss) == tokens_to_loss(minimum, loss)


def test_nothing_is_extrapolated():
    assert tokens_to_loss(line(100), 2.999) is None
    assert tokens_to_loss(line(100), 3.0) == 100.0
    assert tokens_to_loss([(7, 3.0), (9, 2.0)], 3.5) == 7.0
    assert tokens_to_loss([(7, 3.0)], 2.0) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_curve_that_diverges_reaches_nothing(bad):
    assert tokens_to_loss([*line(100), (110, bad)], 3.5) is None


def test_means_over_a_window_shift_no_straight_curve():
    assert tokens_to_loss(smoothed(line(1000), 3), 3.5) == pytest.approx(500)
    assert smoothed(line(1000), 1) == line(1000) and len(smoothed(line(1000), 11)) == 1


BATCHES = (8, 32, 128)


def test_the_ratio_of_known_tokens_is_exact():
    """A needs 100, 150 and 300 tokens for each of B's 50, 50 and 75, at every loss."""
    a, b = {8: 100, 32: 150, 128: 300}, {8: 50, 32: 50, 128: 75}
    rows = token_ratio({k: [line(v)] for k, v in a.items()}, {k: [line(v)] for k, v in b.items()}, [3.5, 3.2])
    assert [(row.loss, row.batch_size) for row in rows] == [(loss, size) for loss in (3.5, 3.2) for size in BATCHES]
    assert [row.ratio.value for row in rows] == pytest.approx([2, 3, 4, 2, 3, 4])
    assert [row.tokens_a for row in rows[:3]] == pytest.approx([50, 75, 150])
    assert [row.extra for row in rows[:3]] == pytest.approx([25, 50, 112.5])
    assert {(row.ratio.low, row.ratio.high) for row in rows} == {(0.0, math.inf)}
    assert advantage_lasts(rows[:3]) is None
    assert TokenRatio.from_json(rows[0].to_json()) == rows[0]


def test_a_loss_that_was_not_reached_has_no_ratio():
    (row,) = token_ratio({8: [line(100)]}, {8: [line(100, end=3.4)]}, [3.2])
    assert (row.tokens_a, row.tokens_b) == (pytest.approx(80), None)
    assert math.isnan(row.ratio.value) and math.isnan(row.extra)
    assert row.ratio.method == "undefined: half or more of the runs of B did not reach the loss"
    three = [line(100), line(110), line(100, end=3.4)]
    (row,) = token_ratio({8: three}, {8: [line(100)] * 2}, [3.2])
    assert row.tokens_a == pytest.approx(88)


def noisy(factors, random, seeds=3, scatter=0.05):
    return {
        size: [line(1000 * factor * math.exp(scatter * random.standard_normal())) for _ in range(seeds)]
        for size, factor in zip(BATCHES, factors, strict=True)
    }


def test_intervals_hold_the_truth_at_the_stated_rate():
    """ln T of equal scatter, Student's with pooled variances: 400 studies of 3 sizes, 95 % within 3.5 errors."""
    random, held = np.random.default_rng(0), 0
    for _ in range(400):
        rows = token_ratio(noisy((2, 2, 3), random), noisy((1, 1, 1), random, seeds=2), [3.5])
        held += sum(row.ratio.low <= true <= row.ratio.high for row, true in zip(rows, (2, 2, 3), strict=True))
    assert 0.92 < held / 1200 < 0.98


def test_whether_the_advantage_lasts():
    random = np.random.default_rng(1)
    lasting = token_ratio(noisy((1.2, 1.4, 1.6), random), noisy((1, 1, 1), random), [3.5])
    fading = token_ratio(noisy((2.0, 1.6, 1.2), random), noisy((1, 1, 1), random), [3.5])
    gone = token_ratio(noisy((1.2, 1.2, 0.8), random), noisy((1, 1, 1), random), [3.5])
    assert [advantage_lasts(rows) for rows in (lasting, fading, gone)] == [True, False, False]
    assert advantage_lasts(lasting[::-1]) is True and advantage_lasts(lasting[:1]) is None


def test_runs_without_scatter_have_a_sharp_interval():
    a, b = {8: [line(200), line(200)]}, {8: [line(100), line(100)]}
    (row,) = token_ratio(a, b, [3.5])
    assert (row.ratio.low, row.ratio.high) == pytest.approx((2, 2)) and row.ratio.method == "2 and 2 runs"


points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30)


@given(points, st.randoms())
def test_the_envelope_is_what_nothing_dominates_in_any_order(found, random):
    kept = pareto(found)

    def dominated(p):
        return any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in found)

    assert sorted(kept) == sorted(p for p in found if not dominated(p)) == list(kept)
    shuffled = list(found)
    random.shuffle(shuffled)
    assert pareto(shuffled) == kept and pareto(kept) == kept


def test_points_may_be_anything_with_a_key():
    runs = [{"batch": 8, "time": 4.0, "devices": 1}, {"batch": 32, "time": 5.0, "devices": 2}]
    assert pareto(runs, key=lambda run: (run["time"], run["devices"])) == (runs[0],)
    assert pareto([(math.inf, 1), (2, 3)]) == ((2, 3), (math.inf, 1)) and pareto([]) == ()


CURVE = line(100)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: tokens_to_loss(CURVE, math.nan), "loss must be finite, got nan"),
        (lambda: tokens_to_loss([], 3.0), r"curve must hold at least one pair \(tokens, loss\), got none"),
        (
            lambda: tokens_to_loss([(1, 2), (1, 1)], 1),
            r"curve must hold ascending tokens of at least 0, got \[1.0, 1.0\]",
        ),
        (lambda: tokens_to_loss([(-1, 2)], 1), "curve must hold ascending tokens of at least 0"),
        (lambda: tokens_to_loss([(1, 2, 3)], 1), r"curve must hold pairs \(tokens, loss\), got \(1, 2, 3\)"),
        (lambda: tokens_to_loss([4.0, 3.0], 1), "curve must hold pairs"),
        (lambda: smoothed(CURVE, 0), "window must be an integer of at least 1, got 0"),
        (lambda: smoothed(CURVE, 12), "window must be at most the curve's 11 points, got 12"),
        (lambda: token_ratio({8: [CURVE]}, {16: [CURVE]}, [3.5]), r"the same batch sizes, got \[8\] and \[16\]"),
        (lambda: token_ratio({}, {}, [3.5]), "both must have the same batch sizes"),
        (lambda: token_ratio({8: []}, {8: [CURVE]}, [3.5]), "every batch size must have a curve, 8 has none"),
        (
            lambda: token_ratio({8: [CURVE]}, {8: [CURVE]}, [4.0]),
            "losses must lie below the first point of every curve",
        ),
        (lambda: token_ratio({0: [CURVE]}, {0: [CURVE]}, [3.5]), "batch_sizes must be finite and > 0, got 0"),
        (lambda: pareto([(1, math.nan)]), r"a point must be two numbers, got \(1, nan\)"),
        (lambda: pareto([1, 2]), "a point must be two numbers, got 1"),
    ],
)
def test_bad_input_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()


def test_rows_of_two_losses_are_no_one_answer():
    rows = token_ratio({8: [CURVE]}, {8: [CURVE]}, [3.5, 3.2])
    with pytest.raises(InputError, match=r"rows must be of one loss, got \[3.2, 3.5\]"):
        advantage_lasts(rows)
