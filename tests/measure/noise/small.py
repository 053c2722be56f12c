"""Small models in a measured step, and the pair that the naive computation gives."""

import contextlib

import torch
from torch import nn

from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.measure.noise.noise_pair import unbiased_pair


class Quadratic(nn.Module):
    """L(θ; x) = θ·x with x ~ N(G, Σ): the gradient of an example is x itself, whatever θ."""

    def __init__(self, d):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(d, dtype=torch.float64))

    def forward(self, x):
        return (x @ self.theta).mean()


def small_model(tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
    if tied:
        model[2].weight = model[0].weight
    return model


def small_batch(n=32, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator, dtype=dtype), torch.randn(n, generator=generator, dtype=dtype)


def naive_pair(model, sizes, dtype=torch.float64):
    x, y = small_batch(sum(sizes), dtype)
    gradients = []
    for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
        loss = (model(part_x).squeeze(1) - part_y).square().mean()
        parts = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in parts if g is not None]))
    whole = sum(n * g for n, g in zip(sizes, gradients, strict=True)) / sum(sizes)
    norms = sum(n * (g @ g).item() for n, g in zip(sizes, gradients, strict=True)) / sum(sizes)
    return unbiased_pair(norms, (whole @ whole).item(), sum(sizes) / len(sizes), sum(sizes))


def observed_pair(model, sizes, dtype=torch.float64, forward=None, passed=False):
    noise = GradientNoise(model)
    x, y = small_batch(sum(sizes), dtype)
    for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
        with noise.micro_batch(len(part_x)):
            output = (forward or model)(part_x)
            ((output.squeeze(1) - part_y).square().mean() * len(part_x) / sum(sizes)).backward()
    sq_norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    noise.step(grad_sq_norm=sq_norm if passed else None)
    noise.close()
    assert not any(p._backward_hooks for p in model.parameters())
    return noise.pair


class TwoHeads(nn.Module):
    """A body, and a head that is never used: the largest of the small parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.head = nn.Linear(16, 16).double()

    def forward(self, x):
        return self.body(x)


def two_heads_step(model, noise, seed, *, sizes=(8, 8, 8, 8), scale=1.0, outside=()):
    """A step whose pieces in `outside` are not watched; the gradient is divided by `scale` after it."""
    x, y = small_batch(sum(sizes), torch.float64, seed)
    model.zero_grad()
    for index, (part_x, part_y) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
        with contextlib.nullcontext() if index in outside else noise.micro_batch(len(part_x)):
            loss = (model(part_x).squeeze(1) - part_y).square().mean() * len(part_x) / len(x)
            (loss * scale).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= scale
    return noise.step()
