"""Lists of tensors as one kernel sees them: where each begins, and how all are cut into blocks of one length.

A program of a kernel, or a turn of its loop, has one block: `of` says of which tensor, `at` which of its blocks, from
0. Sums over tensors are taken block by block and added in the order of the blocks, so that they are the same at each
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

_PLAIN = frozenset((Tensor, nn.Parameter))  # and not what stands for others


@dataclass(frozen=True)
class Blocks:
    """How tensors of some sizes are cut. of, at: (blocks,). sizes: (tensors,). firsts: (tensors + 1,), the first block
    of each. All on the device.
    """

    of: Tensor
    at: Tensor
    sizes: Tensor
    firsts: Tensor
    tensors: int
    blocks: int

    @property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """What a kernel takes after the addresses: of, at, sizes, tensors."""
        return self.of, self.at, self.sizes, self.tensors


def blocks_of(tensors: Sequence[Tensor], block: int) -> Blocks:
    """Of the tensors of one list, of `block` elements each but the last; kept for lists of the same sizes. An empty one
    has a block too, of none.
    """
    return _blocks(tuple([each.numel() for each in tensors]), block, tensors[0].device)


def walkable(ws: Sequence[Tensor], gs: Sequence[Tensor], *states: Sequence[Tensor]) -> bool:
    """Whether kernels may walk these by their addresses: plain tensors, each row of one size, on one device and in one
    dense order of memory, the gradients as they stand there. A list is of one dtype, as that of a bucket is.
    """
    lists, sizes, device = (ws, gs, *states), list(map(Tensor.numel, ws)), ws[0].get_device()
    for row in lists:  # by `map`, which takes half the time of a loop
        if row[0].dtype is not ws[0].dtype or not _PLAIN.issuperset(map(type, row)):
            return False
        if list(map(Tensor.numel, row)) != sizes or set(map(Tensor.get_device, row)) != {device}:
            return False
    if any(map(Tensor.is_neg, gs)) or any(map(Tensor._is_zerotensor, gs)):  # what is in memory is not what they are
        return False
    if all(map(Tensor.is_contiguous, chain(*lists))):
        return True
    return all(map(_in_one_order, zip(*lists, strict=True)))


def _in_one_order(row: Sequence[Tensor]) -> bool:
    if any(each.shape != row[0].shape for each in row):
        return False
    if all(each.is_contiguous() for each in row):
        return True
    return all(each.ndim == 4 and each.is_contiguous(memory_format=torch.channels_last) for each in row)


@lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], block: int, device: torch.device) -> Blocks:
    counts = [max(1, -(-size // block)) for size in sizes]
    with torch.device("cpu"):
        firsts = torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32)
        of = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), torch.tensor(counts))
        at = torch.arange(len(of)) - firsts[of.long()]
        held = torch.tensor(sizes, dtype=torch.int64)
    of, at, held, firsts = (each.to(device) for each in (of, at, held, firsts))
    return Blocks(of, at, held, firsts, len(sizes), len(of))


class Addresses(NamedTuple):
    """where: (lists, tensors), each tensor's first byte, on the device. aligned: whether all are multiples of 16, so
    that a thread may read four numbers at once.
    """

    where: Tensor
    aligned: bool


def addresses(*lists: Sequence[Tensor]) -> Addresses:
    """Of lists of tensors; kept for the same places, on each stream of a GPU apart."""
    device = lists[0][0].device
    places = tuple(map(Tensor.data_ptr, chain.from_iterable(lists)))
    return _addresses(places, len(lists), device, stream_of(device))


def stream_of(device: torch.device) -> int:
    """The stream that work for a GPU goes to now: what one makes another may not read yet. 0 for other devices."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


@lru_cache(maxsize=64)
def _addresses(places: tuple[int, ...], rows: int, device: torch.device, stream: int) -> Addresses:
    made = torch.tensor(places, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda").view(rows, -1)
    return Addresses(made.to(device, non_blocking=True), all(each % 16 == 0 for each in places))


def moved(tensors: Sequence[Tensor]) -> None:
    """Tells autograd of weights that a kernel has written: a graph that holds one must not be gone back through."""
    torch.autograd.graph.increment_version([each for each in tensors if not each.is_inference()])
