import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.schedule.batches.controller import StepFacts
from batchlab.schedule.batches.noise_scale_batch import NoiseScaleBatch
from batchlab.schedule.rates.by_examples import lr_factor


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


def _whole_run(size_of, *, rate):
    """S + E/r of a run in which an update at B is ds = 1/(1 + 𝓑(s)/B) of the 10,000 noise-free ones, 𝓑 = 10√s + 1."""
    s = steps = examples = 0.0
    while s < 10_000:
        noise = 10 * math.sqrt(s) + 1
        size = size_of(noise)
        s, steps, examples = s + 1 / (1 + noise / size), steps + 1, examples + size
    return steps + examples / rate


@pytest.mark.parametrize("rate", [200.0, 3000.0])
def test_following_a_growing_noise_costs_little_more_than_the_least(rate):
    """Measured over the exact √(r·𝓑): 0.8 to 1.4 % with a deadband of √2, 0.1 % with 1.1; the best constant 1 %."""
    exact = _whole_run(lambda noise: math.sqrt(rate * noise), rate=rate)
    for deadband, most in ((math.sqrt(2), 1.02), (1.1, 1.002)):
        control = NoiseScaleBatch(32, exchange_rate=rate, maximum=10_000, deadband=deadband)
        followed = _whole_run(lambda noise, c=control: _next(c, _noise(noise)), rate=rate)
        assert exact < followed < most * exact
    constant = min(_whole_run(lambda noise, b=b: b, rate=rate) for b in range(200, 2000, 200))
    assert 1.005 * exact < constant < 1.02 * exact
    rng = random.Random(0)
    for _ in range(8):
        bent = [math.exp(rng.gauss(0, 0.3)) for _ in range(10)]
        found = _whole_run(lambda noise, b=bent: math.sqrt(rate * noise) * b[min(int(noise / 101), 9)], rate=rate)
        assert found > exact
