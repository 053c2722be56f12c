"""The learning rate of steepest descent, |g|²/gᵀHg, as the authors of the spike law set it (Granziol et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError
from batchlab.measure.hessian.loss_surface import Loss
from batchlab.measure.hessian.sample import Sample


def cauchy_learning_rate(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Any],
    *,
    keep: float,
    count: Callable[[Any], int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> float:
    """|g|²/(gᵀHg), the step along -g that is best for the quadratic there; `keep`, the old rate, where gᵀHg <= 0.

    g and H of the mean loss over `data`, in evaluation mode, without weight decay; arguments as in `curvature`. The
    authors of the spike law set the rate so before each epoch of SGD with momentum 0.9, from 0.003 on, without a guard.

    >>> def loss(model, x):
    ...     return 2 * model(x).square().mean()
    >>> round(cauchy_learning_rate(nn.Linear(1, 1, bias=False), loss, [torch.ones(1, 1)], keep=1.0), 6)
    0.25
    """
    check_positive(keep=keep)
    sample = Sample(model, loss, data, count, group, 0)
    with sample.surface.still():
        g = sample.surface.mean_gradient(sample.pieces)
        bent = float(torch.dot(g, sample.surface.hessian(sample.pieces) @ g))
    square = float(torch.dot(g, g))
    rate = square / bent if bent > 0 else keep
    if not all(map(math.isfinite, (square, bent, rate))):
        raise InputError("the gradient or Hessian at these weights is not finite")
    return rate
