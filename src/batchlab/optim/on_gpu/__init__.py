"""Kernels over lists of tensors for GPUs, where launches and passes over memory are what a step costs.

They are written in Triton, which comes with PyTorch for CUDA; this file alone is imported without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from batchlab.optim.tables import walkable


def takes(ws: Sequence[Tensor], gs: Sequence[Tensor], *states: Sequence[Tensor]) -> bool:
    """Whether the kernels take these: float32 on one GPU, and `walkable`."""
    if not ws or not ws[0].is_cuda or ws[0].dtype != torch.float32 or not _has_triton():
        return False
    return walkable(ws, gs, *states)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
