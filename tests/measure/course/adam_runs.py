"""Adam on gradients of a known course, and what the monitor reads of it."""

import math

import torch
from torch import nn

from batchlab.measure.course.adam_stability import AdamStability

N, STEPS = 4000, 3000


def run(gradient_at, *, steps=STEPS, n=N, betas=(0.9, 0.999), eps=1e-8, dtype=torch.float32, **options):
    """Adam on given gradients: the monitor's last reading of the one layer."""
    p = nn.Parameter(torch.zeros(n, dtype=dtype))
    optimizer = torch.optim.Adam([p], lr=0.0, betas=betas, eps=eps, foreach=False)
    readings = []
    with AdamStability(optimizer, on_reading=readings.append, **options) as stability:
        for step in range(steps):
            p.grad = gradient_at(step)
            optimizer.step()
    return readings, stability


def white(seed=0, scale=1.0, n=N):
    generator = torch.Generator().manual_seed(seed)
    return lambda step: scale * torch.randn(n, generator=generator)


def autoregressive(r, n=N):
    generator = torch.Generator().manual_seed(0)
    state = [torch.randn(n, generator=generator)]

    def gradient_at(step):
        state[0] = r * state[0] + math.sqrt(1 - r**2) * torch.randn(n, generator=generator)
        return state[0].clone()

    return gradient_at


def last(readings):
    return readings[-1].layers[0]
