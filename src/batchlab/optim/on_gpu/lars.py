"""LARS on lists in two kernels: the norms, then the step. Seven passes over memory, as torch's fused AdamW makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchlab.optim.on_gpu.lists import BLOCK, PROGRAM, load, squares, start_of, store
from batchlab.optim.rule import Rule, Sum
from batchlab.optim.tables import addresses, blocks_of, moved


def lars_lists_(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    rate: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    trust: Tensor,
    eps: Tensor,
    clip: bool,
    adapt: bool,
    decays: bool,
    lr_in_momentum: bool,
    ratio_of: Callable[..., Tensor],
) -> Rule:
    """`lars_foreach_` of tensors that `takes` takes. ratio_of: of |w|, |g| and the numbers."""
    ratios = None
    if adapt:
        norms = yield Sum(squares(ws, gs))
        limit = rate if clip else None
        ratios = ratio_of(*norms.sqrt(), weight_decay=weight_decay, trust=trust, eps=eps, limit=limit)
    cut, (where, aligned) = blocks_of(ws, BLOCK), addresses(ws, gs, vs)
    scales = torch.ones(cut.tensors, dtype=torch.float32, device=where.device) if ratios is None else ratios
    scales = scales * rate if lr_in_momentum else scales
    if cut.blocks:
        how = PROGRAM | {"ALIGNED": aligned, "DECAYS": decays and adapt, "INSIDE": lr_in_momentum}
        with torch.cuda.device_of(where):
            _step[(cut.blocks,)](where, *cut.arrays, scales, rate, momentum, weight_decay, **how)
    moved(ws)
    return None if ratios is None else {"trust_ratio": ratios}


@triton.jit
def _step(
    where, of, at, sizes, tensors, scales, rate, momentum, weight_decay,
    DECAYS: tl.constexpr, INSIDE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    tensor, first = tl.load(of + block), tl.load(at + block) * BLOCK
    size, places = tl.load(sizes + tensor), first + tl.arange(0, BLOCK)
    if first + BLOCK <= size:
        _step_of(where, tensor, tensors, size, places, scales, rate, momentum, weight_decay, DECAYS, INSIDE, ALIGNED,
                 FULL=True)  # fmt: skip
    else:
        _step_of(where, tensor, tensors, size, places, scales, rate, momentum, weight_decay, DECAYS, INSIDE, ALIGNED,
                 FULL=False)  # fmt: skip


@triton.jit
def _step_of(
    where, tensor, tensors, size, places, scales, rate, momentum, weight_decay,
    DECAYS: tl.constexpr, INSIDE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    w_start = start_of(where, 0, tensor, tensors, ALIGNED)
    v_start = start_of(where, 2, tensor, tensors, ALIGNED)
    w = load(w_start, places, size, FULL)
    g = load(start_of(where, 1, tensor, tensors, ALIGNED), places, size, FULL)
    v = load(v_start, places, size, FULL)
    if DECAYS:
        g += tl.load(weight_decay) * w
    v = v * tl.load(momentum) + tl.load(scales + tensor) * g
    store(v_start, places, size, v, FULL)
    if INSIDE:
        w -= v
    else:
        w -= tl.load(rate) * v
    store(w_start, places, size, w, FULL)
