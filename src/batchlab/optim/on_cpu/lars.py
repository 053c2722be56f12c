"""LARS on lists: the norms, then the step. Seven passes over memory, as torch's fused AdamW makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from batchlab.optim.on_cpu.lists import Lists
from batchlab.optim.rule import Rule, Sum
from batchlab.optim.tables import moved


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
    """`lars_foreach_` of tensors that `on_cpu.takes` takes. ratio_of: of |w|, |g| and the numbers."""
    lists, ratios = Lists(ws, gs, vs), None
    if adapt:
        parts = lists.parts(2)
        lists.run("squares", parts)
        norms = yield Sum(lists.summed(parts))
        limit = rate if clip else None
        ratios = ratio_of(*norms.sqrt(), weight_decay=weight_decay, trust=trust, eps=eps, limit=limit)
    scales = torch.ones(len(ws), dtype=lists.dtype, device="cpu") if ratios is None else ratios
    scales = scales * rate if lr_in_momentum else scales
    decay = weight_decay if decays and adapt else 0.0
    lists.run("lars_step", scales, (momentum, decay, 1.0 if lr_in_momentum else rate))
    moved(ws)
    return None if ratios is None else {"trust_ratio": ratios}
