"""AdEMAMix: Adam with a second, slow momentum (Pagliardini et al. 2024, arXiv 2409.03137).

  m₁ ← β₁m₁ + (1 - β₁)g      m₂ ← β₃(t)m₂ + (1 - β₃(t))g      v ← β₂v + (1 - β₂)g²
  w ← w - η·[(m₁/(1 - β₁ᵗ) + α(t)m₂)/(√v/√(1 - β₂ᵗ) + ε) + λw]

η lr, λ weight_decay; m₂ has no bias correction. α(t) rises linearly to α in `alpha_warmup` steps; β₃(t) rises from β₁
to β₃ in `beta3_warmup` steps, linearly in the half-life. α = 0 is AdamW.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from batchlab.core.checks import check_count, check_rate
from batchlab.optim.leaf import Leaf
from batchlab.optim.moments import adam_numbers, bias_corrections, check_betas, scalar
from batchlab.optim.rule import Form, Numbers, weights_of_lerp
from batchlab.optim.shell import RuleOptimizer
from batchlab.optim.state_dtype import StateDtype


@weights_of_lerp("share1")
def ademamix_(
    w: Tensor,
    g: Tensor,
    m1: Tensor,
    m2: Tensor,
    v: Tensor,
    *,
    rate: Tensor,
    share1: float | Tensor,
    keep2: Tensor,
    share2: float,
    share3: Tensor,
    alpha: Tensor,
    eps: Tensor,
    keep: float,
) -> None:
    """One step on one tensor.

    share1, share2, share3: 1 - β, β₃ of this step. With k = (1 - β₁ᵗ)/√(1 - β₂ᵗ): rate η/k, eps ε·√(1 - β₂ᵗ), alpha
    α(t)·(1 - β₁ᵗ), so that m₁ needs no division. keep: 1 - ηλ.
    """
    m1.lerp_(g, share1)
    m2.lerp_(g, share3)
    v.mul_(keep2).addcmul_(g, g, value=share2)
    u = torch.addcmul(m1, m2, alpha)
    u.div_(v.sqrt().add_(eps))
    w.mul_(keep).addcmul_(u, rate, value=-1)


def ademamix_foreach_(
    ws: list[Tensor],
    gs: list[Tensor],
    m1s: list[Tensor],
    m2s: list[Tensor],
    vs: list[Tensor],
    *,
    rate: Tensor,
    share1: float,
    keep2: Tensor,
    share2: float,
    share3: Tensor,
    alpha: Tensor,
    eps: Tensor,
    keep: float,
) -> None:
    """`ademamix_` on lists of tensors."""
    torch._foreach_lerp_(m1s, gs, share1)
    torch._foreach_lerp_(m2s, gs, [share3] * len(gs))
    torch._foreach_mul_(vs, keep2)
    torch._foreach_addcmul_(vs, gs, gs, share2)
    scales = list(torch._foreach_sqrt(vs))
    torch._foreach_add_(scales, eps)
    us = list(torch._foreach_mul(m2s, alpha))
    torch._foreach_add_(us, m1s)
    torch._foreach_div_(us, scales)
    torch._foreach_mul_(ws, keep)
    torch._foreach_mul_(us, rate)
    torch._foreach_sub_(ws, us)


def beta3_at(t: int, *, beta1: float, beta3: float, warmup: int) -> float:
    """β₃ at step t: its half-life, ln ½/ln β - 1, goes linearly from that of β₁ to that of β₃ in `warmup` steps.

    >>> [round(beta3_at(t, beta1=0.9, beta3=0.999, warmup=100), 5) for t in (0, 25, 50, 75, 100, 200)]
    [0.9, 0.99612, 0.99802, 0.99867, 0.999, 0.999]
    """
    if t >= warmup:
        return beta3
    share = t / warmup
    between = (1 - share) * _half_life(beta1) + share * _half_life(beta3)
    return float(0.5 ** (1 / (between + 1)))


class AdEMAMix(RuleOptimizer):
    """AdamW that also remembers gradients of thousands of steps ago.

    lr: AdamW's. betas: (β₁, β₂, β₃), the benchmark's of Semenov et al. 2025 (arXiv 2509.01440); the paper has
    β₃ = 0.9999 for long runs. alpha: 8 there, 5 in the paper. alpha_warmup, beta3_warmup: steps; both should be the
    whole run, as in the papers: without them the slow momentum makes early training unstable. weight_decay: λ,
    decoupled. Others: `RuleOptimizer`.

    Three buffers a parameter. With the batch: η as AdamW's; β₃ counts steps, so that at a k times larger batch β₃ᵏ
    keeps its memory in examples. Not for short runs: β₃ = 0.999 remembers 693 steps by half.

    Raises `InputError` for hyperparameters out of range, and for sparse or complex tensors by name.

    >>> w = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    >>> w.grad = torch.tensor([[0.5, -0.5]])
    >>> AdEMAMix([w], lr=0.1, alpha_warmup=100, beta3_warmup=100).step()
    >>> w.detach()
    tensor([[ 0.8996, -1.8996]])
    """

    STATE = ("exp_avg", "exp_avg_slow", "exp_avg_sq")
    SQUARES = ("exp_avg_sq",)
    BY_ELEMENT = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        alpha: float = 8.0,
        alpha_warmup: int = 0,
        beta3_warmup: int = 0,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        state_dtype: StateDtype = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "alpha": alpha}
        defaults |= {"alpha_warmup": alpha_warmup, "beta3_warmup": beta3_warmup}
        options: dict[str, Any] = {"foreach": foreach, "fused": fused, "maximize": maximize}
        super().__init__(params, defaults, **options, differentiable=differentiable, state_dtype=state_dtype)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses what is out of range."""
        check_rate(**{name: group[name] for name in ("lr", "weight_decay", "eps", "alpha")})
        check_betas(group["betas"], 3)
        check_count(0, alpha_warmup=group["alpha_warmup"], beta3_warmup=group["beta3_warmup"])

    def forms(self, group: dict[str, Any]) -> tuple[Form, Form | None]:
        """The rule and its form for lists."""
        return ademamix_, ademamix_foreach_

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """Those of `ademamix_`."""
        (beta1, beta2, beta3), t, rise = group["betas"], leaf.t, group["alpha_warmup"]
        given = {"lr": group["lr"], "betas": (beta1, beta2), "eps": group["eps"]}
        numbers = adam_numbers(leaf.w, **given, weight_decay=0.0, t=t)
        numbers = {name: numbers[name] for name in ("rate", "share1", "keep2", "share2", "eps")}
        alpha = group["alpha"] * (min(t / rise, 1.0) if rise else 1.0) * bias_corrections((beta1,), t)[0]
        share3 = 1 - beta3_at(t, beta1=beta1, beta3=beta3, warmup=group["beta3_warmup"])
        kind = leaf.w.dtype, leaf.w.device
        numbers |= {"alpha": scalar(alpha, *kind), "share3": scalar(share3, *kind)}
        return numbers | {"keep": 1 - group["lr"] * group["weight_decay"]}


def _half_life(beta: float) -> float:
    return math.log(0.5) / math.log(beta + 1e-8) - 1  # 1e-8 is the authors': β = 0 has a half-life of almost -1
