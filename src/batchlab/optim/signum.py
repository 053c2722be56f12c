"""Signum: steps by the sign of the momentum (Bernstein et al. 2018, arXiv 1802.04434).

  b ← μb + g        w ← w - ηλw - η·sign(b)        sign(g + μb) with `nesterov`

η lr, μ momentum, λ weight_decay. b starts from zero, so that the first step is -η·sign(g); the code of a benchmark of
2025 (epfml/llm-optimizer-benchmark) starts it from the weights. μ = 0 is signSGD.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchlab.core.checks import check_inside, check_rate
from batchlab.core.errors import InputError
from batchlab.optim.leaf import Leaf
from batchlab.optim.moments import rate_of
from batchlab.optim.rule import Form, Numbers
from batchlab.optim.shell import RuleOptimizer
from batchlab.optim.signs import sign, signs
from batchlab.optim.state_dtype import StateDtype


def signum_(w: Tensor, g: Tensor, b: Tensor, *, rate: Tensor, momentum: float, keep: float, nesterov: bool) -> None:
    """One step on one tensor. rate: η. keep: 1 - ηλ."""
    b.mul_(momentum).add_(g)
    direction = sign(g.add(b, alpha=momentum) if nesterov else b)
    w.mul_(keep).addcmul_(direction, rate, value=-1)


def signum_foreach_(
    ws: list[Tensor],
    gs: list[Tensor],
    bs: list[Tensor],
    *,
    rate: Tensor,
    momentum: float,
    keep: float,
    nesterov: bool,
) -> None:
    """`signum_` on lists of tensors."""
    torch._foreach_mul_(bs, momentum)
    torch._foreach_add_(bs, gs)
    directions = signs(list(torch._foreach_add(gs, bs, alpha=momentum)) if nesterov else bs)
    torch._foreach_mul_(ws, keep)
    torch._foreach_mul_(directions, rate)
    torch._foreach_sub_(ws, directions)


class Signum(RuleOptimizer):
    """Sign descent with momentum. Every entry moves by η.

    lr: about AdamW's for models of 1e8 parameters, a fifth of it for 7e8, in the benchmark of Semenov et al. 2025
    (arXiv 2509.01440). momentum: μ, undampened, as torch's SGD has it. weight_decay: λ, decoupled. nesterov: looks
    ahead. Others: `RuleOptimizer`.

    One buffer a parameter. With the batch: √B below the noise scale (Li et al. 2024, arXiv 2405.14578). It gains more
    from a large batch than AdamW does, and loses more at a small one.

    Raises `InputError` for hyperparameters out of range, and for sparse or complex tensors by name.

    >>> w = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    >>> w.grad = torch.tensor([[1e-3, -1e3]])
    >>> Signum([w], lr=0.25).step()
    >>> w.detach()
    tensor([[ 0.7500, -1.7500]])
    """

    STATE = ("momentum_buffer",)
    BY_ELEMENT = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        state_dtype: StateDtype = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        options: dict[str, Any] = {"foreach": foreach, "fused": fused, "maximize": maximize}
        super().__init__(params, defaults, **options, differentiable=differentiable, state_dtype=state_dtype)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses what is out of range."""
        check_rate(lr=group["lr"], weight_decay=group["weight_decay"])
        if group["momentum"] != 0:
            check_inside(momentum=group["momentum"])
        elif group["nesterov"]:
            raise InputError("nesterov needs a momentum, got momentum=0")

    def forms(self, group: dict[str, Any]) -> tuple[Form, Form | None]:
        """The rule and its form for lists."""
        return signum_, signum_foreach_

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """Those of `signum_`."""
        numbers = {"rate": rate_of(group["lr"], leaf.w), "keep": 1 - group["lr"] * group["weight_decay"]}
        return numbers | {"momentum": group["momentum"], "nesterov": group["nesterov"]}
