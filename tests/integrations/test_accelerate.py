"""`GradientNoise` in a loop with the real `accelerate.Accelerator`: no adapter is needed."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from batchlab.measure.noise.gradient_noise import GradientNoise


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
