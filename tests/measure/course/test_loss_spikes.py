"""Planted spikes are found and nothing else; the running median is numpy's; the state goes round."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.measure.course.loss_spikes import LossSpikes, deviation, median

TOKENS = 1_000_000


def curve(steps, seed, planted=0, noise=0.02):
    """A decaying noisy loss, and the updates at which a spike of 0.3 to 1.5 that decays over 5 to 40 was planted."""
    rng = np.random.default_rng(seed)
    loss = 2 + 3 * np.exp(-np.arange(steps) / (steps / 3)) + noise * rng.standard_normal(steps)
    starts = [200 + (steps - 300) * k // planted for k in range(planted)]
    for start in starts:
        length = int(rng.integers(5, 41))
        loss[start : start + length] += rng.uniform(0.3, 1.5) * np.linspace(1, 0.3, length)
    return loss, starts


def run(monitor, loss, lr=None):
    return [t for t, each in enumerate(loss) if monitor.update(t, each, seen=(t + 1) * TOKENS, lr=lr)]


@pytest.mark.parametrize("seed", range(3))
def test_planted_spikes_are_found(seed):
    loss, starts = curve(20_000, seed, planted=20)
    monitor = LossSpikes()
    found = run(monitor, loss)
    caught = [start for start in starts if start in found]
    assert len(caught) >= 19  # of 20
    assert len(found) - len(caught) <= 2  # at most one false alarm in 10,000
    for spike in monitor.spikes:
        assert not spike.open and spike.finite and 1 <= spike.updates <= 41 and 0.1 < spike.height < 1.7


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_a_doubled_batch_give_no_alarm(seed):
    loss, _ = curve(10_000, seed + 10)
    loss[5000:] -= 0.2  # the noise is removed at a doubling: a step downwards
    assert len(run(LossSpikes(), loss)) <= 1


def test_rates_are_spikes_a_gigatoken_by_octave():
    loss, starts = curve(4000, 0, planted=8)
    monitor = LossSpikes()
    for t, each in enumerate(loss):
        monitor.update(t, each, seen=(t + 1) * TOKENS, batch=64, lr=3e-4 if t < 2000 else 1e-4)
    low, high = monitor.rates()
    assert low.low <= 1e-4 < low.high == 2 * low.low and high.low <= 3e-4 < high.high
    assert low.seen == high.seen == 2000 * TOKENS
    first = sum(spike.lr == 3e-4 for spike in monitor.spikes)
    assert (high.spikes, high.per_giga) == (first, first / 2) and low.spikes == len(monitor.spikes) - first
    assert all(spike.batch == 64 for spike in monitor.spikes) and len(starts) == 8


def test_what_is_not_finite_is_a_spike_and_a_new_level_is_not_for_ever():
    monitor = LossSpikes(fewest=5, restart=10, apart=0)
    assert run(monitor, [1.0, 1.01, 0.99, 1.0, 1.02, math.nan, math.inf, 1.0]) == [5]
    (spike,) = monitor.spikes
    assert (spike.height, spike.updates, spike.finite, spike.open) == (math.inf, 2, False, False)
    for t in range(8, 30):  # a jump that stays, as by another data set
        monitor.update(t, 3.0 + 0.01 * (t % 3), seen=t * 10**7)
    assert len(monitor.spikes) == 2 and not monitor.spikes[-1].open and monitor.spikes[-1].updates == 10
    assert monitor.threshold == pytest.approx(3.01 * 1.02, rel=0.02)
    early = LossSpikes()
    assert early.update(0, math.nan, seen=1) and not early.update(1, 1.0, seen=2)
    typed = LossSpikes()  # numbers of any library
    typed.update(np.int64(3), np.float32(math.nan), seen=np.int64(9), batch=np.int32(4), lr=np.float32(1e-3))
    json.dumps([early.state_dict(), typed.state_dict()])


@given(values=st.lists(st.one_of(st.floats(-5, 5), st.integers(-2, 2).map(float)), min_size=1, max_size=40))
def test_the_median_deviation_is_numpys(values):
    ordered = sorted(values)
    m = median(ordered)
    assert m == pytest.approx(float(np.median(values)), abs=1e-12)
    assert deviation(ordered, m) == pytest.approx(float(np.median(np.abs(np.array(values) - m))), abs=1e-12)


def test_the_window_is_the_last_losses_that_were_no_spikes():
    rng, monitor, kept = random.Random(0), LossSpikes(window=30, fewest=10), []
    for t in range(500):
        loss = 1 + 0.1 * rng.gauss(0, 1) + (3 if t % 60 == 59 else 0)
        before = len(monitor.spikes)
        monitor.update(t, loss, seen=t)
        if len(monitor.spikes) == before:
            kept = [*kept, loss][-30:]
        if len(kept) >= 10:
            m = float(np.median(kept))
            spread = 6 * 1.4826 * float(np.median(np.abs(np.array(kept) - m)))
            assert monitor.threshold == pytest.approx(max(m + spread, m * 1.02), rel=1e-12)
    assert len(monitor.spikes) == 8


def test_a_tail_about_the_threshold_is_one_spike():
    level, tail = [1.0 + 0.001 * (t % 5) for t in range(40)], [3.0, 1.5, 1.001, 1.4, 1.002, 1.3]
    assert run(LossSpikes(), [*level, *tail, *level]) == [40]
    assert run(LossSpikes(apart=0), [*level, *tail, *level]) == [40, 43, 45]
    assert len(run(LossSpikes(), [*level, *tail, *level, 3.0, *level])) == 2


@pytest.mark.parametrize("stop", [10, 203, 1000])
def test_state_goes_round(stop):
    loss, _ = curve(2000, 1, planted=5)
    loss[203] = 9.0
    whole, first = LossSpikes(), LossSpikes()
    run(whole, loss, lr=1e-3)
    run(first, loss[:stop], lr=1e-3)
    state = json.loads(json.dumps(first.state_dict()))
    second = LossSpikes()
    second.load_state_dict(state)
    for t in range(stop, 2000):
        second.update(t, loss[t], seen=(t + 1) * TOKENS, lr=1e-3)
    assert second.spikes == whole.spikes and second.rates() == whole.rates() and second.threshold == whole.threshold


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LossSpikes(window=1), "window must be an integer of at least 2, got 1"),
        (lambda: LossSpikes(window=10), "fewest must be at most window 10, got 20"),
        (lambda: LossSpikes(deviations=0), "deviations must be finite and > 0, got 0"),
        (lambda: LossSpikes(relative=math.nan), "relative must be >= 0, got nan"),
        (lambda: LossSpikes(apart=-1), "apart must be an integer of at least 0, got -1"),
        (lambda: LossSpikes(restart=0), "restart must be an integer of at least 1, got 0"),
        (lambda: LossSpikes().update(0, 1.0, seen=-1), "seen must be an integer of at least 0, got -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_rewind_without_the_checkpoints_state_is_refused():
    monitor = LossSpikes()
    monitor.update(0, 1.0, seen=100)
    with pytest.raises(InputError, match="seen must not fall, got 50 after 100: load the state of the checkpoint"):
        monitor.update(1, 1.0, seen=50)
