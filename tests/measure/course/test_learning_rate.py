"""The range test on losses that are given: its ramp, its readings against a naive moving average, and its cycle.

Gradient descent on ½hw² multiplies w by 1 - ηh: the loss is least when η first passes 2/h, its limit of stability.
"""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.measure.course.learning_rate import RangeTest, ramp, range_test


@given(low=st.floats(1e-9, 1e3), factor=st.floats(1.1, 1e9), steps=st.integers(4, 300))
def test_the_ramp_is_geometric_between_its_ends(low, factor, steps):
    rates = ramp(low, low * factor, steps)
    assert len(rates) == steps and rates[0] == low
    assert rates[-1] == pytest.approx(low * factor, rel=1e-12)
    assert np.diff(np.log(rates)) == pytest.approx(math.log(factor) / (steps - 1), rel=1e-6)


def descent(h, w=1.0):
    """One step of gradient descent on ½hw² at each call; returns the loss before it."""

    def update(rate):
        nonlocal w
        loss = 0.5 * h * w * w
        w -= rate * h * w
        return loss

    return update


@given(
    h=st.floats(1e-3, 1e3), ramped=st.one_of(st.tuples(st.just(0.13), st.integers(20, 400)), st.just((1.99, 10_000)))
)
def test_a_quadratic_is_least_and_diverges_at_its_limit_of_stability(h, ramped):
    """With y = ηh/2 each step multiplies |w| by 2y - 1, between y and y² above the limit; y grows by q a step.

    So |w| doubles, and the loss grows 4 times, D steps after its least where D(D + 1)·ln q > ln 2 at the earliest and
    (D - 1)(D - 2)/2·ln q <= ln 2 at the latest: at 2/h itself for a slow ramp.
    """
    start, steps = ramped
    found = range_test(descent(h), low=start / h, high=9 / h, steps=steps, smoothing=1.0, stop_factor=4.0)
    log_q = math.log(9 / start) / (steps - 1)
    assert 2 / h < found.minimum <= 2 / h * math.exp(log_q) * (1 + 1e-9)
    after = round(math.log(found.divergence / found.minimum) / log_q)
    assert (after - 1) * (after - 2) / 2 * log_q <= math.log(2) < after * (after + 1) * log_q
    assert steps < 10_000 or found.divergence < 1.02 * 2 / h


LOSSES = st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=60)


def naive_average(losses, weight, debias):
    """Each moving average written out as one weighted mean of the losses so far."""
    averages = []
    for t in range(1, len(losses) + 1):
        weights = weight * (1 - weight) ** np.arange(t)[::-1]
        if not debias:
            weights[0] /= weight
        averages.append((weights * losses[:t]).sum() / weights.sum())
    return np.array(averages)


@given(losses=LOSSES, smoothing=st.floats(0.01, 1.0), debias=st.booleans())
@example(losses=[5.0, 4.0, 3.0, 2.0, 100.0, 60.0, 3.0], smoothing=1.0, debias=True)  # falls most after its least
def test_the_readings_are_those_of_a_naive_moving_average(losses, smoothing, debias):
    feed = iter(losses)
    found = range_test(
        lambda _: next(feed), steps=len(losses), smoothing=smoothing, debias=debias, stop_factor=math.inf
    )
    expected = naive_average(np.array(losses), smoothing, debias)
    assert found.losses == tuple(losses) and found.learning_rates == tuple(ramp(1e-6, 10.0, len(losses)))
    assert found.smoothed == pytest.approx(expected.tolist(), rel=1e-9)
    warm = math.ceil(1 / smoothing) - 1
    first = warm if warm <= len(losses) - 3 else 0
    least = first + int(np.argmin(found.smoothed[first:]))
    assert found.minimum == found.learning_rates[least] and found.divergence is None and found.read_from == first
    if least >= first + 2:
        reach = min(max(1, round(0.5 / smoothing)), (least - first) // 2)
        slopes = [
            found.smoothed[i + reach] - found.smoothed[i - reach] for i in range(first + reach, least - reach + 1)
        ]
        place = found.learning_rates.index(found.steepest) - first - reach
        assert slopes[place] == pytest.approx(min(slopes), rel=1e-9, abs=1e-12) and found.steepest < found.minimum
    assert RangeTest.from_json(found.to_json()) == found


@given(losses=LOSSES, power=st.integers(-20, 20))
def test_the_unit_of_the_loss_changes_no_reading(losses, power):
    feeds = [iter([unit * loss for loss in losses]) for unit in (1.0, 2.0**power)]
    found = [range_test(lambda _, feed=feed: next(feed), steps=len(losses)) for feed in feeds]
    assert found[0].reason == found[1].reason and found[0].learning_rates == found[1].learning_rates


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([3.0, 1.0, 4.0, 4.5, 1.0], 3),
        ([3.0, 1.0, math.nan, 1.0], 2),
        ([3.0, 1.0, math.inf, 1.0], 2),
        ([1.0, -1.0, 2.0, 2.5, 1.0], 3),
        ([3.0, 1.0, 4.0, 3.9, 4.0], 5),
    ],
)
def test_it_diverges_past_its_factor_of_the_least_or_where_it_is_not_finite(losses, kept):
    """Without smoothing and at a factor of 4: past 4 times a positive least; past 3 sizes above a negative one."""
    feed = iter(losses)
    found = range_test(lambda _: next(feed), low=1e-3, high=1e1, steps=len(losses), smoothing=1.0)
    ended = kept < len(losses)
    assert found.divergence == (ramp(1e-3, 1e1, len(losses))[kept] if ended else None)
    assert len(found.losses) == kept + (ended and math.isfinite(losses[kept]))
    assert found.minimum == found.learning_rates[1]


def test_what_was_read_in_words():
    feed = iter([4.0, 3.9, 3.0, 1.0, 0.9, 99.0])
    found = range_test(lambda _: next(feed), low=1e-3, high=1e2, steps=6, smoothing=1.0)
    assert found.suggestion == pytest.approx(math.sqrt(0.1 * 10), rel=1e-9)
    assert found.reason == "range test: falls fastest at 0.1, least at 10, diverged at 100"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smoothing": 0.0}, r"smoothing must lie in \(0, 1\], got 0.0"),
        ({"smoothing": 1.1}, r"smoothing must lie in \(0, 1\], got 1.1"),
        ({"stop_factor": 1.0}, "stop_factor must be > 1, got 1.0"),
        ({"low": 0.0}, "low and high must satisfy 0 < low < high, got low=0.0, high=10.0"),
        ({"low": 1.0, "high": math.inf}, "low and high must satisfy 0 < low < high, got low=1.0, high=inf"),
        ({"steps": 3}, "steps must be an integer of at least 4, got 3"),
        ({"steps": True}, "steps must be an integer of at least 4, got True"),
    ],
)
def test_a_bad_range_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        range_test(lambda _: 1.0, **changes)


def test_a_loss_that_is_not_finite_at_once_is_refused():
    with pytest.raises(InputError, match="the loss is nan at the first step of the range test, learning rate 1e-06"):
        range_test(lambda _: math.nan)


def test_a_loss_that_only_rises_falls_nowhere():
    found = range_test(lambda rate: 1 + rate, low=1e-3, high=1.0, steps=10)
    assert found.steepest == found.minimum == found.learning_rates[0]


def test_a_linear_ramp_is_even_and_its_steepest_point_is_per_factor_of_the_rate():
    """Loss 2 - ln(rate) falls by the same per factor everywhere; 10 - rate falls fastest per factor at its end."""
    options = {"low": 1.0, "high": 9.0, "steps": 9, "smoothing": 1.0, "spacing": "linear", "stop_factor": math.inf}
    found = range_test(lambda rate: 10 - rate, **options)
    assert found.learning_rates == tuple(float(rate) for rate in range(1, 10))
    assert (found.steepest, found.minimum, found.spacing) == (8.0, 9.0, "linear")
    bent = range_test(lambda rate: -math.log(rate) + 0.3 * (abs(rate - 4) < 0.1), **options)
    assert bent.steepest == 5.0  # from the bump down; per step the fall from 1 to 3 would be the larger one
    with pytest.raises(InputError, match='spacing must be "geometric" or "linear", got \'log\''):
        ramp(1.0, 2.0, 4, "log")


def test_with_validation_the_readings_are_of_that_loss():
    train, valid = iter([5.0, 4.0, 3.0, 2.0, 1.0]), iter([5.0, 1.0, 2.0, 3.0, 9.0])
    options = {"low": 1e-2, "high": 1e2, "steps": 5, "smoothing": 1.0, "stop_factor": 5.0}
    found = range_test(lambda _: next(train), validate=lambda: next(valid), **options)
    assert found.losses == (5.0, 4.0, 3.0, 2.0, 1.0) and found.validation == (5.0, 1.0, 2.0, 3.0, 9.0)
    assert (found.minimum, found.divergence) == (pytest.approx(0.1), 100.0)
    assert RangeTest.from_json(found.to_json()) == found
    with pytest.raises(InputError, match="the loss is nan at the first step of the range test"):
        range_test(lambda _: 1.0, validate=lambda: math.nan, **options)


def test_a_cycle_is_suggested_with_its_reason():
    feed = iter([4.0, 3.0, 1.0, 2.0, 9.0])
    found = range_test(lambda _: next(feed), low=1e-2, high=1e2, steps=5, smoothing=1.0)
    one, several = found.cycle(), found.cycle(3)
    assert (one.max_lr, several.max_lr) == (found.minimum, found.minimum) == (1.0, 1.0) and one.bracketed
    assert one.min_lr == pytest.approx(0.1) and several.min_lr == pytest.approx(0.25)
    assert one.reason == (
        "max: the smoothed training loss turns up after 1; read from training loss alone it is overstated; "
        "min: 1/10 of it, for one cycle"
    )
    assert several.reason.endswith("min: 1/4 of it, for 3 cycles")
    falling_still = range_test(lambda rate: 1 / rate, validate=lambda: 1.0, low=1.0, high=2.0, steps=4)
    assert "the smoothed validation loss" in falling_still.cycle().reason
    open_end = range_test(lambda rate: 1 / rate, low=1.0, high=2.0, steps=4).cycle()
    assert not open_end.bracketed and "still fell at 2, where the ramp ended: test higher rates" in open_end.reason
    rising = range_test(lambda rate: rate, low=1.0, high=2.0, steps=4).cycle()
    assert not rising.bracketed and "only rose from 1, where the ramp began: test lower rates" in rising.reason
    for bad in (0, 1.0, True):
        with pytest.raises(InputError, match="cycles must be an integer of at least 1"):
            found.cycle(bad)
