"""Kernels over lists of tensors for GPUs, where launches and passes over memory are what a step costs.

They are written in Triton, which comes with PyTorch for CUDA; this file alone is imported without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def takes(*lists: Sequence[Tensor]) -> bool:
    """Whether the kernels take these: float32 on one GPU, each row of the lists in one dense order of memory."""
    if not lists[0] or not lists[0][0].is_cuda or not _has_triton():
        return False
    return all(map(_alike, zip(*lists, strict=True)))


def _alike(row: Sequence[Tensor]) -> bool:
    if any(each.dtype != torch.float32 or not each.is_cuda for each in row):
        return False
    if all(each.is_contiguous() for each in row):
        return True
    return all(each.ndim == 4 and each.is_contiguous(memory_format=torch.channels_last) for each in row)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
