"""Lion: steps by the sign of two mixtures of one momentum (Chen et al. 2023, arXiv 2302.06675).

  w ← w - ηλw - η·sign(β₁m + (1 - β₁)g)        m ← β₂m + (1 - β₂)g

η lr, λ weight_decay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchlab.core.checks import check_rate
from batchlab.optim.leaf import Leaf
from batchlab.optim.moments import check_betas, rate_of
from batchlab.optim.rule import Form, Numbers, weights_of_lerp
from batchlab.optim.shell import RuleOptimizer
from batchlab.optim.signs import sign, signs
from batchlab.optim.state_dtype import StateDtype


@weights_of_lerp("share1", "share2")
def lion_(
    w: Tensor, g: Tensor, m: Tensor, *, rate: Tensor, share1: float | Tensor, share2: float | Tensor, keep: float
) -> None:
    """One step on one tensor. rate: η. share1, share2: 1 - β. keep: 1 - ηλ."""
    direction = sign(m.lerp(g, share1))
    m.lerp_(g, share2)
    w.mul_(keep).addcmul_(direction, rate, value=-1)


def lion_foreach_(
    ws: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    *,
    rate: Tensor,
    share1: float,
    share2: float,
    keep: float,
) -> None:
    """`lion_` on lists of tensors."""
    directions = signs(list(torch._foreach_lerp(ms, gs, share1)))
    torch._foreach_lerp_(ms, gs, share2)
    torch._foreach_mul_(ws, keep)
    torch._foreach_mul_(directions, rate)
    torch._foreach_sub_(ws, directions)


class Lion(RuleOptimizer):
    """Sign descent with a momentum that is mixed anew for the step. Every entry moves by η.

    lr: a third to a tenth of AdamW's, says the paper. betas: its own. weight_decay: λ, decoupled, three to ten times
    AdamW's so that ηλ stays. Others: `RuleOptimizer`.

    One buffer a parameter. With the batch: √B, as for all sign-like steps, below the noise scale; the paper finds its
    lead over AdamW at batches of 1,024 and more. Not for small batches: the sign of a noisy gradient is mostly noise.

    Raises `InputError` for hyperparameters out of range, and for sparse or complex tensors by name.

    >>> w = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    >>> w.grad = torch.tensor([[1e-3, -1e3]])
    >>> Lion([w], lr=0.25).step()
    >>> w.detach()
    tensor([[ 0.7500, -1.7500]])
    """

    STATE = ("exp_avg",)
    BY_ELEMENT = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        state_dtype: StateDtype = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        options: dict[str, Any] = {"foreach": foreach, "fused": fused, "maximize": maximize}
        super().__init__(params, defaults, **options, differentiable=differentiable, state_dtype=state_dtype)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses what is out of range."""
        check_rate(lr=group["lr"], weight_decay=group["weight_decay"])
        check_betas(group["betas"])

    def forms(self, group: dict[str, Any]) -> tuple[Form, Form | None]:
        """The rule and its form for lists."""
        return lion_, lion_foreach_

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """Those of `lion_`."""
        beta1, beta2 = group["betas"]
        numbers = {"rate": rate_of(group["lr"], leaf.w), "share1": 1 - beta1, "share2": 1 - beta2}
        numbers["keep"] = 1 - group["lr"] * group["weight_decay"]
        return numbers
