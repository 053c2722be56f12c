"""Sums along one dimension of a tensor that is spread over ranks: how they are spread themselves."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from batchlab.parallel.shards import is_spread, share


def margin_like(tensor: Tensor, dim: int) -> Tensor:
    """Zeros for a sum of the tensor along `dim`, in float32 at least.

    Spread over the same mesh: cut as the tensor is along the dimensions that are left, alike on the ranks that hold
    parts along `dim`.

    >>> margin_like(torch.ones(4, 3), -1)
    tensor([0., 0., 0., 0.])
    """
    dim = dim % tensor.ndim
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    shape = _without(tensor.shape, dim)
    if not is_spread(tensor):
        return torch.zeros(shape, dtype=dtype, device=tensor.device)
    from torch.distributed.tensor import DTensor

    part = share(tensor).part
    zeros = torch.zeros(_without(part.shape, dim), dtype=dtype, device=part.device)
    placements = [_moved(each, dim, tensor.ndim) for each in cast(Any, tensor).placements]
    stride = torch.empty(shape, device="meta").stride()
    mesh = cast(Any, tensor).device_mesh
    spread: Tensor = DTensor.from_local(zeros, mesh, placements, run_check=False, shape=shape, stride=stride)
    return spread


def _moved(placement: Any, dim: int, ndim: int) -> Any:
    """How a dimension of the mesh cuts what is left of a tensor without `dim`."""
    from torch.distributed.tensor import Replicate

    if placement.is_replicate() or placement.is_partial() or placement.dim % ndim == dim:
        return Replicate()
    cut = placement.dim % ndim
    if cut < dim:
        return placement
    blocks = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(cut - 1, **blocks)


def _without(shape: torch.Size, dim: int) -> torch.Size:
    return torch.Size(shape[:dim] + shape[dim + 1 :])
