"""What kernels over lists share, in Triton: a block's place, its numbers, and sums over tensors (`optim.tables`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchlab.optim.tables import Blocks, addresses, blocks_of

BLOCK = 4096  # elements of a program
PROGRAM = {"BLOCK": BLOCK, "num_warps": 8}


def squares(*lists: Sequence[Tensor]) -> Tensor:
    """(lists, tensors): Σx² of each tensor."""
    cut, (where, aligned) = blocks_of(lists[0], BLOCK), addresses(*lists)
    parts = torch.empty(len(lists), cut.blocks, dtype=torch.float32, device=where.device)
    with torch.cuda.device_of(where):
        _squares[(cut.blocks, len(lists))](where, *cut.arrays, parts, cut.blocks, ALIGNED=aligned, **PROGRAM)
    return summed(parts, cut)


def summed(parts: Tensor, cut: Blocks) -> Tensor:
    """(rows, tensors) from (rows, blocks): the sums over the blocks of each tensor."""
    sums = torch.empty(len(parts), cut.tensors, dtype=torch.float32, device=parts.device)
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
