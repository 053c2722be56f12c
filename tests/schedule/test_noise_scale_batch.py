import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.schedule.by_examples import lr_factor
from batchlab.schedule.controller import StepFacts
from batchlab.schedule.noise_scale_batch import NoiseScaleBatch


def _noise(value):
    return Estimate(value, -math.inf, math.inf, "given")


def _next(control, noise):
    return control.next_batch(1, StepFacts(1, control.batch_size, noise_scale=noise))


@given(values=st.lists(st.one_of(st.floats(), st.sampled_from([math.nan, 0.0, -5.0, 1e30, math.inf])), max_size=60))
def test_any_input_keeps_the_bounds_and_the_growth_limit(values):
    control = NoiseScaleBatch(64, exchange_rate=100.0, minimum=8, maximum=512, patience=1)
    before = 64
    for value in values:
        size = _next(control, _noise(value))
        assert 8 <= size <= 512 and (size + 0.5) / before >= 0.5 and (size - 0.5) / before <= 2.0
        if not 0 < value < math.inf:
            assert size == before
        before = size


def test_it_settles_at_the_law():
    control = NoiseScaleBatch(64, exchange_rate=64.0, minimum=1, maximum=10_000, patience=1)
    for _ in range(10):
        size = _next(control, _noise(4096.0))
    assert size == 512  # sqrt(64 * 4096)


def test_the_deadband_and_patience_hold_it_still():
    control = NoiseScaleBatch(64, exchange_rate=64.0, minimum=1, maximum=10_000, patience=5)
    assert {_next(control, _noise(value)) for value in (64 / 1.9, 64 * 1.9) for _ in range(20)} == {64}
    fresh = NoiseScaleBatch(64, exchange_rate=64.0, minimum=1, maximum=10_000, patience=5)
    assert [_next(fresh, _noise(1e6)) for _ in range(10)] == [64] * 4 + [128] * 5 + [256]


def test_state_goes_round():
    control = NoiseScaleBatch(64, exchange_rate=64.0, minimum=1, maximum=10_000, patience=3)
    other = NoiseScaleBatch(64, exchange_rate=64.0, minimum=1, maximum=10_000, patience=3)
    for _ in range(4):
        _next(control, _noise(1e6))
    other.load_state_dict(control.state_dict())
    assert [_next(control, _noise(1e6)) for _ in range(9)] == [_next(other, _noise(1e6)) for _ in range(9)]


def test_bad_bounds_are_refused():
    with pytest.raises(InputError, match="1 <= minimum <= batch_size <= maximum, got 8, 4, 16"):
        NoiseScaleBatch(4, exchange_rate=1.0, minimum=8, maximum=16)


@given(examples=st.floats(0, 2e6), schedule=st.sampled_from(["constant", "linear", "cosine"]))
def test_the_factor_stays_between_nothing_and_the_peak(examples, schedule):
    assert 0 <= lr_factor(examples, total_examples=1e6, warmup_examples=1e4, schedule=schedule) <= 1


def test_the_factor_at_its_corners():
    at = {"total_examples": 1000.0, "warmup_examples": 200.0}
    assert [lr_factor(x, schedule="cosine", **at) for x in (0, 100, 200, 600, 1000)] == pytest.approx(
        [0, 0.5, 1, 0.5, 0], abs=1e-12
    )
    assert [lr_factor(x, schedule="linear", **at) for x in (200, 600, 1000, 1200)] == [1, 0.5, 0, 0]
