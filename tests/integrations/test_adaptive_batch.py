"""`AdaptiveBatch` and `MicroBatches` in a plain loop, against the loop by hand."""

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from batchlab.core.errors import InputError
from batchlab.data.stream_batches import StreamBatches
from batchlab.integrations.adaptive_batch import AdaptiveBatch, HeldRate
from batchlab.integrations.micro_batches import MicroBatches, examples_in, loader_like, micro_batch_loader
from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.rules.learning_rate import rescale
from batchlab.schedule.batches.goodput_batch import GoodputBatch
from batchlab.schedule.batches.milestones import Milestones
from batchlab.schedule.batches.noise_scale_batch import NoiseScaleBatch
from batchlab.schedule.batches.norm_test_batch import NormTestBatch
from batchlab.schedule.rates.power import Power
from batchlab.schedule.rates.wsd import WSD, wsd_share
from tests.integrations.by_hand import N, Net, Numbered, Table, by_hand, numbers, sgd, stream, weights

SIZES = [8, 16, 4, 4, 32, 8, 12, 12]


def _loop(controller, updates, *, accumulation=4, workers=0, state=None, **rates):
    """A plain loop over micro-batches: the net, what moves its batch, every update, and the state after them."""
    net = Net()
    optimizer = sgd(net)
    sampler = MicroBatches(N, controller.batch_size, accumulation=accumulation)
    schedule = WSD(optimizer, batch=controller.batch_size, total=400, decay=200)
    noise = GradientNoise(net)
    adaptive = AdaptiveBatch(controller, sampler, noise=noise, schedule=schedule, **rates)
    if state is not None:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        adaptive.load_state_dict(json.loads(json.dumps(state["adaptive"])))
    loader = micro_batch_loader(Numbered(), sampler, num_workers=workers)
    done, micro = [], iter(loader)
    while len(done) < updates:
        pieces = [next(micro) for _ in range(accumulation)]
        for piece in pieces:
            with noise.micro_batch(len(piece["x"])):
                (net(**piece)["loss"] / accumulation).backward()
        noise.step()
        optimizer.step()
        optimizer.zero_grad()
        done.append(adaptive.step(examples=sum(len(piece["x"]) for piece in pieces)))
    noise.close()
    saved = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "adaptive": adaptive.state_dict()}
    return net, adaptive, done, copy.deepcopy(saved)


def _rates(sizes, factor, lr=0.1):
    starts = [0, *itertools.accumulate(sizes)][:-1]
    return [lr * factor(size) * wsd_share(seen, total=400, decay=200) for seen, size in zip(starts, sizes, strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_the_loop_by_hand_at_the_sizes_that_came(workers):
    net, adaptive, done, _ = _loop(Table(SIZES), 8, workers=workers, lr_rule="sqrt")
    sizes = [update.batch_size for update in done]
    late = 0 if workers == 0 else 1  # 2 workers fetch 4 micro-batches ahead, an update's worth here
    assert {update.ahead for update in done} == {late}
    assert sizes == ([SIZES[0]] * late + SIZES)[:8]
    assert [update.wanted for update in done[:7]] == SIZES[1:8]
    assert numbers(net.met) == stream(sum(sizes)) and adaptive.seen == sum(sizes)
    rates = _rates(sizes, lambda size: (size / 8) ** 0.5)
    assert [update.learning_rate for update in done] == pytest.approx(rates, rel=1e-12)
    expected, noise = by_hand(sizes, rates)
    torch.testing.assert_close(weights(net), expected, rtol=1e-10, atol=1e-10)
    assert done[-1].noise.value == pytest.approx(noise.value, rel=1e-8)
    assert done[-1].log().keys() == {"batch_size", "examples", "learning_rate", "noise_scale"}


@pytest.mark.parametrize("stop, workers", [(1, 0), (3, 0), (4, 0), (4, 2)])
def test_a_resumed_run_is_the_uninterrupted_one(stop, workers):
    def control():
        return NoiseScaleBatch(8, exchange_rate=8.0, maximum=64, multiple_of=4, patience=2, deadband=1.0)

    whole, adaptive, every, _ = _loop(control(), 7, workers=workers, lr_rule="linear")
    _, _, first, state = _loop(control(), stop, workers=workers, lr_rule="linear")
    resumed, again, rest, _ = _loop(control(), 7 - stop, workers=workers, lr_rule="linear", state=state)
    assert len({update.batch_size for update in every}) > 1
    assert [*first, *rest] == every
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert again.state_dict() == adaptive.state_dict()


def test_it_resumes_on_another_world_and_accumulation():
    _, adaptive, _, _ = _loop(Table([8, 16]), 3)
    other = MicroBatches(N, 8, accumulation=2, rank=1, world_size=2)
    moved = AdaptiveBatch(Table([8, 16]), other)
    moved.load_state_dict(adaptive.state_dict())
    assert (moved.updates, moved.seen, other.batch_size) == (3, 40, 16)
    pieces = iter(other)
    assert [*next(pieces), *next(pieces)] == stream(56)[48:]


def test_a_smaller_maximum_holds_at_once_where_a_run_is_resumed_and_for_the_rate_too():
    _, _, _, state = _loop(Table([8, 32]), 2, lr_rule="linear")
    with pytest.warns(UserWarning, match="going on with 16"):
        _, _, done, _ = _loop(Table([8, 16, 16, 16]), 2, lr_rule="linear", state=state)
    assert [update.batch_size for update in done] == [16, 16]
    assert [update.learning_rate for update in done] == pytest.approx([0.2, 0.2], rel=1e-12)


def test_a_ragged_epoch_counts_what_it_has():
    sampler = StreamBatches(10, 4)
    adaptive = AdaptiveBatch(Milestones(4, {10: 8}), sampler, schedule=HeldRate(sgd(Net()), batch=4), lr_rule="linear")
    sizes = []
    for _ in range(2):
        for batch in sampler:
            update = adaptive.step(examples=len(batch))
            sizes.append((update.batch_size, update.learning_rate))
    assert sizes == [(4, 0.1), (4, 0.1), (2, 0.05), (8, 0.2), (2, 0.05)]


def test_skipped_and_non_finite_updates_move_the_stream_and_not_the_size():
    sampler = MicroBatches(N, 8, accumulation=1)
    schedule = HeldRate(sgd(Net()), batch=8)
    adaptive = AdaptiveBatch(Table([8, 16, 32]), sampler, schedule=schedule)
    batches = iter(sampler)
    next(batches)
    assert adaptive.step(skipped=True).next_size == 8
    next(batches)
    assert adaptive.step(loss=float("nan")).next_size == 8
    next(batches)
    assert adaptive.step(loss=1.0).next_size == 32 and adaptive.seen == schedule.seen == 24


def test_power_counts_tokens_and_moves_by_itself():
    optimizer = sgd(Net(), lr=0.02)
    power = Power(optimizer, batch=8, tokens_per_sequence=10)
    sampler = MicroBatches(N, 8, accumulation=1)
    adaptive = AdaptiveBatch(Table([8, 16]), sampler, schedule=power)
    batches = iter(sampler)
    for _ in range(3):
        next(batches)
        adaptive.step()
    assert power.seen == 10 * (8 + 16 + 16)
    alone = Power(sgd(Net(), lr=0.02), batch=16, tokens_per_sequence=10)
    assert power.get_last_lr() == [alone.rate(400, 0.02)]


def test_the_rate_by_a_function_and_by_the_controller():
    def first_rates(**rates):
        optimizer = sgd(Net())
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.5})
        controller = rates.pop("controller", None) or Table([8, 16])
        sampler = MicroBatches(N, controller.batch_size, accumulation=1)
        schedule = HeldRate(optimizer, batch=controller.batch_size)
        adaptive = AdaptiveBatch(controller, sampler, schedule=schedule, **rates)
        next(iter(sampler))
        before = schedule.get_last_lr()
        adaptive.step()
        return before, [group["lr"] for group in optimizer.param_groups]

    surge = rescale(1.0, 4, 16, rule="surge", noise_scale=32.0)
    before, after = first_rates(lr_rule=lambda size: rescale(1.0, 4, size, rule="surge", noise_scale=32.0))
    assert after == pytest.approx([0.1 * surge, 0.5 * surge]) and before[0] > 0.1
    assert first_rates(lr_rule="linear", lr_batch=4) == ([0.2, 1.0], [0.4, 2.0])
    own = Milestones(8, {8: 32}, lr_rule="sqrt")
    assert first_rates(controller=own) == ([0.1, 0.5], [0.2, 1.0])


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    accumulation=st.integers(1, 4),
    world=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_micro_batches_cut_the_stream_and_nothing_else(sizes, accumulation, world, seed):
    """Over ranks and micro-batches, an update is the stream's next examples in equal parts."""
    unit = accumulation * world
    ranks = [
        MicroBatches(N, sizes[0] * unit, seed, accumulation=accumulation, rank=rank, world_size=world)
        for rank in range(world)
    ]
    iterators = [iter(sampler) for sampler in ranks]
    position, order = 0, stream(6 * 12 * 6, seed)
    for size in sizes:
        for sampler in ranks:
            sampler.batch_size = size * unit
        pieces = [[next(each) for _ in range(accumulation)] for each in iterators]
        assert {len(piece) for rank in pieces for piece in rank} == {size}
        assert [number for rank in pieces for piece in rank for number in piece] == order[position:][: size * unit]
        position += size * unit
    assert {sampler.position() for sampler in ranks} == {position}


def test_a_size_holds_from_the_next_update_never_within_one():
    sampler = MicroBatches(N, 8, accumulation=4)
    pieces = iter(sampler)
    next(pieces)
    sampler.batch_size = 16
    assert [len(next(pieces)) for _ in range(7)] == [2, 2, 2, 4, 4, 4, 4]


def test_loaders_draw_nothing_from_the_global_generator():
    sampler = MicroBatches(N, 8, accumulation=2)
    before = torch.get_rng_state()
    loader = micro_batch_loader(Numbered(), sampler, num_workers=1, prefetch_factor=3)
    next(iter(loader))
    assert torch.equal(before, torch.get_rng_state())
    like = loader_like(DataLoader(Numbered(), batch_size=3, num_workers=1, collate_fn=list), sampler)
    assert (like.num_workers, like.collate_fn, like.batch_sampler) == (1, list, sampler)


@dataclasses.dataclass
class _Batch:
    name: str
    x: torch.Tensor


def test_examples_are_counted_by_the_first_tensor():
    assert examples_in([torch.tensor(1.0), {"a": "x", "b": (None, torch.zeros(3, 2))}, torch.zeros(5)]) == 3
    assert examples_in(_Batch("name", torch.zeros(3, 2))) == 3
    with pytest.raises(InputError, match="no tensor in a batch of type dict to count examples by"):
        examples_in({"text": ["a", "b"]})


class _Endless(IterableDataset):
    def __iter__(self):
        yield from itertools.count()


def test_bad_loaders():
    sampler = MicroBatches(N, 8)
    with pytest.raises(InputError, match="map-style dataset"):
        micro_batch_loader(_Endless(), sampler)
    with pytest.raises(InputError, match="in_order must be True"):
        micro_batch_loader(Numbered(), sampler, in_order=False)
    with pytest.raises(InputError, match="accumulation"):
        MicroBatches(N, 8, accumulation=0)


def _held(optimizer=None, batch=8):
    return HeldRate(sgd(Net()) if optimizer is None else optimizer, batch=batch)


def _lambda():
    return torch.optim.lr_scheduler.LambdaLR(sgd(Net()), lambda step: 1.0)


@pytest.mark.parametrize(
    "controller, sampler, options, message",
    [
        (Table([8]), object, {}, "sampler must be a StreamBatches"),
        (object(), lambda: MicroBatches(N, 8), {}, "controller must be a BatchController"),
        (Table([8]), lambda: StreamBatches(N, 8, drop_last=True), {}, "must not have drop_last"),
        (Table([8, 104]), lambda: MicroBatches(N, 8), {}, "maximum must be at most the 100 examples, got 104"),
        (Table([8]), lambda: MicroBatches(N, 4), {}, "must start at one size, got 4 and 8"),
        (
            Table([8], multiple_of=4),
            lambda: MicroBatches(N, 8, accumulation=4, rank=0, world_size=2),
            {},
            "multiple of accumulation 4 x ranks 2 = 8, so that micro-batches are equal, got 4",
        ),
        (
            Table([8, 32]),
            lambda: MicroBatches(N, 8, accumulation=4),
            {"max_micro_batch": 7},
            "accumulation 4 x max_micro_batch 7 x ranks 1 = 28, got 32: raise the accumulation",
        ),
        (Table([8], needs=["noise_scale"]), lambda: MicroBatches(N, 8), {}, "Table reads the noise scale: give noise"),
        (
            Table([8], needs=["noise_scale"]),
            lambda: MicroBatches(N, 8),
            {"noise": GradientNoise(Net())},
            "needs two micro-batches an update, got accumulation 1 on one rank",
        ),
        (Table([8]), lambda: MicroBatches(N, 8), {"lr_rule": "sqrt"}, "needs schedule: HeldRate"),
        (Table([8]), lambda: MicroBatches(N, 8), {"lr_rule": "cube", "schedule": _held()}, 'lr_rule must be "none"'),
        (Table([8]), lambda: MicroBatches(N, 8), {"schedule": _lambda()}, "be a Counted, got LambdaLR: by updates"),
        (Table([8]), lambda: MicroBatches(N, 8), {"schedule": _held(batch=4)}, "made with batch=8, .* got 4 after 0"),
        (
            Milestones(8, {8: 16}, lr_rule="sqrt"),
            lambda: MicroBatches(N, 8),
            {"schedule": _held(), "lr_rule": "linear"},
            "lr_rule must be None where the controller has its own, 'sqrt'",
        ),
        (
            Table([8]),
            lambda: MicroBatches(N, 8),
            {"schedule": Power(sgd(Net()), batch=8, tokens_per_sequence=10), "lr_rule": "sqrt"},
            "lr_rule must be none with a Power",
        ),
    ],
)
def test_bad_set_ups(controller, sampler, options, message):
    with pytest.raises(InputError, match=message):
        AdaptiveBatch(controller, sampler(), **options)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rule_that_gives_no_rate_is_refused(factor):
    with pytest.raises(InputError, match="lr_rule must be"):
        AdaptiveBatch(Table([8]), MicroBatches(N, 8), schedule=_held(), lr_rule=lambda size: factor)


def test_bad_steps_and_states():
    sampler = MicroBatches(N, 8, accumulation=2)
    adaptive = AdaptiveBatch(Table([8]), sampler)
    with pytest.raises(InputError, match="step must follow a batch: 1 updates of 0 batches"):
        adaptive.step()
    next(iter(sampler))
    with pytest.raises(InputError, match="the 8 that the sampler gave rank 0 for the update, got 4"):
        adaptive.step(examples=4)
    with pytest.raises(InputError, match="must be of an AdaptiveBatch: it lacks"):
        adaptive.load_state_dict({"updates": 1})
    for controller, name in ((NormTestBatch(8, maximum=16), "batch_test"), (GoodputBatch(8, maximum=16), "seconds")):
        sampler = StreamBatches(N, 8)
        adaptive = AdaptiveBatch(controller, sampler, noise=GradientNoise(Net()))
        next(iter(sampler))
        with pytest.raises(InputError, match=f"reads {name}"):
            adaptive.step()


def test_a_noise_that_is_followed_and_never_measured_is_refused():
    """Its estimate would be undefined for ever, and the batch would never move."""
    sampler = MicroBatches(N, 8, accumulation=2)
    noise = GradientNoise(Net())
    controller = NoiseScaleBatch(8, exchange_rate=8.0, maximum=16, multiple_of=2)
    adaptive = AdaptiveBatch(controller, sampler, noise=noise)
    pieces = iter(sampler)
    next(pieces)
    adaptive.step(skipped=True)  # nothing need be measured of an update that was not made
    for _ in range(2):
        next(pieces)
    with pytest.raises(InputError, match=r"NoiseScaleBatch reads the noise scale: call noise.step\(\) before"):
        adaptive.step()
    noise.skip()
    adaptive.step()


def test_ranks_need_a_sampler_whose_batches_are_all_full():
    """Else some size, which measurements decide, would be refused in mid-run."""
    with pytest.raises(InputError, match="sampler must be endless with 2 ranks"):
        AdaptiveBatch(Milestones(4, {50: 6}, multiple_of=2), StreamBatches(103, 4, rank=0, world_size=2))
    endless = StreamBatches(103, 4, endless=True, rank=0, world_size=2)
    with pytest.raises(InputError, match="the controller's minimum must be at least the 2 ranks, got 1"):
        AdaptiveBatch(GoodputBatch(4, maximum=8), endless, noise=GradientNoise(Net()))
    adaptive = AdaptiveBatch(Milestones(4, {50: 6}, multiple_of=2), endless)
    for _ in itertools.islice(endless, 20):
        adaptive.step()
    assert adaptive.sampler.batch_size == adaptive.controller.batch_size == 6


def test_a_micro_batch_is_never_empty():
    with pytest.raises(InputError, match="batch_size must be at least accumulation 4 x world_size 1"):
        MicroBatches(100, 2, accumulation=4)
    batches = MicroBatches(100, 8, accumulation=4)
    with pytest.raises(InputError, match="an example for each micro-batch, got 3"):
        batches.batch_size = 3
