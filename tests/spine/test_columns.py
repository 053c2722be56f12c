"""Step lines as columns, and thinning that keeps what a reader would look for."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.spine.columns import columns, evenly, number, thin

from .run_folders import step_lines

maybe_finite = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(st.lists(maybe_finite, max_size=400), st.integers(8, 60))
def test_thinning_keeps_first_last_and_extremes_of_what_is_finite(values, limit):
    column = np.array(values, dtype=np.float64)
    places = thin(column, limit)
    finite = np.flatnonzero(np.isfinite(column))
    assert len(places) <= limit
    assert set(places) <= set(finite)
    assert list(places) == sorted(set(places))
    if len(finite):
        kept = column[places]
        assert (places[0], places[-1]) == (finite[0], finite[-1])
        assert (kept.min(), kept.max()) == (column[finite].min(), column[finite].max())


def test_thinning_keeps_a_lone_spike_wherever_it_is():
    for place in (1, 17_777, 99_998):
        column = np.sin(np.arange(100_000.0))
        column[place] = 9.0
        assert place in thin(column)


def test_thinning_leaves_what_is_short_as_it_is():
    assert list(thin(np.array([1.0, 2.0, 3.0]))) == [0, 1, 2]
    assert list(thin(np.array([]))) == []


@given(st.integers(0, 500), st.integers(2, 50))
def test_even_places(count, limit):
    places = evenly(count, limit)
    assert len(places) <= limit and places == sorted(set(places))
    assert set(places) <= set(range(count))
    assert not count or (places[0], places[-1]) == (0, count - 1)


def test_columns_hold_what_the_lines_hold():
    lines = step_lines(25, every=10, skipped=(7,))
    taken = columns(iter(lines), {"loss": 2.35, "accuracy": "nan"})
    assert len(taken) == 25
    np.testing.assert_array_equal(taken.steps["examples"], [96.0 * step for step in range(1, 26)])
    np.testing.assert_allclose(taken.steps["seconds"], 7e-3 * np.arange(1, 26), rtol=1e-12)
    assert np.flatnonzero(np.isnan(taken.steps["loss"])).tolist() == [6]
    assert np.flatnonzero(taken.steps["skipped"]).tolist() == [6]
    assert np.flatnonzero(np.isnan(taken.steps["noise"])).tolist() == [0, 1, 6]
    valid = taken.valid["loss"]
    assert valid["step"].tolist() == [0, 10, 20, 25]
    assert valid["value"][0] == 2.35 and math.isnan(taken.valid["accuracy"]["value"][0])
    assert valid["examples"].tolist() == [0, 960, 1920, 2400]


def test_no_lines_give_empty_columns():
    assert len(columns(())) == 0 and columns(()).valid == {}


@pytest.mark.parametrize("value, meant", [("inf", math.inf), ("-inf", -math.inf), (2, 2.0), ("1.5", 1.5)])
def test_numbers_as_step_lines_hold_them(value, meant):
    assert number(value) == meant


@pytest.mark.parametrize("value", ["nan", None, "what", [1]])
def test_what_is_no_number_is_nan(value):
    assert math.isnan(number(value))
