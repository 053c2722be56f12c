"""LAMB on lists in two kernels: averages, u and the sums of its squares; then the step, for which u is made anew.

Ten passes over memory, where torch's fused AdamW makes seven and `lamb_foreach_` 27.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchlab.optim.on_gpu.lists import BLOCK, PROGRAM, load, start_of, store, summed
from batchlab.optim.rule import Rule, Sum
from batchlab.optim.tables import addresses, blocks_of, moved


def lamb_lists_(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    rate: Tensor,
    share1: float,
    keep2: Tensor,
    share2: float,
    eps: Tensor,
    decay: Tensor,
    decays: bool,
    k: Tensor,
    clamp: tuple[float, float] | None,
    max_ratio: float | None,
    adapt: bool,
) -> Rule:
    """`lamb_foreach_` of tensors that `takes` takes."""
    cut, (where, aligned) = blocks_of(ws, BLOCK), addresses(ws, gs, ms, vs)
    parts = torch.empty(2, cut.blocks, dtype=torch.float32, device=where.device)
    how = PROGRAM | {"ALIGNED": aligned, "DECAYS": decays}
    with torch.cuda.device_of(where):
        numbers = (rate, keep2, eps, decay, share1, share2)
        _averages[(cut.blocks,)](where, *cut.arrays, parts, cut.blocks, *numbers, ADAPT=adapt, **how)
    moved(ws)
    if not adapt:
        return None
    sums = yield Sum(summed(parts, cut))
    sums = sums.contiguous()
    ratios, (low, high) = torch.empty_like(sums[0]), clamp or (0.0, math.inf)
    limits = (k, low, high, math.inf if max_ratio is None else max_ratio)
    with torch.cuda.device_of(where):
        _step[(cut.blocks,)](where, *cut.arrays, sums, ratios, rate, eps, decay, *limits, **how)
    return {"trust_ratio": ratios}


@triton.jit
def _averages(
    where, of, at, sizes, tensors, parts, blocks, rate, keep2, eps, decay, share1, share2,
    ADAPT: tl.constexpr, DECAYS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    tensor, first = tl.load(of + block), tl.load(at + block) * BLOCK
    size, places = tl.load(sizes + tensor), first + tl.arange(0, BLOCK)
    if first + BLOCK <= size:
        _averages_of(where, tensor, tensors, size, places, block, parts, blocks, rate, keep2, eps, decay, share1,
                     share2, ADAPT, DECAYS, ALIGNED, FULL=True)  # fmt: skip
    else:
        _averages_of(where, tensor, tensors, size, places, block, parts, blocks, rate, keep2, eps, decay, share1,
                     share2, ADAPT, DECAYS, ALIGNED, FULL=False)  # fmt: skip


@triton.jit
def _averages_of(
    where, tensor, tensors, size, places, block, parts, blocks, rate, keep2, eps, decay, share1, share2,
    ADAPT: tl.constexpr, DECAYS: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    w_start = start_of(where, 0, tensor, tensors, ALIGNED)
    m_start = start_of(where, 2, tensor, tensors, ALIGNED)
    v_start = start_of(where, 3, tensor, tensors, ALIGNED)
    w = load(w_start, places, size, FULL)
    g = load(start_of(where, 1, tensor, tensors, ALIGNED), places, size, FULL)
    m = load(m_start, places, size, FULL)
    v = load(v_start, places, size, FULL)
    m += share1 * (g - m)
    v = v * tl.load(keep2) + share2 * g * g
    store(m_start, places, size, m, FULL)
    store(v_start, places, size, v, FULL)
    u = _u(w, m, v, places, size, eps, decay, DECAYS)
    if ADAPT:
        tl.store(parts + block, tl.sum(w * w))
        tl.store(parts + blocks + block, tl.sum(u * u))
    else:
        store(w_start, places, size, w - tl.load(rate) * u, FULL)


@triton.jit
def _step(
    where, of, at, sizes, tensors, sums, ratios, rate, eps, decay, k, low, high, most,
    DECAYS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    tensor, first = tl.load(of + block), tl.load(at + block) * BLOCK
    size, places = tl.load(sizes + tensor), first + tl.arange(0, BLOCK)
    ratio = _ratio(sums, tensor, tensors, k, low, high, most)
    if first == 0:
        tl.store(ratios + tensor, ratio)
    rate = ratio * tl.load(rate)
    if first + BLOCK <= size:
        _step_of(where, tensor, tensors, size, places, rate, eps, decay, DECAYS, ALIGNED, FULL=True)
    else:
        _step_of(where, tensor, tensors, size, places, rate, eps, decay, DECAYS, ALIGNED, FULL=False)


@triton.jit
def _ratio(sums, tensor, tensors, k, low, high, most):
    """k·φ(|w|)/|u|, from the sums of squares of w and u; most: its upper limit."""
    w_norm, u_norm = tl.sqrt_rn(tl.load(sums + tensor)), tl.sqrt_rn(tl.load(sums + tensors + tensor))
    length = tl.clamp(w_norm, low, high, propagate_nan=tl.PropagateNan.ALL)
    ratio = tl.minimum(tl.div_rn(tl.load(k) * length, u_norm), most, propagate_nan=tl.PropagateNan.ALL)
    return tl.where((w_norm == 0) | (u_norm == 0), 1.0, ratio)


@triton.jit
def _step_of(
    where, tensor, tensors, size, places, rate, eps, decay,
    DECAYS: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    w_start = start_of(where, 0, tensor, tensors, ALIGNED)
    w = load(w_start, places, size, FULL)
    m = load(start_of(where, 2, tensor, tensors, ALIGNED), places, size, FULL)
    v = load(start_of(where, 3, tensor, tensors, ALIGNED), places, size, FULL)
    u = _u(w, m, v, places, size, eps, decay, DECAYS)
    store(w_start, places, size, w - rate * u, FULL)


@triton.jit
def _u(w, m, v, places, size, eps, decay, DECAYS: tl.constexpr):
    u = m / tl.where(places < size, tl.sqrt_rn(v) + tl.load(eps), 1.0)
    if DECAYS:
        u += tl.load(decay) * w
    return u
