"""Lists of tensors as one kernel sees them: a table of addresses, cut into blocks of one length (Triton).

A program of a kernel has one block: `of` says of which tensor, `at` which of its blocks, from 0. Sums over tensors are
taken block by block and added in the order of the blocks, so that they are the same at each run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements of a program
PROGRAM = {"BLOCK": BLOCK, "num_warps": 8}


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


def blocks_of(tensors: Sequence[Tensor]) -> Blocks:
    """Of the tensors of one list; kept for lists of the same sizes."""
    return _blocks(tuple(each.numel() for each in tensors), tensors[0].device)


@lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> Blocks:
    counts = [-(-size // BLOCK) for size in sizes]
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
    """Of lists of tensors; kept for the same places."""
    return _addresses(tuple([each.data_ptr() for row in lists for each in row]), len(lists), lists[0][0].device)


@lru_cache(maxsize=64)
def _addresses(places: tuple[int, ...], rows: int, device: torch.device) -> Addresses:
    made = torch.tensor(places, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda").view(rows, -1)
    return Addresses(made.to(device, non_blocking=True), all(each % 16 == 0 for each in places))


def squares(*lists: Sequence[Tensor]) -> Tensor:
    """(lists, tensors): Σx² of each tensor."""
    cut, (where, aligned) = blocks_of(lists[0]), addresses(*lists)
    parts = torch.empty(len(lists), cut.blocks, device=where.device)
    if cut.blocks:
        with torch.cuda.device_of(where):
            _squares[(cut.blocks, len(lists))](where, *cut.arrays, parts, cut.blocks, ALIGNED=aligned, **PROGRAM)
    return summed(parts, cut)


def summed(parts: Tensor, cut: Blocks) -> Tensor:
    """(rows, tensors) from (rows, blocks): the sums over the blocks of each tensor."""
    sums = torch.empty(len(parts), cut.tensors, device=parts.device)
    with torch.cuda.device_of(parts):
        _summed[(cut.tensors, len(parts))](parts, cut.firsts, sums, cut.tensors, cut.blocks, WIDE=1024)
    return sums


@triton.jit
def start_of(where, row, tensor, tensors, ALIGNED: tl.constexpr):
    """Where a tensor of a list begins."""
    start = tl.load(where + row * tensors + tensor).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def load(start, places, size, FULL: tl.constexpr):
    """Zeros beyond the end. FULL: whether no place is; without a mask a thread reads four numbers at once."""
    if FULL:
        return tl.load(start + places)
    else:
        return tl.load(start + places, mask=places < size, other=0.0)


@triton.jit
def store(start, places, size, values, FULL: tl.constexpr):
    """Nothing beyond the end."""
    if FULL:
        tl.store(start + places, values)
    else:
        tl.store(start + places, values, mask=places < size)


@triton.jit
def _squares(where, of, at, sizes, tensors, parts, blocks, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    block, row = tl.program_id(0), tl.program_id(1)
    tensor, first = tl.load(of + block), tl.load(at + block) * BLOCK
    start, size = start_of(where, row, tensor, tensors, ALIGNED), tl.load(sizes + tensor)
    places = first + tl.arange(0, BLOCK)
    if first + BLOCK <= size:
        x = load(start, places, size, FULL=True)
        tl.store(parts + row * blocks + block, tl.sum(x * x))
    else:
        x = load(start, places, size, FULL=False)
        tl.store(parts + row * blocks + block, tl.sum(x * x))


@triton.jit
def _summed(parts, firsts, sums, tensors, blocks, WIDE: tl.constexpr):
    tensor, row = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(firsts + tensor), tl.load(firsts + tensor + 1)
    total = tl.zeros((WIDE,), tl.float32)
    while start < end:
        places = start + tl.arange(0, WIDE)
        total += tl.load(parts + row * blocks + places, mask=places < end, other=0.0)
        start += WIDE
    tl.store(sums + row * tensors + tensor, tl.sum(total))
