"""What DiLoCo's replicas exchange: means in flat tensors, broadcasts, and the checks before either.

A process group joins the ranks that hold the same weights in different replicas. Where a replica is itself sharded
there is one such group for each shard, and the ranks of a replica agree over their mesh.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.core.errors import InputError
from batchlab.optim.diloco.outer import part_of, wide
from batchlab.parallel.agree import agree_min
from batchlab.parallel.shards import over_meshes, share


class Replicas:
    """The ranks of `group`, or this process alone (None). size: M. rank: this one's place in it."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise InputError(
                "process_group must be a torch.distributed.ProcessGroup that this rank is in, or None; of a mesh "
                f'give mesh["replica"].get_group(), got {group!r}'
            )
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def largest(self, number: int) -> int:
        """The largest of the replicas' numbers."""
        return number if self.size == 1 else int(-agree_min([-number], self.group)[0])

    def newest(self, rounds: int) -> int:
        """The first rank of those with the most rounds."""
        first = self.largest(rounds * self.size + self.size - 1 - self.rank)
        return self.size - 1 - first % self.size

    def check_alike(self, **numbers: float) -> None:
        """Refuses replicas that differ in what must be the same, before a collective can hang on it."""
        if self.size == 1:
            return
        mine = list(numbers.values())
        least = agree_min([*mine, *(-number for number in mine)], self.group)
        for name, low, minus_high in zip(numbers, least, least[len(mine) :], strict=False):
            if low != -minus_high:
                raise InputError(f"{name} must be the same on every replica, got {low:g} to {-minus_high:g}")

    def check_apart(self, parameters: Iterable[Tensor]) -> None:
        """Refuses a group of ranks that share the shards of one weight: they are one replica."""
        ranks = set() if self.group is None else set(dist.get_process_group_ranks(self.group))
        for p in parameters:
            mesh = share(p.detach()).mesh
            if mesh is not None and len(ranks & set(mesh.mesh.flatten().tolist())) > 1:
                raise InputError(
                    "process_group must join ranks of different replicas, got ranks that share the shards of one: "
                    'of a mesh ("replica", "shard") give mesh["replica"].get_group() here and mesh["shard"] to FSDP'
                )

    def broadcast(self, tensors: Iterable[Tensor], source: int) -> None:
        """In place, from the group's rank `source`."""
        for tensor in tensors if self.size > 1 else ():
            dense = tensor.contiguous()
            dist.broadcast(dense, group=self.group, group_src=source)
            if dense is not tensor:
                tensor.copy_(dense)

    def mean_(self, flats: Iterable[Tensor]) -> int:
        """The means over replicas, in place; returns the bytes that this rank handed to the all-reduce."""
        sent = 0
        for flat in flats if self.size > 1 else ():
            dist.all_reduce(flat, group=self.group)
            flat.div_(self.size)
            sent += flat.nbytes
        return sent


def in_buckets(likes: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Flat tensors, one for each device and type of `likes`, and views of them in the shapes of `likes`, in order."""
    buckets: dict[Any, list[int]] = defaultdict(list)
    for index, like in enumerate(likes):
        buckets[like.device, like.dtype].append(index)
    flats, views = [], list(likes)
    for (device, dtype), members in buckets.items():
        sizes = [likes[index].numel() for index in members]
        flats.append(torch.empty(sum(sizes), device=device, dtype=dtype))
        for index, view in zip(members, torch.split(flats[-1], sizes), strict=True):
            views[index] = view.view(likes[index].shape)
    return flats, views


def over_shards(parameters: Iterable[Tensor], *flags: bool) -> list[bool]:
    """Each flag, true if it is so on any rank that holds a shard of this replica's weights."""
    mine = list(map(float, flags))
    meshes: dict[Any, list[float]] = {None: mine}
    for p in parameters:
        meshes.setdefault(share(p.detach()).mesh, mine)
    return [total > 0 for total in over_meshes(meshes)]


@torch.no_grad()
def clip_(named: Iterable[tuple[str, Tensor]], most: float) -> None:
    """g ← g·min(1, most/(|g| + 1e-6)), |g| the norm over all gradients and over the ranks that share them.

    Each tensor's norm is taken in float32 or its own finer type, their squares are summed in float64; NaN stays NaN.
    """
    squares: dict[Any, list[Tensor]] = defaultdict(list)
    gradients = [(name, p.grad) for name, p in named if p.grad is not None]
    for name, gradient in gradients:
        if gradient.is_sparse:
            raise InputError(f"clip_norm needs dense gradients, got a sparse one of {name}: build it with sparse=False")
        part, mesh, holders = share(gradient)
        norm = torch.linalg.vector_norm(part, dtype=wide(part))
        squares[mesh].append(norm.to(gradients[0][1].device, torch.float64).square() / holders)
    sums = {mesh: torch.stack(each).sum() for mesh, each in squares.items()}
    if not sums:
        return
    if set(sums) == {None}:
        total = sums[None]  # stays on the device: the step need not wait for it
    else:
        over_all = over_meshes({mesh: [float(each)] for mesh, each in sums.items()})
        total = torch.tensor(over_all[0], dtype=torch.float64)
    coefficient = (most / (total.sqrt() + 1e-6)).clamp(max=1.0)
    for _, gradient in gradients:
        gradient.mul_(coefficient.to(gradient.device, gradient.dtype))


def floating(buffers: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of those that are no integers."""
    held = list(buffers) if isinstance(buffers, Iterable) else []
    if isinstance(buffers, Tensor) or not isinstance(buffers, Iterable) or not all(map(torch.is_tensor, held)):
        raise InputError(f"buffers must be several tensors, as model.buffers() gives them, got {buffers!r}")
    return [part_of(each) for each in held if each.is_floating_point()]
