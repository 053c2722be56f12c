"""Squared norms of gradients: float32 within 2^16 numbers at least, sums over tensors in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 2**16
DEVICE_CHUNK = 2**24


def sq_norm(gradient: Tensor, weight: Tensor | None = None) -> Tensor:
    """|g|², or Σw·g², as a scalar on the gradient's device, in float64 for a float64 gradient, else in float32.

    Dense, or sparse where no weight is given.
    In chunks of 2^16 numbers: on a CPU one float32 sum over 10^7 of them loses three digits. CUDA's sums are trees.
    """
    gradient = gradient.detach()
    if weight is not None:
        return _weighted(gradient.reshape(-1), weight.reshape(-1))
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    dtype = wide(gradient)
    if gradient.numel() <= CHUNK or gradient.is_cuda:
        return _norm(gradient, dtype).square()
    whole = flat(gradient)
    if gradient.is_cpu and gradient.dtype == dtype:
        return torch.stack([torch.dot(part, part) for part in torch.split(whole, CHUNK)]).sum()
    even = len(whole) - len(whole) % CHUNK
    rows = _norm(whole[:even].view(-1, CHUNK), dtype, dim=1)
    return torch.dot(rows, rows) + _norm(whole[even:], dtype).square()


def dense_sq_norm(numbers: Tensor) -> float:
    """|g|² of a flat float32 or float64 tensor on a CPU, as a number, by the quickest way there is."""
    if len(numbers) <= CHUNK:
        return torch.dot(numbers, numbers).item()
    return sum([torch.dot(part, part).item() for part in torch.split(numbers, CHUNK)])


def sq_norm_of_sum(a: Tensor, b: Tensor) -> float | Tensor:
    """|a + b|² of two dense tensors of one shape, never holding more than a part of a + b.

    A number on a CPU, a scalar elsewhere.
    """
    a, b = a.detach(), b.detach()
    a, b = (flat(a), flat(b)) if a.stride() == b.stride() else (a.reshape(-1), b.reshape(-1))
    size = CHUNK if a.is_cpu else DEVICE_CHUNK
    parts = zip(torch.split(a, size), torch.split(b, size), strict=True)
    squares = [sq_norm(x + y) for x, y in parts]
    return total(squares) if a.is_cpu else torch.stack(squares).sum()


def _norm(tensor: Tensor, dtype: torch.dtype, dim: int | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim, dtype=dtype)
    return norm


def _weighted(flat: Tensor, weights: Tensor) -> Tensor:
    size = CHUNK if flat.is_cpu else DEVICE_CHUNK
    dtype, parts = wide(flat), zip(torch.split(flat, size), torch.split(weights, size), strict=True)
    dots = [torch.dot(part.to(dtype), (part * weight).to(dtype)) for part, weight in parts]
    return torch.stack(dots).sum()


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype of a sum of its squares."""
    return tensor.dtype if tensor.dtype in (torch.float32, torch.float64) else torch.float32


def flat(tensor: Tensor) -> Tensor:
    """All its numbers, in any order: a transposed matrix need not be copied."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    swapped = tensor.mT if tensor.ndim > 1 else tensor
    return (swapped if swapped.is_contiguous() else tensor).reshape(-1)


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
