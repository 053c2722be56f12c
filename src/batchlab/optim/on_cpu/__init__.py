"""Kernels over lists of tensors for CPUs, where passes over memory are what a step costs.

They are in C and compiled when `fused=True` first asks for them: half a second, and a C compiler. A compiled rule
(`rule.compiled`) makes one pass over memory in 1.4 times the time of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchlab.core.c_library import compiler
from batchlab.optim.tables import in_one_order


def takes(*lists: Sequence[Tensor]) -> bool:
    """Whether the kernels take these: in float32 or float64 on a CPU, each row of the lists in one dense order.

    The tensors of a list are alike in dtype and device, as those of a bucket are.
    """
    if not lists[0] or any(not each[0].is_cpu or each[0].dtype != lists[0][0].dtype for each in lists):
        return False
    return lists[0][0].dtype in (torch.float32, torch.float64) and compiler() is not None and in_one_order(*lists)
