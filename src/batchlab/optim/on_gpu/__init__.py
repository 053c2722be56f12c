"""Kernels over lists of tensors for GPUs, where launches and passes over memory are what a step costs.

They are written in Triton, which comes with PyTorch for CUDA; this file alone is imported without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from batchlab.optim.tables import in_one_order


def takes(*lists: Sequence[Tensor]) -> bool:
    """Whether the kernels take these: float32 on one GPU, each row of the lists in one dense order of memory.

    The tensors of a list are alike in dtype and device, as those of a bucket are.
    """
    if not lists[0] or any(not each[0].is_cuda or each[0].dtype != torch.float32 for each in lists):
        return False
    return _has_triton() and in_one_order(*lists)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
