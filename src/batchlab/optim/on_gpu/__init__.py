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
    """Whether the kernels take these: float32 on one GPU, each row of the lists in one dense order of memory.

    The tensors of a list are alike in dtype and device, as those of a bucket are.
    """
    if not lists[0] or any(not each[0].is_cuda or each[0].dtype != torch.float32 for each in lists):
        return False
    if all([each.is_contiguous() for row in lists for each in row]):
        return _has_triton()
    return _has_triton() and all(map(_in_one_order, zip(*lists, strict=True)))


def _in_one_order(row: Sequence[Tensor]) -> bool:
    if all(each.is_contiguous() for each in row):
        return True
    return all(each.ndim == 4 and each.is_contiguous(memory_format=torch.channels_last) for each in row)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
