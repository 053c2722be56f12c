"""Squared norms of gradients: float32 within 2^18 numbers at least, sums over tensors in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 2**18


def sq_norm(gradient: Tensor, weight: Tensor | None = None) -> Tensor:
    """|g|², or Σw·g², as a scalar on the gradient's device, in float64 for a float64 gradient, else in float32.

    Dense, or sparse where no weight is given.
    In chunks of 2^18 numbers: on a CPU one float32 sum over 10^7 of them loses three digits.
    """
    flat = (gradient.coalesce().values() if gradient.is_sparse else gradient).detach().reshape(-1)
    weights = None if weight is None else weight.reshape(-1)
    if flat.numel() <= CHUNK:
        return _dot(flat, weights)
    chunks = torch.split(flat, CHUNK)
    parts = [None] * len(chunks) if weights is None else torch.split(weights, CHUNK)
    return torch.stack([_dot(chunk, part) for chunk, part in zip(chunks, parts, strict=True)]).sum()


def _dot(flat: Tensor, weights: Tensor | None) -> Tensor:
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()
    return torch.dot(flat, flat if weights is None else flat * weights)


def to_floats(scalars: Sequence[float | Tensor]) -> list[float]:
    """The scalars as numbers: one transfer for each device that holds some."""
    numbers = [0.0 if isinstance(scalar, Tensor) else scalar for scalar in scalars]
    places: dict[torch.device, list[int]] = {}
    for place, scalar in enumerate(scalars):
        if isinstance(scalar, Tensor):
            places.setdefault(scalar.device, []).append(place)
    for found in places.values():
        tensors = [scalar for place in found if isinstance(scalar := scalars[place], Tensor)]
        wide = any(tensor.dtype == torch.float64 for tensor in tensors)
        together = torch.stack([tensor.double() if wide else tensor for tensor in tensors])
        for place, number in zip(found, together.tolist(), strict=True):
            numbers[place] = number
    return numbers


def total(scalars: Sequence[float | Tensor]) -> float:
    """Their exactly rounded sum; 0 for none, NaN where one is not finite.

    >>> total([0.1] * 10)
    1.0
    """
    numbers = to_floats(scalars)
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else math.nan
