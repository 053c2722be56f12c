"""Kernels over lists of tensors for CPUs, where passes over memory are what a step costs.

They are in C and compiled when an optimizer is made with `fused=True`: half a second, and a C compiler. A compiled rule
(`rule.compiled`) makes one pass over memory in 1.4 times the time of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from batchlab.core.c_library import REAL, compiler, library
from batchlab.optim.tables import walkable

KERNELS = Path(__file__).with_name("kernels.c")


def takes(ws: Sequence[Tensor], gs: Sequence[Tensor], *states: Sequence[Tensor]) -> bool:
    """Whether the kernels take these: float32 or float64 on a CPU, and `walkable`; never without a compiler."""
    if not ws or not ws[0].is_cpu or ws[0].dtype not in REAL or compiler() is None:
        return False
    return walkable(ws, gs, *states)


def prepare(parameters: Sequence[Tensor]) -> None:
    """Compiles for those on CPUs, so that no step fails half-way for a compiler that does not work."""
    for dtype in {torch.promote_types(each.dtype, torch.float32) for each in parameters if each.device.type == "cpu"}:
        library(KERNELS, dtype)
