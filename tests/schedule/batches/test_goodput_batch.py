"""Goodput: AdaptDL's efficiency, the maximum in closed form, and a controller that finds it with few moves."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, MicroBatchTime
from batchlab.measure.speed.step_time_law import fit_step_time
from batchlab.rules.learning_rate import saturating
from batchlab.schedule.batches.controller import StepFacts
from batchlab.schedule.batches.goodput_batch import GoodputBatch, best_batch, goodput, step_time_line


def adaptdl_efficiency(batch, init_batch, sqr, var):
    """Its GoodputFunction.efficiency: gain/scale; var is that of the mean of the first batch."""
    scale = batch / init_batch
    return (var + sqr) / (var / scale + sqr) / scale


@given(batch=st.integers(1, 10**5), init=st.integers(1, 1000), sqr=st.floats(1e-3, 1e3), trace=st.floats(1e-3, 1e6))
def test_efficiency_is_adaptdls_and_the_gain_is_adascales(batch, init, sqr, trace):
    ours = goodput(batch, noise_scale=trace / sqr, fixed=1e-3, per_example=1e-6, base_batch=init)
    theirs = batch / (1e-3 + 1e-6 * batch) * adaptdl_efficiency(batch, init, sqr, trace / init)
    assert ours == pytest.approx(theirs, rel=1e-9)
    gain = adaptdl_efficiency(batch, init, sqr, trace / init) * batch / init
    assert gain == pytest.approx(saturating(1.0, init, batch, noise_scale=trace / sqr), rel=1e-9)


@given(noise=st.floats(1.0, 1e6), fixed=st.floats(1e-4, 10.0), each=st.floats(1e-6, 0.1), base=st.floats(1.0, 1e4))
def test_no_batch_has_more_goodput_than_the_best(noise, fixed, each, base):
    line = {"noise_scale": noise, "fixed": fixed, "per_example": each}
    best = best_batch(**line)
    top = goodput(best, **line, base_batch=base)
    for k in range(-40, 41):
        assert goodput(best * 1.1**k, **line, base_batch=base) <= top * (1 + 1e-12)
    for off in (math.sqrt(2), 1 / math.sqrt(2)):  # what the deadband may cost
        assert goodput(best * off, **line) >= 0.97 * goodput(best, **line)


@given(sizes=st.lists(st.integers(1, 4096), min_size=2, max_size=8, unique=True), seed=st.integers(0, 1000))
def test_the_line_is_that_of_fit_step_time(sizes, seed):
    rng = random.Random(seed)
    times = {size: (0.05 + 0.001 * size) * rng.uniform(0.9, 1.1) for size in sizes}
    law = fit_step_time([MicroBatchTime(size, Estimate(t, t, t, "given")) for size, t in times.items()])
    fixed, each = step_time_line(times)
    assert fixed == pytest.approx(law.fixed.value, rel=1e-6, abs=1e-7)
    assert each == pytest.approx(law.per_example.value, rel=1e-6, abs=1e-10)


def simulate(control, *, noise, fixed=0.05, each=0.001, updates=400, seed=0, jitter=0.05, seconds=None):
    """Sizes along a run on a machine with that line, whose times scatter and are now and then three times as long."""
    rng, sizes = random.Random(seed), [control.batch_size]
    for step in range(1, updates + 1):
        size = control.batch_size
        took = fixed + each * size if seconds is None else seconds(size)
        took *= math.exp(rng.gauss(0, jitter)) * (3 if rng.random() < 0.05 else 1)
        phi = noise(step) if callable(noise) else noise
        estimate = Estimate(phi * math.exp(rng.gauss(0, 0.05)), 0.0, math.inf, "given")
        sizes.append(control.next_batch(step, StepFacts(step, size, noise_scale=estimate, seconds=took)))
    return sizes


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("noise", [5.0, 200.0, 5e4])
def test_it_comes_within_five_percent_of_the_best_goodput(noise, seed):
    """Best sizes 16, 100 and 1581 (the maximum is 1024), from 64."""
    control = GoodputBatch(64, minimum=4, maximum=1024)
    sizes = simulate(control, noise=noise, seed=seed)
    line = {"noise_scale": noise, "fixed": 0.05, "per_example": 0.001}
    best = min(best_batch(**line), 1024)
    assert goodput(sizes[-1], **line) >= 0.95 * goodput(best, **line)
    moves = sum(a != b for a, b in itertools.pairwise(sizes))
    assert moves <= 2 + math.ceil(abs(math.log2(best / 64)))  # one to explore, perhaps one back


def test_exploration_is_one_move_and_then_the_rule():
    control = GoodputBatch(100, maximum=1000, patience=10)
    sizes = simulate(control, noise=200.0, updates=100, jitter=0.0)
    assert sizes[:10] == [100] * 10 and sizes[10] == 200  # the noise scale is above: upwards
    assert set(sizes[20:]) == {100}  # the best is 100
    assert sorted(control.times()) == [100, 200]
    downwards = GoodputBatch(100, maximum=1000, patience=10)
    assert simulate(downwards, noise=50.0, updates=15, jitter=0.0)[-1] == 50
    at_top = GoodputBatch(100, maximum=100, patience=10)
    assert simulate(at_top, noise=200.0, updates=15, jitter=0.0)[-1] == 50


def test_small_growth_explores_on_until_the_sizes_are_apart():
    control = GoodputBatch(100, maximum=1000, patience=10, growth=1.2, deadband=1.1)
    sizes = simulate(control, noise=1e5, updates=60, jitter=0.0)
    assert sorted(set(sizes[:45])) == [100, 120, 144, 172, 206]
    narrow = GoodputBatch(100, minimum=90, maximum=110, patience=10, deadband=1.01)
    sizes = simulate(narrow, noise=1e5, updates=200, jitter=0.0)
    assert {90, 110} <= set(sizes) and sizes[-1] == 110 and len(set(sizes[-100:])) == 1
    no_room_above = GoodputBatch(100, minimum=10, maximum=130, patience=10)
    assert 50 in simulate(no_room_above, noise=1e5, updates=60, jitter=0.0)  # 130 lies within the deadband
    no_room = GoodputBatch(100, minimum=90, maximum=110, patience=10)
    assert set(simulate(no_room, noise=1e5, updates=60)) == {100}
    fixed = GoodputBatch(100, minimum=100, maximum=100)
    assert set(simulate(fixed, noise=1e5, updates=100)) == {100}


def test_a_time_that_does_not_grow_goes_to_the_maximum_and_one_without_a_fixed_part_to_the_minimum():
    flat = GoodputBatch(64, maximum=512)
    assert simulate(flat, noise=200.0, seconds=lambda size: 0.1, jitter=0.0)[-1] == 512
    steep = GoodputBatch(64, minimum=8, maximum=512)
    assert simulate(steep, noise=200.0, seconds=lambda size: 1e-5 * size**1.2, jitter=0.0)[-1] == 8


def test_it_follows_a_noise_scale_that_grows():
    control = GoodputBatch(16, maximum=4096)
    sizes = simulate(control, noise=lambda step: 10.0 * 1.01**step, updates=800, jitter=0.02)
    best = best_batch(10.0 * 1.01**800, fixed=0.05, per_example=0.001)
    assert sizes[-1] == pytest.approx(best, rel=0.5) and max(sizes) < 2 * best


def test_the_first_update_at_another_size_is_not_timed_and_old_times_go():
    control = GoodputBatch(8, maximum=64)
    for step, (size, took) in enumerate([(8, 90.0), *[(8, 1.0)] * 5, (16, 90.0), *[(16, 2.0)] * 5, (8, 90.0)]):
        control.note(step, StepFacts(step, size, seconds=took))
    assert control.times() == {8: 1.0, 16: 2.0} and control.line() == pytest.approx((0.0, 0.125))
    for took in [5.0] * 32:
        control.note(1, StepFacts(1, 8, seconds=took))
    assert control.times()[8] == 5.0
    for size in range(100, 140):
        for _ in range(6):
            control.note(1, StepFacts(1, size, seconds=1.0))
    assert sorted(control.times()) == list(range(124, 140))
    control.forget()
    assert control.times() == {} and all(math.isnan(each) for each in control.line())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GoodputBatch(8, maximum=64, patience=3), "patience must be an integer of at least 6, got 3"),
        (lambda: GoodputBatch(8, maximum=64, explore=1.2), "explore must be above deadband 1.41421, .* got 1.2"),
        (lambda: GoodputBatch(8, maximum=64).load_rule_state({}), r"the state must hold times and before, got \[\]"),
        (lambda: best_batch(8, fixed=0.0, per_example=1.0), "fixed must be finite and > 0, got 0.0"),
        (lambda: goodput(0, noise_scale=8, fixed=1.0, per_example=1.0), "batch must be finite and > 0, got 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("wrong", [{"times": [[1]]}, {"times": [[64, ["x"]]]}, {"before": "x"}, {"times": 3}])
def test_a_state_of_something_else_is_refused_and_changes_nothing(wrong):
    control = GoodputBatch(64, maximum=512)
    before = control.state_dict()
    with pytest.raises(InputError, match="times must be pairs of a size and its seconds, before a size"):
        control.load_state_dict(before | wrong)
    assert control.state_dict() == before


def test_it_explores_where_one_step_rounds_down_to_the_present_size():
    batch = GoodputBatch(64, maximum=1024, patience=7, multiple_of=64, explore=1.5)
    noise = Estimate(1e4, 1e4, 1e4, "given")
    for step in range(200):
        size = batch.batch_size
        batch.next_batch(step, StepFacts(step + 1, size, noise_scale=noise, seconds=0.5 + 0.002 * size))
    assert batch.batch_size == 1024 and min(batch.times()) == 64


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_are_none_are_not_loaded(wrong):
    batch = GoodputBatch(64, maximum=1024)
    with pytest.raises(InputError, match="times"):
        batch.load_state_dict(batch.state_dict() | {"times": [[64, [wrong] * 6]]})
