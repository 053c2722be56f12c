"""`GradientNoise` and `AdaptiveBatch` in a loop with the real `accelerate.Accelerator`: no adapter is needed."""

import itertools
import os

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from batchlab.core.errors import InputError
from batchlab.integrations.adaptive_batch import AdaptiveBatch
from batchlab.integrations.micro_batches import MicroBatches, micro_batch_loader
from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.schedule.rates.wsd import WSD, wsd_share
from tests.integrations.by_hand import N, Net, Numbered, Table, by_hand, numbers, sgd, stream, weights
from tests.spine.forked import in_ranks


def test_the_loop_of_the_docs():
    torch.manual_seed(0)
    x, y = torch.randn(96, 5), torch.randn(96)
    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    model = nn.Linear(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    noise = GradientNoise(model, ema=None)
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            with noise.micro_batch(len(inputs)):
                accelerator.backward((model(inputs).squeeze(1) - targets).square().mean())
            if accelerator.sync_gradients:
                estimate = noise.step()
                accelerator.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
    noise.close()
    plain = nn.Linear(5, 1)
    plain.load_state_dict(accelerator.unwrap_model(model).state_dict())
    reference = GradientNoise(plain, ema=None)
    for start in range(0, 96, 16):
        plain.zero_grad()
        for piece in range(start, start + 16, 4):
            with reference.micro_batch(4):
                ((plain(x[piece : piece + 4]).squeeze(1) - y[piece : piece + 4]).square().mean() / 4).backward()
        expected = reference.step()
    assert estimate.value == pytest.approx(expected.value, rel=1e-6)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), rel=1e-6)


def _loop(sizes, updates, *, unit=4, folder=None, resume=False):
    """The loop of the docs; saves after 2 updates where a folder is given, and goes on there where it resumes."""
    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    net = Net()
    model, optimizer = accelerator.prepare(net, sgd(net))
    sampler = MicroBatches(N, sizes[0], accumulation=4)
    noise = GradientNoise(net)
    adaptive = AdaptiveBatch(
        Table(sizes, multiple_of=unit),
        sampler,
        noise=noise,
        schedule=WSD(optimizer, batch=sizes[0], total=400, decay=200),
        lr_rule="sqrt",
    )
    accelerator.register_for_checkpointing(adaptive)
    if resume:
        accelerator.load_state(folder)
    done, counted = [], 0
    for piece in accelerator.prepare(micro_batch_loader(Numbered(), sampler)):
        with accelerator.accumulate(model):
            with noise.micro_batch(len(piece["x"])):
                accelerator.backward(model(**piece)["loss"])
            counted += len(piece["x"])
            if accelerator.sync_gradients:
                noise.step()
                accelerator.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            done.append(adaptive.step(examples=counted))
            counted = 0
            if folder is not None and adaptive.updates == 2 and not resume:
                accelerator.save_state(folder)
            if adaptive.updates == updates:
                break
    noise.close()
    return net, done


def _rates(sizes):
    starts = [0, *itertools.accumulate(sizes)][:-1]
    return [0.1 * (size / 8) ** 0.5 * wsd_share(seen, total=400, decay=200) for seen, size in zip(starts, sizes)]


def test_a_batch_that_moves(tmp_path):
    sizes = [8, 16, 4, 32, 8]
    net, done = _loop(sizes, 5, folder=tmp_path / "state")
    assert [update.batch_size for update in done] == sizes and numbers(net.met) == stream(sum(sizes))
    expected, noise = by_hand(sizes, _rates(sizes))
    torch.testing.assert_close(weights(net), expected, rtol=1e-10, atol=1e-10)
    assert done[-1].noise.value == pytest.approx(noise.value, rel=1e-8)
    resumed, rest = _loop(sizes, 5, folder=tmp_path / "state", resume=True)
    assert rest == done[2:]
    assert all(torch.equal(a, b) for a, b in zip(weights(net), weights(resumed), strict=True))


def test_a_prepared_schedule_is_refused():
    accelerator = Accelerator(cpu=True)
    net = Net()
    _, schedule = accelerator.prepare(sgd(net), WSD(sgd(net), batch=8, total=400, decay=200))
    with pytest.raises(InputError, match="got AcceleratedScheduler: .* once for every rank"):
        AdaptiveBatch(Table([8]), MicroBatches(N, 8), schedule=schedule)


def _rank(folder):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    rank = torch.distributed.get_rank()
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    os.environ.update({"ACCELERATE_USE_CPU": "true"} | {name: str(value) for name, value in here.items()})
    net, done = _loop([8, 16, 8, 32, 8], 5, unit=8)
    torch.save({"met": numbers(net.met), "weights": weights(net), "noise": done[-1].noise.value}, folder / f"{rank}.pt")


def test_two_processes_are_one(tmp_path):
    assert in_ranks(2, tmp_path, _rank, tmp_path) == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    sizes, at, order, shares = [8, 16, 8, 32, 8], 0, stream(72), ([], [])
    for size in sizes:
        shares[0].extend(order[at : at + size // 2])
        shares[1].extend(order[at + size // 2 : at + size])
        at += size
    expected, noise = by_hand(sizes, _rates(sizes), pieces=8)
    for rank, share in zip(ranks, shares):
        assert rank["met"] == share
        torch.testing.assert_close(rank["weights"], expected, rtol=1e-10, atol=1e-10)
        assert rank["noise"] == pytest.approx(noise.value, rel=1e-8)
