"""A small MLP with its batches, and the steps of MKOR on it."""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from batchlab.optim.mkor.mkor import MKOR

DOUBLE = torch.float64


def drawn(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def mlp(seed=0, sizes=(5, 7, 3), dtype=DOUBLE):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b, dtype=dtype) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1])


def made(model, lr=0.1, momentum=0.9, **settings):
    settings = {"factor_dtype": DOUBLE} | settings
    return MKOR(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum), **settings)


def batch(step, rows=8, width=5, classes=3):
    return drawn(rows, width, seed=step), torch.arange(rows).add(step).remainder(classes)


def take_step(model, optimizer, step, cut=(8,)):
    """One update of the batch `step` of 8, in micro-batches of the sizes `cut`, whose losses sum to the mean."""
    optimizer.zero_grad()
    x, y = batch(step)
    for part, target in zip(x.split(cut), y.split(cut), strict=True):
        (F.cross_entropy(model(part), target) * len(part) / len(x)).backward()
    optimizer.step()


def run(model, optimizer, steps, start=0, **how):
    for step in range(start, start + steps):
        take_step(model, optimizer, step, **how)
    return [p.detach().clone() for p in model.parameters()]


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])
