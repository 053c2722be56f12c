"""Predicted steps with their interval, and the rows made of them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, Reference
from batchlab.planner.frontier_rows import device_grid, frontier, size_grid, size_range
from batchlab.planner.prediction import Prediction
from batchlab.rules import tradeoff
from tests.spine.facts_fixture import exact, hand_facts

UNKNOWN = Estimate(math.nan, -math.inf, math.inf, "no signal")


@given(st.integers(1, 4096))
def test_steps_are_the_law_through_the_reference(size):
    prediction = Prediction.of(hand_facts(s_min=100.0))
    assert prediction.steps(size) == pytest.approx(tradeoff.steps(size, s_min=100.0, b_crit=64.0), rel=1e-12)


@given(st.integers(1, 4096), st.floats(1, 1e3), st.floats(1, 10), st.floats(1, 10))
def test_interval_holds_every_step_count_that_the_noise_interval_allows(size, value, down, up):
    noise = Estimate(value, value / down, value * up, "set by hand")
    prediction = Prediction.of(hand_facts(noise_scale=noise))
    found = prediction.estimate(size)
    assert found.low <= found.value <= found.high
    for b_crit in (noise.low, math.sqrt(noise.low * noise.high), noise.high):
        steps = prediction.base_steps * tradeoff.steps_ratio(size, prediction.base_batch_size, b_crit=b_crit)
        assert found.low <= steps * (1 + 1e-12) and (steps <= found.high * (1 + 1e-12))


def test_the_spacing_of_evaluations_counts_downwards_alone():
    found = _after([300] * 3, noise_scale=exact(64.0), gap=9).estimate(32)
    assert (found.low, found.value, found.high) == pytest.approx((291, 300, 300))


def _after(seeds, gap=0, **changes):
    """The prediction from reference runs that took these steps, at the reference's batch of 32."""
    known = sorted(steps for steps in seeds if steps is not None)
    median = known[len(known) // 2]
    reference = Reference(
        32, 1e-3, median, 1.0, median, ((median - 1 - gap, 1.0), (median, 0.5)), steps_by_seed=tuple(seeds)
    )
    return Prediction.of(hand_facts(reference=reference, **changes))


def test_a_run_with_a_new_seed_falls_into_the_interval_at_its_stated_rate():
    draw = np.random.default_rng(0)
    steps = np.round(np.exp(draw.normal(math.log(1000), 0.2, size=(2000, 6)))).astype(int).tolist()
    found = [(_after(seeds).estimate(32), new) for *seeds, new in steps]
    covered = sum(interval.low <= new <= interval.high for interval, new in found) / len(found)
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / len(found))  # 0.02: an interval of 0.91 would fail
    assert "the spread of 5 seeds" in found[0][0].method


def test_the_two_errors_add_up_as_squares():
    seeds, noise = [90, 100, 110, 100, 100], Estimate(64.0, 32.0, 128.0, "set by hand")
    luck = _after(seeds, noise_scale=exact(64.0)).estimate(128)
    law = _after([100, 100, 100], noise_scale=noise).estimate(128)
    both = _after(seeds, noise_scale=noise).estimate(128)
    for end in ("low", "high"):
        widths = [math.log(getattr(each, end) / each.value) for each in (luck, law, both)]
        assert widths[2] == pytest.approx(math.copysign(math.hypot(*widths[:2]), widths[2]), rel=1e-2)


def test_where_too_few_seeds_tell_a_spread_is_assumed_and_said_to_be():
    one = _after([100], noise_scale=exact(64.0)).estimate(32)
    assert one.high / one.value == pytest.approx(math.exp(1.959964 * 0.15 * math.sqrt(1 + math.pi / 2)))
    assert one.method.endswith("an assumed spread between seeds of 15 %, for too few met the target")
    assert _after([50, 200]).spread == _after([50, None, 200]).spread < _after([100]).spread
    assert _after([100, None, 100, 100]).spread == 1.0 < _after([90, None, 100, 110]).spread


def test_unbounded_noise_still_bounds_the_steps():
    noise = Estimate(64.0, 16.0, math.inf, "set by hand")
    found = _after([300] * 3, noise_scale=noise).estimate(128)
    assert found.low == pytest.approx(300 * 32 / 128)
    assert found.high == pytest.approx(300 * (1 + 16 / 128) / (1 + 16 / 32))


@pytest.mark.parametrize("noise", [UNKNOWN, Estimate(math.inf, 10.0, math.inf, "no signal"), exact(-3.0)])
def test_unknown_noise_is_the_limit_of_much_noise(noise):
    prediction = Prediction.of(hand_facts(noise_scale=noise, true_b_crit=64.0))
    assert not prediction.noise_known and prediction.b_crit == math.inf
    assert prediction.steps(64) == prediction.base_steps / 2


def test_reference_at_another_batch_is_moved_to_the_base():
    reference = Reference(64, 1e-3, 200, 1.0, 200, ((190, 1.0), (200, 0.5)))
    prediction = Prediction.of(hand_facts(reference=reference, s_min=100.0))
    assert prediction.base_steps == pytest.approx(300) and prediction.base_steps_low == pytest.approx(1.5 * 191)


def test_a_target_not_met_gives_a_lower_bound():
    prediction = Prediction.of(hand_facts(reached=False))
    assert not prediction.reached and prediction.base_steps == 300


def test_a_target_met_untrained_is_refused():
    reference = Reference(32, 1e-3, 10, 1.0, 0, ((0, 0.1),))
    with pytest.raises(InputError, match="the target is met before any training: choose a harder target"):
        Prediction.of(hand_facts(reference=reference))


def test_an_update_is_the_least():
    reference = Reference(32, 1e-3, 2, 1.0, 2, ((1, 1.0), (2, 0.5)))
    found = Prediction.of(hand_facts(reference=reference, noise_scale=exact(1e4))).estimate(4096)
    assert (found.low, found.value) == (1.0, 1.0)


def test_rows_are_steps_times_step_time():
    facts = hand_facts()
    prediction = Prediction.of(facts)
    rows = frontier(facts, prediction, batch_sizes=[64, 8], devices=[16, 1, 2])
    assert [(row.devices, row.batch_size) for row in rows] == [(1, 8), (1, 64), (2, 8), (2, 64), (16, 64)]
    for row in rows:
        assert row.time == pytest.approx(
            prediction.steps(row.batch_size) * facts.step_time(row.batch_size, row.devices)
        )
        assert row.cost == pytest.approx(row.devices * row.time) and not row.picked
    with pytest.raises(InputError, match="batch_sizes must hold one of at least 16"):
        frontier(facts, prediction, batch_sizes=[8], devices=[16])


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_size_grid(first, second):
    lowest, highest = sorted((first, second))
    grid = size_grid(lowest, highest)
    assert all(lowest <= size <= highest for size in grid)
    assert all(1 < b / a <= 2 for a, b in itertools.pairwise(grid))
    if highest >= 2 * lowest:
        assert grid and grid[0] / lowest < 2 and highest / grid[-1] < 2


def test_size_range_stays_within_the_data():
    assert size_range(64, 100) == (4, 100)
    assert size_range(0.5, 100) == (1, 8)
    assert size_range(1e6, 100) == (100, 100)
    with pytest.raises(InputError, match="b_crit must be finite and > 0, got inf"):
        size_range(math.inf, 100)


@pytest.mark.parametrize(("devices", "grid"), [(1, [1]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])])
def test_device_grid(devices, grid):
    assert device_grid(devices) == grid


def test_dollars_and_joules_are_those_of_all_devices():
    rows = frontier(hand_facts(), devices=(1, 4), price_per_hour=2.0, watts=300.0)
    for row in rows:
        assert row.dollars == pytest.approx(row.devices * row.time / 3600 * 2.0) and row.joules == row.cost * 300.0
    plain = frontier(hand_facts(), devices=(1, 4))
    assert all(row.dollars is None and row.joules is None for row in plain)
    assert [(r.batch_size, r.devices, r.steps, r.time) for r in plain] == [
        (r.batch_size, r.devices, r.steps, r.time) for r in rows
    ]


def test_the_batch_sizes_worth_predicting_are_the_default():
    facts = hand_facts()
    wanted = size_grid(*size_range(facts.noise_scale.value, facts.train_examples))
    assert [row.batch_size for row in frontier(facts)] == wanted
    assert [row.batch_size for row in frontier(hand_facts(noise_scale=UNKNOWN))] == [facts.base_batch_size]


@pytest.mark.parametrize("given", [{"price_per_hour": 0.0}, {"watts": -1.0}, {"price_per_hour": "2 USD"}])
def test_prices_and_watts_must_be_positive(given):
    with pytest.raises(InputError, match=f"{next(iter(given))} must be finite and > 0"):
        frontier(hand_facts(), **given)


def test_grids_take_whole_numbers_and_numpys():
    assert device_grid(np.int64(6)) == [1, 2, 4, 6] and all(type(count) is int for count in device_grid(np.int64(6)))
    assert size_grid(np.int64(5), np.int32(64)) == size_grid(5, 64)
    for bad in (6.0, 0, "6", True):
        with pytest.raises(InputError, match="devices must be an integer of at least 1, got "):
            device_grid(bad)
    with pytest.raises(InputError, match="highest must be an integer of at least 1, got 64.0"):
        size_grid(5, 64.0)


def test_a_range_without_a_size_of_the_grid_is_its_upper_end():
    """As where the data set is smaller than the critical batch size."""
    assert size_grid(40, 40) == [40] and size_grid(41, 47) == [47]


def test_an_empty_range_has_no_size():
    assert size_grid(10, 5) == []
