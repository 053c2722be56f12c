"""MARS-AdamW: Adam on gradients whose variance is reduced by the last one (Yuan et al. 2024, arXiv 2411.10438).

  c = g + γ·β₁/(1 - β₁)·(g - g₋₁), divided by its norm where |c| > 1          then Adam's moments and step with c

γ gamma, g₋₁ the gradient of the step before at its own weights (the approximate form; the exact one takes a second
gradient, at the old weights with the new batch). |c| over the whole tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchlab.core.checks import check_rate
from batchlab.optim.leaf import Leaf
from batchlab.optim.moments import adam_numbers, check_betas
from batchlab.optim.rule import Form, Numbers, Rule, squares, squares_of_lists, weights_of_lerp
from batchlab.optim.shell import RuleOptimizer
from batchlab.optim.state_dtype import StateDtype


@weights_of_lerp("share1")
def mars_(
    w: Tensor,
    g: Tensor,
    before: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    rate: Tensor,
    share1: float | Tensor,
    keep2: Tensor,
    share2: float,
    eps: Tensor,
    gain: float,
    keep: float,
    correct: bool,
) -> Rule:
    """One step on one tensor, by the numbers of `adam_numbers`. gain: γβ₁/(1 - β₁). keep: 1 - ηλ.

    correct: false takes c = g, which is AdamW.
    """
    c, found = g, None
    if correct:
        c = (g - before).mul_(gain).add_(g)
        before.copy_(g)
        norm_sq = yield squares(c)
        shrunk = norm_sq[0].sqrt().clamp(min=1.0)
        c.div_(shrunk)
        found = {"clip_ratio": 1 / shrunk}
    m.lerp_(c, share1)
    v.mul_(keep2).addcmul_(c, c, value=share2)
    u = v.sqrt().add_(eps)
    torch.div(m, u, out=u)
    w.mul_(keep).addcmul_(u, rate, value=-1)
    return found


def mars_foreach_(
    ws: list[Tensor],
    gs: list[Tensor],
    befores: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    *,
    rate: Tensor,
    share1: float,
    keep2: Tensor,
    share2: float,
    eps: Tensor,
    gain: float,
    keep: float,
    correct: bool,
) -> Rule:
    """`mars_` on lists of tensors."""
    cs, found = gs, None
    if correct:
        cs = list(torch._foreach_sub(gs, befores))
        torch._foreach_mul_(cs, gain)
        torch._foreach_add_(cs, gs)
        torch._foreach_copy_(befores, gs)
        norms_sq = yield squares_of_lists(cs)
        shrunk = norms_sq[0].sqrt().clamp(min=1.0)
        torch._foreach_div_(cs, list(shrunk.unbind()))
        found = {"clip_ratio": 1 / shrunk}
    torch._foreach_lerp_(ms, cs, share1)
    torch._foreach_mul_(vs, keep2)
    torch._foreach_addcmul_(vs, cs, cs, share2)
    us = list(torch._foreach_sqrt(vs))
    torch._foreach_add_(us, eps)
    us = list(torch._foreach_div(ms, us))
    torch._foreach_mul_(ws, keep)
    torch._foreach_mul_(us, rate)
    torch._foreach_sub_(ws, us)
    return found


class MARS(RuleOptimizer):
    """AdamW with corrected gradients for matrices, and plain AdamW for tensors of at most one dimension.

    lr: of matrices, 3e-3 in the benchmark of Semenov et al. 2025 (arXiv 2509.01440), three times AdamW's there.
    vector_lr: of the other tensors as a share of lr; a third is the benchmark's. betas: of matrices; vector_betas: of
    the others, the benchmark's. gamma: 0.025, the paper's. weight_decay: λ, decoupled. Others: `RuleOptimizer`.

    At the first step g₋₁ = 0, as in the authors' code: c = g·(1 + γβ₁/(1 - β₁)), 1.475 g at the defaults. Clip global
    norms before the step: g₋₁ is then the clipped gradient. Three buffers a matrix. With the batch: η as AdamW's;
    the correction grows with β₁, and gains most at large batches, say the benchmark's readers.

    Raises `InputError` for hyperparameters out of range, and for sparse or complex tensors by name.

    >>> w = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    >>> w.grad = torch.tensor([[0.5, -0.5]])
    >>> MARS([w], lr=0.25).step()
    >>> w.detach()
    tensor([[ 0.7500, -1.7500]])
    """

    STATE = ("previous_grad", "exp_avg", "exp_avg_sq")
    SQUARES = ("exp_avg_sq",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma: float = 0.025,
        vector_lr: float = 1 / 3,
        vector_betas: tuple[float, float] = (0.8, 0.999),
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        state_dtype: StateDtype = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "gamma": gamma}
        defaults |= {"vector_lr": vector_lr, "vector_betas": vector_betas}
        options: dict[str, Any] = {"foreach": foreach, "fused": fused, "maximize": maximize}
        super().__init__(params, defaults, **options, differentiable=differentiable, state_dtype=state_dtype)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses what is out of range."""
        numbers = ("lr", "weight_decay", "eps", "gamma", "vector_lr")
        check_rate(**{name: group[name] for name in numbers})
        check_betas(group["betas"])
        check_betas(group["vector_betas"], name="vector_betas")

    def new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """No last gradient is kept of a vector."""
        state = super().new_state(parameter, group)
        return state if parameter.ndim > 1 else {name: state[name] for name in self.STATE[1:]}

    def forms(self, group: dict[str, Any]) -> tuple[Form, Form | None]:
        """The rule and its form for lists."""
        return mars_, mars_foreach_

    def tensors(self, leaf: Leaf, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """Those of `mars_`; a vector's gradient stands in for the one before it."""
        before = leaf.state["previous_grad"] if len(leaf.shape) > 1 else leaf.g
        return (leaf.w, leaf.g, before, leaf.state["exp_avg"], leaf.state["exp_avg_sq"])

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """Those of `mars_`."""
        correct = len(leaf.shape) > 1
        betas = group["betas" if correct else "vector_betas"]
        lr = group["lr"] if correct else group["lr"] * group["vector_lr"]
        numbers = adam_numbers(leaf.w, lr=lr, betas=betas, eps=group["eps"], weight_decay=0.0, t=leaf.t)
        numbers = {name: numbers[name] for name in ("rate", "share1", "keep2", "share2", "eps")}
        numbers |= {"gain": group["gamma"] * betas[0] / (1 - betas[0]), "keep": 1 - lr * group["weight_decay"]}
        return numbers | {"correct": correct}
