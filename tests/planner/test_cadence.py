"""How often a run evaluates and saves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.planner.cadence import checkpoint_every, evaluate_every, most_steps


@given(st.floats(1, 1e6), st.floats(1e-5, 100), st.floats(0, 1e4))
def test_resolution_of_the_target_step(steps, step_seconds, evaluation_seconds):
    every = evaluate_every(steps, step_seconds=step_seconds, evaluation_seconds=evaluation_seconds)
    assert 1 <= every <= max(1, steps / 10)
    dear = evaluation_seconds > every * step_seconds
    assert not dear or every + 1 > steps / 10 or every == 1 or every + 1 > evaluation_seconds / step_seconds


@given(st.floats(1, 1e6), st.floats(1e-5, 1e4), st.integers(1, 1000))
def test_checkpoints_follow_evaluations(steps, step_seconds, every):
    save = checkpoint_every(steps, step_seconds=step_seconds, evaluate_every=every)
    assert save % every == 0
    assert save == every or (save <= steps / 5 and save * step_seconds <= 600)


def test_ten_minutes_at_most():
    assert checkpoint_every(10_000, step_seconds=6.0, evaluate_every=10) == 100


def test_most_steps():
    assert most_steps(10.1) == 41


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_bad_numbers(bad):
    with pytest.raises(InputError, match="predicted_steps must be finite and > 0, got "):
        most_steps(bad)
    with pytest.raises(InputError, match="step_seconds must be finite and > 0, got "):
        evaluate_every(10, step_seconds=bad)
