"""Sizes fixed beforehand: the ramp as Megatron counts it, any schedule in a loop, and the rate beside them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.schedule.batches.batch_doubling import BatchDoubling, temperature
from batchlab.schedule.batches.batch_ramp import BatchRamp, falcon_mamba_ramp
from batchlab.schedule.batches.controller import StepFacts
from batchlab.schedule.batches.milestones import Milestones


@given(turns=st.integers(1, 40), increment=st.integers(1, 64), start=st.integers(1, 100), data=st.data())
def test_the_linear_ramp_is_megatrons(turns, increment, start, data):
    over = data.draw(st.integers(turns, 10**12))
    ramp = BatchRamp(start, start + turns * increment, over=over, increment=increment)
    for seen in data.draw(st.lists(st.integers(0, 2 * over), max_size=20)):
        # its calculator: int(consumed / (ramp / increments)) increments, the end beyond the ramp; here without floats
        steps = turns if seen > over else seen * turns // over
        assert ramp.at(seen) == start + steps * increment


def trained(control, total, per_batch=1):
    """(seen, size) of every update of a run of `total`, as a loop makes it."""
    seen, rows = 0, []
    while seen < total:
        size = control.batch_size
        rows.append((seen, size))
        seen += size * per_batch
        assert control.next_batch(len(rows), StepFacts(seen, size)) == control.at(seen)
    return rows


SCHEDULES = {
    "ramp": lambda: BatchRamp(16, 256, over=20_000, increment=16),
    "rounded": lambda: BatchRamp(16, 256, over=20_000, increment=12, multiple_of=8),
    "slow": lambda: BatchRamp(16, 256, over=20_000, increment=8, multiple_of=8, power=2.0),
    "fast": lambda: BatchRamp(16, 256, over=20_000, increment=8, power=0.5),
    "flat": lambda: BatchRamp(16, 16, over=100),
    "doubling": lambda: BatchDoubling(8, [300, 1000, 20_000]),
    "milestones": lambda: Milestones(64, {500: 256, 2000: 32}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_loop_goes_through_the_function_and_its_changes(name):
    make = SCHEDULES[name]
    rows, control = trained(make(), 40_000), make()
    assert [size for _, size in rows] == [control.at(seen) for seen, _ in rows]
    changes = control.changes()
    assert changes[0] == (0, rows[0][1])
    for point, size in changes[1:]:
        assert control.at(point) == size != control.at(point - 1)
    assert [seen for seen, _ in changes] == sorted(seen for seen, _ in changes)
    for seen in range(0, 40_000, 371):  # between its changes it is constant
        assert control.at(seen) == [size for point, size in changes if point <= seen][-1]
    assert control.updates(40_000) == len(rows) and control.updates(0) == 0 and control.updates(1) == 1
    assert control.updates(40_000, per_batch=3) == len(trained(make(), 40_000, per_batch=3))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.7])
def test_a_ramp_rises_in_multiples_and_ends_at_its_target_at_the_stated_point(power):
    ramp = BatchRamp(64, 1024, over=999_983, increment=48, multiple_of=32, power=power)
    sizes = [ramp.at(seen) for seen in range(0, 1_000_000, 997)]
    assert sizes == sorted(sizes) and all(size % 32 == 0 for size in sizes)
    assert ramp.at(999_982) < 1024 == ramp.at(999_983) == ramp.at(10**15)
    assert ramp.asked(999_982) == 976 and ramp.at(999_982) == 960


def test_power_one_half_is_linear_in_updates():
    """From nothing: with B ∝ √n the k-th update has B ∝ k; within 10 % in the last half of the ramp."""
    ramp = BatchRamp(1, 1001, over=1_000_000, power=0.5)
    rows = [size for seen, size in trained(ramp, 1_000_000)]
    half = len(rows) // 2
    assert all(abs(rows[k] / rows[half] / (k / half) - 1) < 0.1 for k in range(half, len(rows)))


def test_a_skipped_update_is_made_up_for():
    ramp = BatchRamp(16, 64, over=100, increment=16)
    assert ramp.next_batch(1, StepFacts(50, 16, skipped=True)) == 16
    assert ramp.next_batch(2, StepFacts(66, 16)) == 32


def test_rates_go_with_the_batch_by_a_stated_rule():
    for rule, p in (("none", 0.0), ("sqrt", 0.5), ("linear", 1.0)):
        doubling = BatchDoubling(8, [10, 20], lr_rule=rule)
        assert [doubling.lr_factor(size) for size in (8, 16, 32)] == pytest.approx([1.0, 2.0**p, 4.0**p])
        assert doubling.lr_factor() == 1.0
        doubling.next_batch(1, StepFacts(25, 8))
        assert doubling.lr_factor() == pytest.approx(4.0**p)
        ramp = BatchRamp(16, 64, over=100, increment=16, lr_rule=rule)
        assert ramp.lr_factor(64) == 1.0 and ramp.lr_factor(16) == pytest.approx(0.25**p)
    lr = 6.4e-4
    ramp = falcon_mamba_ramp()
    for seen in range(0, 60 * 10**9, 10**9):  # Adam's temperature is constant along the ramp
        size = ramp.at(seen)
        assert temperature(lr * ramp.lr_factor(size), size, reading="adam") == pytest.approx(lr / 2048**0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BatchRamp(64, 32, over=100), "end must be an integer of at least 64, got 32"),
        (lambda: BatchRamp(32, 64, over=0), "over must be an integer of at least 1, got 0"),
        (lambda: BatchRamp(32, 64, over=1e9), "over must be an integer of at least 1, got 1000000000.0"),
        (lambda: BatchRamp(32, 64, over=9, increment=24), "increment must divide end - start = 32, got 24"),
        (lambda: BatchRamp(30, 64, over=9, multiple_of=16, increment=17), "batch_size must be a multiple of"),
        (lambda: BatchRamp(32, 64, over=9, power=0), "power must be finite and > 0, got 0"),
        (lambda: BatchRamp(32, 64, over=9, lr_rule="cube"), 'lr_rule must be "none", "sqrt" or "linear", got'),
        (lambda: BatchRamp(32, 64, over=9).at(-1), "seen must be an integer of at least 0, got -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_other_libraries_integers_do_not_overflow():
    ramp = BatchRamp(np.int32(2), np.int16(200), over=10**10, increment=np.int8(2))
    plain = BatchRamp(2, 200, over=10**10, increment=2)
    assert ramp.changes() == plain.changes() and json.dumps(ramp.changes())
    assert [ramp.at(np.int64(seen)) for seen in (5 * 10**9, 10**10)] == [plain.at(5 * 10**9), 200]
    assert BatchRamp(2, 200, over=np.uint8(100), increment=2).at(np.uint8(50)) == 100
