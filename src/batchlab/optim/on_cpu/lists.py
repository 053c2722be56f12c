"""The kernels of `kernels.c` on lists of tensors, over threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from batchlab.core.c_library import REAL, library
from batchlab.optim.on_cpu import KERNELS
from batchlab.optim.tables import Blocks, addresses, blocks_of

BLOCK = 2**14  # elements: a thread's turn, in its cache; sums of float32 over as many are exact to 1e-6


class _Lists(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("where", "of", "at", "sizes")] + [
        (name, ctypes.c_int64) for name in ("tensors", "blocks", "length")
    ]


class Lists:
    """Lists of tensors of one dtype on a CPU, row by row in one order of memory (`on_cpu.takes`)."""

    def __init__(self, *lists: Sequence[Tensor]) -> None:
        self.dtype = lists[0][0].dtype
        self.cut: Blocks = blocks_of(lists[0], BLOCK)
        where = addresses(*lists).where
        pointers = [each.data_ptr() for each in (where, self.cut.of, self.cut.at, self.cut.sizes)]
        self._held = (where, _Lists(*pointers, self.cut.tensors, self.cut.blocks, BLOCK))

    def run(self, function: str, tensor: Tensor | None, numbers: Sequence[float | Tensor] = ()) -> None:
        """Runs a kernel over all blocks: its tensor, or none, and its numbers, in the order of its structure."""
        call, real = getattr(library(KERNELS, self.dtype), function), REAL[self.dtype][2]
        given = (real * len(numbers))(*map(float, numbers))
        end = [ctypes.byref(given)] if numbers else []
        threads = max(1, min(torch.get_num_threads(), self.cut.blocks))
        pointer = ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
        call(ctypes.byref(self._held[1]), ctypes.c_int(threads), pointer, *end)

    def parts(self, rows: int) -> Tensor:
        """(rows, blocks), for a kernel's sums over blocks."""
        return torch.empty(rows, self.cut.blocks, dtype=torch.float64, device="cpu")

    def summed(self, parts: Tensor) -> Tensor:
        """(rows, tensors) from `parts`: the sums over the blocks of each tensor."""
        sums = parts.new_zeros(len(parts), self.cut.tensors)
        return sums.index_add_(1, self.cut.of, parts).to(self.dtype)
