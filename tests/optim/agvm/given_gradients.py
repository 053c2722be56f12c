"""Two modules of one vector each, and steps of AGVM whose halves' gradients are given by hand."""

import math

import torch
from torch import nn

from batchlab.optim.agvm.agvm import AGVM

F64 = torch.float64


def pair(dtype=F64, **options):
    """Two modules of one vector each; their halves' gradients are given by hand."""
    a, b = (nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(2))
    return (a, b), AGVM(torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0), **{"start": 0} | options)


def give(agvm, modules, halves):
    """Sets `.grad` of each module in each half, and steps."""
    agvm.zero_grad()
    for name, gradients in zip("AB", halves, strict=True):
        with agvm.half(name):
            for p, g in zip(modules, gradients, strict=True):
                if g is not None:
                    p.grad = (torch.zeros_like(p) if p.grad is None else p.grad) + torch.as_tensor(g, dtype=p.dtype)
    agvm.step()


def halves_of(*phis):
    """Gradients in three dimensions whose halves have these φ."""
    angle = [math.acos(1 - phi) for phi in phis]
    return [[[1.0, 0.0, 0.0] for _ in phis], [[math.cos(x), math.sin(x), 0.0] for x in angle]]
