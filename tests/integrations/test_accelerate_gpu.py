"""`GradientNoise` and `AdaptiveBatch` in a loop with the real `accelerate.Accelerator` on a GPU."""

import itertools

import pytest
import torch

from batchlab.integrations.adaptive_batch import AdaptiveBatch
from batchlab.integrations.micro_batches import MicroBatches, micro_batch_loader
from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.schedule.rates.wsd import WSD, wsd_share
from tests.integrations.by_hand import (
    N,
    Net,
    Numbered,
    Table,
    by_hand,
    forget_accelerate,
    numbers,
    sgd,
    stream,
    weights,
)

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.gpu
SIZES = [8, 16, 4, 32, 8, 12]


@pytest.fixture(autouse=True)
def _fresh():
    forget_accelerate()
    yield
    forget_accelerate()


def _on_the_cpu(tensors):
    return [each.cpu() for each in tensors]


def _loop(accelerator, updates, *, dropout=0.0, pin=False, folder=None, save_at=None):
    """The loop of the docs; goes on from the folder where it does not save into it."""
    resumes = folder is not None and save_at is None
    torch.manual_seed(9 if resumes else 0)
    made = accelerate.Accelerator(gradient_accumulation_steps=4, cpu=accelerator.type == "cpu")
    net = Net(dropout=dropout)
    model, optimizer = made.prepare(net, sgd(net))
    sampler, noise = MicroBatches(N, SIZES[0], accumulation=4), GradientNoise(net)
    schedule = WSD(optimizer, batch=SIZES[0], total=400, decay=200)
    adaptive = AdaptiveBatch(Table(SIZES), sampler, noise=noise, schedule=schedule, lr_rule="sqrt")
    made.register_for_checkpointing(adaptive)
    if resumes:
        made.load_state(folder)
    done, counted = [], 0
    for batch in made.prepare(micro_batch_loader(Numbered(), sampler, pin_memory=pin)):
        batch = accelerate.utils.send_to_device(batch, made.device)
        with made.accumulate(model):
            with noise.micro_batch(len(batch["x"])):
                made.backward(model(**batch)["loss"])
            counted += len(batch["x"])
            if made.sync_gradients:
                noise.step()
            optimizer.step()
            optimizer.zero_grad()
        if made.sync_gradients:
            done.append(adaptive.step(examples=counted))
            counted = 0
            if done[-1].step == save_at:
                made.save_state(folder)
            if done[-1].step == updates:
                break
    noise.close()
    assert all(p.device.type == accelerator.type for p in net.parameters())
    return net, done


@pytest.mark.parametrize("pin", [False, True])
def test_the_loop_of_the_docs_is_the_loop_by_hand(accelerator, pin):
    net, done = _loop(accelerator, 6, pin=pin and accelerator.type == "cuda")
    sizes = [update.batch_size for update in done]
    starts = [0, *itertools.accumulate(sizes)][:-1]
    rates = [
        0.1 * (size / 8) ** 0.5 * wsd_share(seen, total=400, decay=200)
        for size, seen in zip(sizes, starts, strict=True)
    ]
    assert sizes == SIZES and numbers(net.met) == stream(sum(sizes))
    expected, noise = by_hand(sizes, rates)
    torch.testing.assert_close(_on_the_cpu(weights(net)), expected, rtol=1e-10, atol=1e-10)
    assert done[-1].noise.value == pytest.approx(noise.value, rel=1e-8)


def test_a_resumed_loop_is_the_uninterrupted_one_with_dropout(accelerator, tmp_path):
    whole, expected = _loop(accelerator, 6, dropout=0.3)
    _loop(accelerator, 3, dropout=0.3, folder=str(tmp_path / "state"), save_at=3)
    again, done = _loop(accelerator, 6, dropout=0.3, folder=str(tmp_path / "state"))
    assert [update.batch_size for update in done] == [update.batch_size for update in expected[3:]]
    assert numbers(again.met) == numbers(whole.met)[sum(SIZES[:3]) :]
    assert done[-1] == expected[-1]
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(whole), strict=True))


def test_in_bf16_the_noise_is_near_float64s(accelerator):
    torch.manual_seed(0)
    x = torch.randn(96, 5)
    y = x.sum(1) + torch.randn(96)
    found = []
    for precision in ("bf16", "no"):
        forget_accelerate()
        made = accelerate.Accelerator(mixed_precision=precision, cpu=accelerator.type == "cpu")
        model = torch.nn.Linear(5, 1)
        torch.nn.init.constant_(model.weight, 0.1)
        torch.nn.init.zeros_(model.bias)
        model = made.prepare(model)
        noise = GradientNoise(model, ema=None)
        for start in range(0, 96, 16):
            for piece in range(start, start + 16, 4):
                with noise.micro_batch(4):
                    inputs, targets = (each[piece : piece + 4].to(made.device) for each in (x, y))
                    made.backward((model(inputs).squeeze(1).float() - targets).square().mean() / 4)
            noise.step()
            model.zero_grad()
        noise.close()
        found.append(noise.estimate().value)
    assert found[0] != found[1] and found[0] == pytest.approx(found[1], rel=0.1)
