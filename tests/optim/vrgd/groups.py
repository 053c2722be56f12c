"""Gradients of groups of unequal sizes, drawn or a quadratic's, and the multiplier by its definition."""

import math

import numpy as np
import torch

GAMMA = 0.1
SIZES = (3, 5, 4, 7, 1, 2, 6, 4)
SHAPES = ((5, 3), (2, 3, 3), (4,))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_multiplier(gradients, sizes):
    """From the definition, coordinate by coordinate."""
    n = sum(sizes)
    gbar = sum(size * g for size, g in zip(sizes, gradients, strict=True)) / n
    var = sum(size * (g - gbar) ** 2 for size, g in zip(sizes, gradients, strict=True)) / n
    r = gbar**2 / var
    return np.clip(r / r.mean(), GAMMA, 1), gbar


def weights():
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape) for shape in SHAPES]


def group_gradients(ws, t):
    """The mean gradient of each group at a step: a quadratic's, with noise that falls with the group's size."""
    noise = np.random.default_rng(100 + t)
    return [
        [(i + 1) * (w - 0.3) + noise.normal(size=w.shape) / math.sqrt(size) for i, w in enumerate(ws)] for size in SIZES
    ]
