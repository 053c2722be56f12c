"""Multigrid's shapes, epochs and rates against the released configurations, and what holds for any other."""

import json
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.data.multigrid.multigrid_batches import MultigridBatches
from batchlab.schedule.grids.multigrid import Multigrid, MultigridLR
from batchlab.schedule.grids.multigrid_cycles import (
    HALF,
    LONG_CYCLES,
    SHORT_CYCLES,
    batch_norm_rule,
    cycle_batches,
    entry_rates,
    mean_batch,
    scale_range,
    stride_range,
)

# What SlowFast's own `get_long_cycle_schedule` and `init_multigrid` gave for its three multigrid configurations.
PUBLISHED = {
    "Kinetics": dict(
        sizes=(32, 224, 224),
        batch=64,
        steps=(0, 94, 154, 196),
        epochs=239,
        ends=[73, 110, 142, 158, 205, 228, 248, 259, 291, 308, 322, 329, 358],
        at=[0, 73, 110, 142, 158, 205, 228, 248, 259, 291, 308, 322, 329, 343],
        short=[141, 231, 294, 358],
    ),
    "Charades": dict(
        sizes=(64, 224, 224),
        batch=16,
        steps=(0, 41, 49),
        epochs=57,
        ends=[31, 47, 60, 67, 73, 76, 79, 80, 86],
        at=[0, 31, 47, 60, 67, 73, 76, 79, 80, 83],
        short=[61, 73, 85],
    ),
    "SSv2": dict(
        sizes=(64, 224, 224),
        batch=16,
        steps=(0, 14, 18),
        epochs=22,
        ends=[11, 16, 21, 24, 27, 28, 30, 30, 33],
        at=[0, 11, 16, 21, 24, 27, 28, 30, 30, 31],
        short=[21, 27, 33],
    ),
}


def published(name, **more):
    case = PUBLISHED[name]
    return Multigrid(case["sizes"], case["batch"], case["steps"], case["epochs"], **more), case


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_released_configurations(name):
    schedule, case = published(name)
    frames = case["sizes"][0]
    shapes = [(frames // 4, 158, 158), (frames // 2, 158, 158), (frames // 2, 224, 224), (frames, 224, 224)]
    stages = len(case["steps"]) - 1
    assert [entry.end for entry in schedule.entries] == case["ends"]
    assert [entry.sizes for entry in schedule.entries] == shapes * stages + shapes[-1:]
    assert [entry.factor for entry in schedule.entries] == [8, 4, 2, 1] * stages + [1]
    rates = entry_rates(schedule.entries, 0.1, halve=True)
    assert [first for first, _ in rates] == case["at"]
    expected = [b * 0.1**k for k in range(stages) for b in (8, 4, 2, 1)]
    expected += [expected[-1], 0.1**stages]
    assert [rate for _, rate in rates] == pytest.approx(expected, rel=1e-12)
    short, _ = published(name, long_cycle=())
    assert [entry.end for entry in short.entries] == case["short"]
    assert {(entry.sizes, entry.factor) for entry in short.entries} == {(case["sizes"], 1)}
    assert short.rate(case["short"][0]) == 0.1 and short.rate(short.length - 1) == pytest.approx(0.1**stages)


def test_the_kinetics_run_in_detail():
    schedule, _ = published("Kinetics", warmup_epochs=34, warmup_rate=0.1)
    assert [mean_batch((32, 224, 224), s, SHORT_CYCLES[3]) for s in [(8, 158, 158), (32, 224, 224)]] == [32 / 3, 7 / 3]
    assert schedule.length == 358 and schedule.at(1000) == schedule.entries[-1]
    assert [(shape.sizes, shape.cycle, batch) for shape, batch in schedule.cycle(150)] == [
        ((32, 112, 112), 0, 256),
        ((32, 158, 158), 1, 128),
        ((32, 224, 224), 2, 64),
    ]
    assert schedule.rate(0) == 0.1 and schedule.rate(17) == pytest.approx((0.1 + 8) / 2) and schedule.rate(34) == 8
    assert schedule.rate(72.9) == 8 and schedule.rate(73) == 4 and schedule.rate(342.9) == pytest.approx(0.01)
    assert schedule.rate(343) == pytest.approx(0.001) == schedule.rate(500)
    rules = [tuple(schedule.batch_norm(epoch, devices=8)) for epoch in (0, 73, 110, 142)]
    assert rules == [("split", 8), ("split", 4), ("split", 2), ("plain", 1)]
    few = Multigrid((8, 16, 16), 4, [0, 10], 12)
    last = few.length - 1
    assert [tuple(few.batch_norm(last, n)) for n in (1, 2, 4)] == [("plain", 1), ("sync", 2), ("sync", 4)]
    assert tuple(few.batch_norm(last, 2, base=64)) == ("sync", 2)
    evaluated = [epoch for epoch in range(358) if schedule.evaluates(epoch)]
    assert evaluated[:6] == [22, 47, 72, 83, 96, 109] and evaluated[-1] == 357
    assert scale_range((256, 320), 158, 224) == (181, 320) and stride_range(2, 16, 32) == (2, 4)


@pytest.mark.parametrize("size", [112, 128, 160, 224])
@pytest.mark.parametrize("frames", [8, 16, 32, 64])
def test_an_update_costs_alike(size, frames):
    schedule = Multigrid((frames, size, size), 8, [0, 94, 154], 200)
    for entry in schedule.entries:
        for shape, batch in schedule.cycle(entry.first):
            assert 0.9 <= batch * math.prod(shape.sizes) / (8 * frames * size * size) <= 1.1


@given(
    size=st.integers(16, 512),
    frames=st.integers(4, 64),
    lengths=st.lists(st.integers(20, 400), min_size=1, max_size=4),
    tail=st.integers(1, 100),
    factor=st.floats(0.5, 3),
    axes=st.sampled_from([2, 3]),
)
def test_all_shapes_of_a_stage_get_equally_many_updates(size, frames, lengths, tail, factor, axes):
    steps = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    sizes = (frames, size, size)[-axes:]
    schedule = Multigrid(sizes, 4, steps, steps[-1] + tail, epoch_factor=factor)
    entries, shapes = schedule.entries, len(LONG_CYCLES[axes])
    assert len(entries) == shapes * len(lengths) + 1
    assert schedule.length == round((steps[-1] + tail) * factor)
    assert [entry.first for entry in entries] == [0] + [entry.end for entry in entries[:-1]]
    means = [mean_batch(sizes, entry.sizes, SHORT_CYCLES[axes]) for entry in entries]
    updates = [(entry.end - entry.first) / mean for entry, mean in zip(entries, means, strict=True)]
    for stage, length in enumerate(lengths):
        of_stage = slice(stage * shapes, (stage + 1) * shapes)
        for found, mean in zip(updates[of_stage], means[of_stage], strict=True):
            assert abs(found - length / lengths[0] * updates[0]) <= (1 + 1 / mean) * (1 + length / lengths[0])


def test_equal_updates_are_exact_before_rounding():
    """With so many epochs that rounding is nothing."""
    schedule = Multigrid((32, 224, 224), 1, [0, 6 * 10**11, 10**12], 12 * 10**11)
    for stage in (0, 1):
        entries = schedule.entries[4 * stage : 4 * stage + 4]
        found = [(e.end - e.first) / mean_batch((32, 224, 224), e.sizes, SHORT_CYCLES[3]) for e in entries]
        assert found == pytest.approx([found[0]] * 4, rel=1e-9)
    whole = sum((e.end - e.first) / mean_batch((32, 224, 224), e.sizes, SHORT_CYCLES[3]) for e in schedule.entries[:-1])
    last = schedule.entries[-1]
    assert (last.end - last.first) / (7 / 3) / whole == pytest.approx(0.2, rel=1e-9)  # as much saved as before


@pytest.mark.parametrize("full", [(32, 224, 224), (8, 32, 32)])
def test_what_a_run_costs(full):
    """In updates, and in points of the shapes: to the plain run's, with 1.5 times its epochs."""
    schedule = Multigrid(full, 64, [0, 94, 154, 196], 239)
    updates = points = 0.0
    for entry in schedule.entries:
        cycle = schedule.cycle(entry.first)
        one = (entry.end - entry.first) / sum(batch for _, batch in cycle)
        updates += one * len(cycle)
        points += one * sum(batch * math.prod(shape.sizes) for shape, batch in cycle)
    assert 0.25 < updates / (239 / 64) < 0.3
    assert 0.25 < points / (239 * math.prod(full)) < 0.3


def test_any_axes_and_factors():
    assert cycle_batches((224, 224), (158, 158), SHORT_CYCLES[2]) == [2, 1, 1]
    schedule = Multigrid((1000,), 16, [0, 10], 12, long_cycle=[(0.5,), (1,)], short_cycle=[(0.5,)])
    assert [(e.sizes, e.factor) for e in schedule.entries] == [((500,), 2), ((1000,), 1), ((1000,), 1)]
    assert [[batch for _, batch in schedule.cycle(e.first)] for e in schedule.entries[:2]] == [[32, 32], [32, 16]]
    wide = Multigrid((8, 32, 64), 4, [0, 10], 12, long_cycle=[(1, 0.5, 0.5), (1, 1, 1)], short_cycle=())
    assert [shape for shape, _ in wide.cycle(0)] == [((8, 16, 32), 0)] and wide.cycle(0)[0][1] == 16
    lone = Multigrid((16, 16), 4, [0, 10], 12, long_cycle=[(1, 1)], short_cycle=())
    assert (
        lone.rate(lone.entries[-1].first) == 1 and lone.rate(lone.length) == 0.1
    )  # the last stage is cut all the same
    with pytest.raises(InputError, match=r"^long_cycle must be given for shapes of 1 axes: it is known for \[2, 3\]$"):
        Multigrid((1000,), 16, [0, 10], 12)


def test_settings_go_round_through_json():
    schedule = Multigrid((16, 64, 64), 8, [0, 10, 20], 25, warmup_epochs=2, short_cycle=[(None, HALF, HALF)])
    again = Multigrid(**json.loads(json.dumps(schedule.settings())))
    assert again.entries == schedule.entries and again.cycle(3) == schedule.cycle(3)


def test_batch_norm_rule():
    assert [tuple(batch_norm_rule(b)) for b in (1, 3, 7, 8, 9, 20, 64)] == [
        ("sync", 8),
        ("sync", 2),
        ("sync", 1),
        ("plain", 1),
        ("split", 1),
        ("split", 2),
        ("split", 8),
    ]


def run(schedule=None, n=256):
    schedule = schedule or Multigrid((16, 16), 8, [0, 4, 6], 8, warmup_epochs=1.5, warmup_rate=0.1)
    batches = MultigridBatches(n, schedule)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.4)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    return schedule, batches, optimizer, MultigridLR(optimizer, schedule, batches)


def test_the_rate_along_a_run():
    schedule, batches, optimizer, lr = run()
    updates = 0
    for epoch in range(schedule.length):
        length = len(batches)
        for place, _ in enumerate(batches):
            expected = schedule.rate(epoch + place / length)
            assert lr.get_last_lr() == pytest.approx([0.1 * expected, 0.4 * expected], rel=1e-15)
            optimizer.step()
            lr.step()
            updates += 1
    assert updates == lr.ends == lr.seen
    with pytest.warns(UserWarning, match="^MultigridLR ended at"):
        lr.step()


def test_the_rate_resumes():
    _, _, optimizer, lr = run()
    for _ in range(30):
        lr.step()
    state = json.loads(json.dumps([lr.state_dict(), optimizer.state_dict()["param_groups"]]))
    _, _, other, again = run()
    again.load_state_dict(state[0])
    assert [group["lr"] for group in other.param_groups] == lr.get_last_lr()
    lr.step(), again.step()
    assert again.get_last_lr() == lr.get_last_lr() and again.seen == 31


@given(steps=st.lists(st.integers(-2, 9), max_size=4), epochs=st.integers(-1, 9))
def test_steps_that_are_no_schedule(steps, epochs):
    good = len(steps) >= 2 and steps[0] == 0 and [*steps, epochs] == sorted({*steps, epochs})
    assume(not good)
    with pytest.raises(InputError, match="^steps must be"):
        Multigrid((16, 16), 8, steps, epochs)


def test_bad_input():
    def made(**other):
        return Multigrid(**(dict(sizes=(8, 32, 32), batch=4, steps=[0, 10], epochs=12) | other))

    with pytest.raises(
        InputError,
        match=r"^steps must begin with 0 and rise to below epochs, with one stage at least, got \[0\] and 12$",
    ):
        made(steps=[0])
    for factor in (0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match=f"^epoch_factor must be finite and > 0, got {factor}$"):
            made(epoch_factor=factor)
    for long_cycle in (None, ()):
        with pytest.raises(InputError, match="^epoch_factor must leave an epoch at least, got 0.01 of 12 epochs$"):
            made(epoch_factor=0.01, long_cycle=long_cycle)
    with pytest.raises(InputError, match=r"^no size must be below smallest 4, got the shape \(2, 16, 16\)$"):
        made(smallest=4)
    with pytest.raises(InputError, match=r"^factors must be one for each of 3 axes, got \(0.5, 0.5\)$"):
        made(long_cycle=[(0.5, 0.5)])
    with pytest.raises(InputError, match="^factors must be finite and > 0, got 0.0$"):
        made(short_cycle=[(None, 0, 1)])
    with pytest.raises(
        InputError, match=r"^shape \(4.0, 64.0, 64.0\) must not be so large that its batch rounds to 0, got 0.5 of"
    ):
        made(short_cycle=[(None, 2, 2)])
    with pytest.raises(InputError, match="^batch must be an integer of at least 1, got 0$"):
        made(batch=0)
    with pytest.raises(InputError, match=r"^factors must not make a size of 0, got \(0.25, 0.707.* of \(1, 1, 1\)$"):
        made(sizes=(1, 1, 1))
    with pytest.raises(InputError, match="^warmup_epochs must be at most the 18 epochs, got 19$"):
        made(warmup_epochs=19)
    with pytest.raises(InputError, match="^epoch must be an integer of at least 0, got -1$"):
        made().at(-1)
    with pytest.raises(InputError, match="^batch must be finite and > 0, got 0.0$"):
        batch_norm_rule(0.0)
    with pytest.raises(InputError, match="^default must be an integer of at least 16, got 8$"):
        stride_range(2, 16, 8)


def test_axes_that_are_none_are_refused_by_name():
    with pytest.raises(InputError, match="sizes must be several integers, one after the other, got 16"):
        Multigrid(16, batch=2, steps=[0, 4], epochs=6)
    with pytest.raises(InputError, match="long_cycle must hold a factor for each axis of each of its shapes, got 0.5"):
        Multigrid((8, 16, 16), batch=2, steps=[0, 4], epochs=6, long_cycle=[0.5])
