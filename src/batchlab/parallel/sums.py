"""Sums over tensors that are spread over ranks (DTensor), many of them with one collective for each mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.parallel.shards import Mesh, is_spread


class Layout(NamedTuple):
    """How a tensor is spread. mesh: None for a plain tensor. dims: of each dimension of the mesh, the tensor's
    dimension that it cuts; None where it does not cut it, so that all ranks along it hold the same. blocks: the blocks
    that it cuts each by itself, more than 1 where another dimension of the mesh, further on, cuts the same first.
    """

    mesh: Mesh | None = None
    dims: tuple[int | None, ...] = ()
    blocks: tuple[int, ...] = ()


PLAIN = Layout()


class Request(Protocol):
    """A sum over this rank's part. over: the tensor's dimensions that were summed; None for all."""

    @property
    def part(self) -> Tensor: ...
    @property
    def over(self) -> tuple[int, ...] | None: ...


def layout_of(tensor: Tensor) -> Layout:
    """How a parameter is spread. Raises nothing: a sum still to be taken over ranks counts as not cut."""
    if not is_spread(tensor):
        return PLAIN
    spread = cast(Any, tensor)
    cut = [None if each.is_replicate() or each.is_partial() else each.dim for each in spread.placements]
    blocks = tuple(getattr(each, "split_factor", 1) for each in spread.placements)
    return Layout(spread.device_mesh, tuple(None if dim is None else dim % tensor.ndim for dim in cut), blocks)


def sums_over(requests: Sequence[Request], layouts: Sequence[Layout]) -> list[Tensor]:
    """The sum over the whole tensor for each request; every rank of a mesh must call with the same ones in order."""
    found = [request.part for request in requests]
    together: dict[Any, list[int]] = {}
    for index, (request, layout) in enumerate(zip(requests, layouts, strict=True)):
        cut = [d for d, dim in enumerate(layout.dims) if dim is not None and _summed(dim, request.over)]
        if cut:
            together.setdefault((layout.mesh, tuple(cut), request.part.dtype), []).append(index)
    for (mesh, cut, _), indices in together.items():
        flat = torch.cat([found[index].reshape(-1) for index in indices])
        for dim in cut:
            dist.all_reduce(flat, group=mesh.get_group(dim))
        pieces = torch.split(flat, [found[index].numel() for index in indices])
        for index, piece in zip(indices, pieces, strict=True):
            found[index] = piece.reshape(found[index].shape)
    return found


def _summed(dim: int, over: tuple[int, ...] | None) -> bool:
    return over is None or dim in over
