"""Sizes fixed beforehand: the ramp as Megatron counts it, doublings, milestones, and the rate beside them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.schedule.batch_doubling import (
    BatchDoubling,
    equivalent_lr,
    falcon2_doubling,
    noise_floor,
    temperature,
)
from batchlab.schedule.batch_ramp import BatchRamp, falcon_mamba_ramp
from batchlab.schedule.controller import StepFacts
from batchlab.schedule.milestones import Milestones


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


def test_the_published_doublings():
    doubling = falcon2_doubling([1, 2, 3, 4], multiple_of=128)
    assert [size for _, size in doubling.changes()] == [2048, 4096, 8192, 16384, 32768]
    assert 32768 * 2048 == 67_108_864  # 67.1 million tokens an update, from 4.2 million
    # four doublings are a cut of the rate by 4 in the report's reading, η/√B, and by 16 for SGD
    for reading, cut in (("adam", 4.0), ("sgd", 16.0)):
        now, then = temperature(1.0, 32768, reading=reading), temperature(1.0, 2048, reading=reading)
        assert then / now == pytest.approx(cut)


def test_milestones_multiply_as_a_rate_would_be_divided():
    assert Milestones.by_factors(128, {60: 5, 120: 5, 160: 5}).changes()[-1] == (160, 16_000)
    assert Milestones.by_factors(96, {10: 0.5, 20: 1.5}, multiple_of=24).changes() == [(0, 96), (10, 48), (20, 72)]


def descend(lr, batch, *, curvature=1.0, sigma=1.0, steps, chains, x=None, seed=0):
    """Mean excess loss λx²/2 over steps and chains of x' = (1 - ηλ)x - ηξσ/√B; and the last x."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(chains, dtype=torch.float64) if x is None else x
    total = 0.0
    for _ in range(steps):
        noise = torch.randn(chains, generator=generator, dtype=torch.float64)
        x = (1 - lr * curvature) * x - lr * sigma * noise / batch**0.5
        total += float(curvature * x.square().mean() / 2)
    return total / steps, x


def test_the_noise_floor_is_what_a_simulation_finds():
    """2e5 updates in 1,000 chains of 200 after 200 to settle: relative standard error about √(2·19/2e5) = 1.4 %."""
    found = {}
    for seed, batch in enumerate((8, 16, 32)):
        _, x = descend(0.1, batch, steps=200, chains=1000, seed=seed)
        found[batch], _ = descend(0.1, batch, steps=200, chains=1000, x=x, seed=seed + 100)
        assert found[batch] == pytest.approx(noise_floor(0.1, batch, curvature=1.0, variance=1.0), rel=0.03)
    assert found[8] / found[16] == pytest.approx(2.0, abs=0.06)
    scaled, _ = descend(0.4, 8, curvature=3.0, sigma=2.0, steps=400, chains=1000, seed=5)
    assert scaled == pytest.approx(noise_floor(0.4, 8, curvature=3.0, variance=4.0), rel=0.03)


def test_a_doubling_drops_the_loss_as_the_equivalent_cut_of_the_rate_does():
    _, x = descend(0.1, 8, steps=200, chains=2000)
    doubled, _ = descend(0.1, 16, steps=200, chains=2000, x=x, seed=1)
    lr = equivalent_lr(0.1, 2, curvature=1.0)
    _, settled = descend(lr, 8, steps=200, chains=2000, seed=2)
    cut, _ = descend(lr, 8, steps=200, chains=2000, x=settled, seed=3)
    assert lr == pytest.approx(0.05128, abs=5e-6)
    assert doubled / noise_floor(0.1, 16, curvature=1.0, variance=1.0) == pytest.approx(1.0, abs=0.05)
    assert cut == pytest.approx(doubled, rel=0.05)


@given(lr=st.floats(1e-4, 1.9), ratio=st.floats(0.2, 50.0), curvature=st.floats(1e-3, 1.0))
def test_the_equivalent_rate_has_the_larger_batchs_floor(lr, ratio, curvature):
    other = equivalent_lr(lr, ratio, curvature=curvature)
    assert 0 < other * curvature < 2
    at = noise_floor(other, 64, curvature=curvature, variance=2.0)
    assert at == pytest.approx(noise_floor(lr, 64 * ratio, curvature=curvature, variance=2.0), rel=1e-6)
    assert equivalent_lr(lr, ratio) == pytest.approx(lr / ratio)


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
        (lambda: BatchDoubling(8, [10, 5]), r"double_at must rise from one to the next, got \[10, 5\]"),
        (lambda: BatchDoubling(8, [0]), "double_at must be an integer of at least 1, got 0"),
        (lambda: BatchDoubling(8, [5], factor=1), "factor must be an integer of at least 2, got 1"),
        (lambda: BatchDoubling(9, [5], multiple_of=8), "sizes must be multiples of multiple_of 8, got 9"),
        (lambda: falcon2_doubling([1, 2]), "double_at must hold four points, got 2"),
        (lambda: Milestones(8, {5: 12}, multiple_of=8), "sizes must be multiples of multiple_of 8, got 12"),
        (lambda: Milestones(8, {5: 0}), "sizes must be an integer of at least 1, got 0"),
        (lambda: Milestones.by_factors(8, {5: 1.3}), "factors must give whole sizes, got 10.4 at 5"),
        (lambda: Milestones.by_factors(8, {5: -1}), "factors must be finite and > 0, got -1"),
        (lambda: noise_floor(2.0, 8, curvature=1.0, variance=1.0), "lr must be below 2/curvature = 2, .* got 2.0"),
        (lambda: equivalent_lr(0.1, 0), "batch_ratio must be finite and > 0, got 0"),
        (lambda: equivalent_lr(0.1, 2, curvature=math.nan), "curvature must be >= 0 and below 2/lr = 20, got nan"),
        (lambda: temperature(0.1, 8, reading="lion"), 'reading must be "adam" or "sgd", got \'lion\''),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
