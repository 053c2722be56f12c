"""LAMB on lists: averages, u and the sums of its squares; then the step, for which u is made anew.

Ten passes over memory, where torch's fused AdamW makes seven.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from batchlab.optim.on_cpu.lists import Lists
from batchlab.optim.rule import Rule, Sum
from batchlab.optim.tables import moved


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
    adapt: bool,
    ratio_of: Callable[..., Tensor],
    **limits: Any,
) -> Rule:
    """`lamb_foreach_` of tensors that `on_cpu.takes` takes. ratio_of: of |w|, |u| and the limits."""
    lists, numbers = Lists(ws, gs, ms, vs), (rate, share1, keep2, share2, eps, decay)
    parts = lists.parts(2) if adapt else None
    lists.run("lamb_averages", parts, numbers)
    moved(ws)
    if parts is None:
        return None
    norms = yield Sum(lists.summed(parts))
    ratios = ratio_of(*norms.sqrt(), **limits)
    lists.run("lamb_step", ratios * rate, numbers)
    return {"trust_ratio": ratios}
