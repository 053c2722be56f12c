"""LARS on lists in two kernels: the norms, then the step. Seven passes over memory, as torch's fused AdamW makes."""

from __future__ import annotations

from collections.abc import Sequence

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
) -> Rule:
    """`lars_foreach_` of tensors that `takes` takes."""
    sums = ratios = rate  # not looked at without `adapt`
    if adapt:
        sums = yield Sum(squares(ws, gs))
        sums = sums.contiguous()
        ratios = torch.empty_like(sums[0])
    cut, (where, aligned) = blocks_of(ws, BLOCK), addresses(ws, gs, vs)
    how = PROGRAM | {"ALIGNED": aligned, "DECAYS": decays and adapt, "INSIDE": lr_in_momentum}
    numbers = (sums, ratios, rate, momentum, weight_decay, trust, eps)
    with torch.cuda.device_of(where):
        _step[(cut.blocks,)](where, *cut.arrays, *numbers, ADAPT=adapt, CLIP=clip, **how)
    moved(ws)
    return {"trust_ratio": ratios} if adapt else None


@triton.jit
def _step(
    where, of, at, sizes, tensors, sums, ratios, rate, momentum, weight_decay, trust, eps,
    ADAPT: tl.constexpr, CLIP: tl.constexpr,
    DECAYS: tl.constexpr, INSIDE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    tensor, first = tl.load(of + block), tl.load(at + block) * BLOCK
    size, places = tl.load(sizes + tensor), first + tl.arange(0, BLOCK)
    rate, scale = tl.load(rate), 1.0
    if ADAPT:
        scale = _ratio(sums, tensor, tensors, weight_decay, trust, eps, rate, CLIP)
        if first == 0:
            tl.store(ratios + tensor, scale)
    if INSIDE:
        scale *= rate
    if first + BLOCK <= size:
        _step_of(where, tensor, tensors, size, places, scale, rate, momentum, weight_decay, DECAYS, INSIDE, ALIGNED,
                 FULL=True)  # fmt: skip
    else:
        _step_of(where, tensor, tensors, size, places, scale, rate, momentum, weight_decay, DECAYS, INSIDE, ALIGNED,
                 FULL=False)  # fmt: skip


@triton.jit
def _ratio(sums, tensor, tensors, weight_decay, trust, eps, rate, CLIP: tl.constexpr):
    """η|w| / (|g| + β|w| + ε), from the sums of squares of w and g."""
    w_norm, g_norm = tl.sqrt_rn(tl.load(sums + tensor)), tl.sqrt_rn(tl.load(sums + tensors + tensor))
    ratio = tl.div_rn(tl.load(trust) * w_norm, g_norm + tl.load(weight_decay) * w_norm + tl.load(eps))
    if CLIP:
        ratio = tl.minimum(tl.div_rn(ratio, rate), 1.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where((w_norm == 0) | (g_norm == 0), 1.0, ratio)


@triton.jit
def _step_of(
    where, tensor, tensors, size, places, scale, rate, momentum, weight_decay,
    DECAYS: tl.constexpr, INSIDE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    w_start = start_of(where, 0, tensor, tensors, ALIGNED)
    v_start = start_of(where, 2, tensor, tensors, ALIGNED)
    w = load(w_start, places, size, FULL)
    g = load(start_of(where, 1, tensor, tensors, ALIGNED), places, size, FULL)
    v = load(v_start, places, size, FULL)
    if DECAYS:
        g += tl.load(weight_decay) * w
    v = v * tl.load(momentum) + scale * g
    store(v_start, places, size, v, FULL)
    if INSIDE:
        w -= v
    else:
        w -= rate * v
    store(w_start, places, size, w, FULL)
