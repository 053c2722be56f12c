"""Tensors spread over ranks (DTensor): this rank's part of one, and sums over all parts.

A sum of squares over a whole tensor is the sum over the ranks of its mesh of what each holds, a part that r ranks
hold alike counting 1/r on each.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

Mesh = Any  # torch.distributed.device_mesh.DeviceMesh, which takes half a second to load where nothing is spread


class Share(NamedTuple):
    """part: what this rank holds. mesh: the ranks the tensor is spread over, None for a plain tensor.

    holders: how many ranks of the mesh hold this same part.
    """

    part: Tensor
    mesh: Mesh | None
    holders: int


def is_spread(tensor: Tensor) -> bool:
    """Whether it is a DTensor; loads nothing where none can exist."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def share(tensor: Tensor) -> Share:
    """This rank's share. A tensor that is a sum still to be taken over ranks is summed first, on all of them."""
    if not is_spread(tensor):
        return Share(tensor, None, 1)
    from torch.distributed.tensor import Replicate

    spread: Any = tensor
    if any(placement.is_partial() for placement in spread.placements):
        placements = [Replicate() if each.is_partial() else each for each in spread.placements]
        spread = spread.redistribute(placements=placements)
    holders = 1
    for dim, placement in enumerate(spread.placements):
        holders *= spread.device_mesh.size(dim) if placement.is_replicate() else 1
    return Share(spread.to_local(), spread.device_mesh, holders)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its parts, on every rank of its mesh: all of them must call."""
    spread: Any = tensor
    return spread.full_tensor() if is_spread(tensor) else tensor


def part_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The part of `tensor` that belongs to what this rank holds of `other`, which may be spread in another way.

    Where the two are not spread alike, every rank of the tensor's mesh must call.
    """
    spread, like = cast(Any, tensor), cast(Any, other)
    if not is_spread(tensor):
        return tensor
    if not is_spread(other):
        return whole(tensor)
    if spread.device_mesh == like.device_mesh and spread.placements == like.placements:
        return share(tensor).part
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [Replicate() if each.is_partial() else each for each in like.placements]
    return distribute_tensor(whole(tensor), like.device_mesh, placements, src_data_rank=None).to_local()


def over_meshes(sums: Mapping[Mesh | None, Sequence[float]]) -> list[float]:
    """Σ over ranks of each mesh's numbers, and over meshes, place by place; those of None are this rank's alone.

    Every rank of a mesh must call with the same meshes in the same order.
    """
    totals = [0.0] * max(map(len, sums.values()), default=0)
    for mesh, numbers in sums.items():
        for place, number in enumerate(numbers if mesh is None else _over(mesh, numbers)):
            totals[place] += number
    return totals


def _over(mesh: Mesh, numbers: Sequence[float]) -> list[float]:
    tensor = torch.tensor(list(numbers), dtype=torch.float64, device=mesh.device_type)
    for group in mesh.get_all_groups():
        dist.all_reduce(tensor, group=group)
    return list(tensor.tolist())
