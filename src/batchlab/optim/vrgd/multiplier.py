"""r of VRGD, tensor by tensor: sums over groups, the multiplier from them, its momentum (arXiv 2309.13681)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.core.checks import check_inside, check_positive
from batchlab.core.errors import InputError
from batchlab.optim.diloco.replicas import in_buckets
from batchlab.optim.rule import Rule, Sum, alone

FEWEST_GROUPS = 2


def add_group_(s: Tensor, m2: Tensor, g: Tensor, *, examples: float, before: float) -> None:
    """S ← S + g, and M with the group's share of Σ n(g/n - gbar)². g: summed over its examples; `before` came first."""
    if before:
        gap = (s * (-1 / before)).add_(g, alpha=1 / examples)
        m2.addcmul_(gap, gap, value=examples * before / (examples + before))
    s.add_(g)


def add_group_foreach_(
    ss: list[Tensor], m2s: list[Tensor], gs: list[Tensor], *, examples: float, before: float
) -> None:
    """`add_group_` on lists of tensors."""
    if before:
        gaps = list(torch._foreach_mul(ss, -1 / before))
        torch._foreach_add_(gaps, gs, alpha=1 / examples)
        torch._foreach_addcmul_(m2s, gaps, gaps, examples * before / (examples + before))
    torch._foreach_add_(ss, gs)


def multiplier_(
    s: Tensor, m2: Tensor, *, examples: float, groups: int, count: int, gamma: float, cap: float | None
) -> Rule:
    """Turns M into r, from S = N·gbar and M = N·var. count: elements of the whole tensor. cap: of r before its mean."""
    gbar = s / examples
    torch.div(gbar, m2.div_(examples).sqrt_(), out=m2)
    r = m2.square_().masked_fill_(gbar == 0, 0.0)
    if cap is not None:
        r.clamp_(max=cap)
    agreed = r >= (groups * torch.finfo(r.dtype).eps) ** -2
    r.masked_fill_(agreed, 0.0)
    total, spared = yield Sum(torch.stack([r.sum(), torch.count_nonzero(agreed).to(r.dtype)]))
    mean = total / (count - spared)
    r.div_(torch.where(mean == 0, 1.0, mean)).masked_fill_(agreed, 1.0).clamp_(gamma, 1.0)
    total, lowest = yield Sum(torch.stack([r.sum(), torch.count_nonzero(r <= gamma).to(r.dtype)]))
    return {"multiplier": total / count, "at_gamma": lowest / count}


def multiplier(
    gradients: Tensor, examples: Sequence[float] | None = None, *, gamma: float = 0.1, cap: float | None = None
) -> Tensor:
    """r of one tensor, from its groups' mean gradients stacked along the first dimension, in float32 at least.

    examples: of each group, where they differ.

    >>> multiplier(torch.tensor([[3.0, 1.0, 1.0], [1.0, 1.0, -1.0]]))  # r = 4, inf, 0
    tensor([1.0000, 1.0000, 0.1000])
    """
    check_multiplier(gamma, cap)
    sizes = [1.0] * len(gradients) if examples is None else list(examples)
    if len(sizes) != len(gradients):
        raise InputError(f"examples must name each of the {len(gradients)} groups, got {len(sizes)}")
    enough_groups(len(sizes))
    wide = gradients.detach().to(torch.promote_types(gradients.dtype, torch.float32))
    s, m2 = torch.zeros_like(wide[0]), torch.zeros_like(wide[0])
    for index, size in enumerate(sizes):
        check_positive(examples=size)
        add_group_(s, m2, wide[index] * size, examples=size, before=sum(sizes[:index]))
    alone(multiplier_, s, m2, examples=sum(sizes), groups=len(sizes), count=s.numel(), gamma=gamma, cap=cap)
    return m2


def smooth_(r: Tensor, p: Tensor, b: Tensor, *, beta3: float, finite: Tensor) -> None:
    """p ← β₃p + (1 - β₃)r, r ← p/b; b is the sum of the weights, 1 - βᵗ. A tensor with a NaN leaves p as it is."""
    p.lerp_(torch.where(finite, r, p), 1 - beta3)
    b.lerp_(torch.where(finite, torch.ones_like(b), b), 1 - beta3)
    torch.div(p, b, out=r)


def merge_(
    ss: Sequence[Tensor], m2s: Sequence[Tensor], mine: float, examples: float, group: dist.ProcessGroup | None
) -> None:
    """S and M of all ranks' groups: M = Σ_ranks (M_r + n_r (gbar_r - gbar)²), n_r = `mine` of all `examples`."""
    flats, views = in_buckets(ss)
    torch._foreach_copy_(views, list(ss))
    for flat in flats:
        dist.all_reduce(flat, group=group)
    for s, m2, total in zip(ss, m2s, views, strict=True):
        if mine:
            gap = (s / mine).sub_(total / examples)
            m2.addcmul_(gap, gap, value=mine)
        s.copy_(total)
    torch._foreach_copy_(views, list(m2s))
    for flat in flats:
        dist.all_reduce(flat, group=group)
    torch._foreach_copy_(list(m2s), views)


def enough_groups(groups: Any) -> None:
    if groups in (0, 1):
        raise InputError(f"the multiplier needs at least two groups, got {groups}")


def check_multiplier(gamma: float, cap: float | None) -> None:
    if gamma != 1:
        check_inside(gamma=gamma)
    if cap is not None:
        check_positive(cap=cap)
