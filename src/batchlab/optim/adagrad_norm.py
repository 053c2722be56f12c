"""AdaGrad-Norm: one learning rate for all parameters, divided by the norm of all gradients so far (Ward et al. 2019).

arXiv 1806.01811; the optimizer of AdAdaGrad's theory (Lau, Liu and Kolar 2024, arXiv 2402.11215):

    b² ← b² + |g|²        |.| over all parameters together; b = b₀ at first
    x ← x - η·g/b         the new b
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchlab.core.checks import check_positive, check_rate
from batchlab.core.errors import InputError
from batchlab.optim.leaf import Leaf, check_not_in_zero
from batchlab.optim.rule import Form, Numbers, Sum
from batchlab.optim.shell import RuleOptimizer
from batchlab.parallel.sums import sums_over


def adagrad_norm_(x: Tensor, g: Tensor, *, lr: float, b: Tensor, weight_decay: float) -> None:
    """x ← (1 - ηλ)x - η·g/b, b with this step's gradients in it."""
    x.mul_(1 - lr * weight_decay)
    x.sub_(g * (lr / b))


def adagrad_norm_foreach_(xs: list[Tensor], gs: list[Tensor], *, lr: float, b: Tensor, weight_decay: float) -> None:
    """`adagrad_norm_` on lists of tensors."""
    torch._foreach_mul_(xs, 1 - lr * weight_decay)
    torch._foreach_sub_(xs, list(torch._foreach_mul(gs, (lr / b).to(gs[0].dtype))))


class AdaGradNorm(RuleOptimizer):
    """SGD whose rate is η/b, b² growing by |g|² of all parameters together at every step.

    lr: η, in the unit of x; the first steps are up to η long, so it is a distance, and needs no 1/L. It converges for
    any η and b₀ (the theorem of the paper), at a price where η is far from the right distance. b0: b₀ > 0, a gradient's
    norm; larger than the gradients it gives SGD at η/b₀ at first. One for all groups. 0.1 is that of the code released
    with AdAdaGrad, whose sum of squares starts at 0.01. weight_decay: λ, decoupled as in AdamW, x ← (1 - ηλ)x; 0 is the
    published method. Others: `RuleOptimizer`.

    The rate never rises again: not for long runs whose gradients were large early on, nor for models whose layers need
    rates of their own (LAMB, Adam). g must be the mean over the batch. By the batch: |g|² falls with the batch down to
    the square of the true gradient, so b grows by less per step with a larger batch and η needs no scaling of its own.

    Not what the code released with AdAdaGrad does: that divides each row of a matrix by that row's own norm, each bias
    by one that depends on the tensor before it, and its weight decay adds the gradient in place of the weights.

    State: one number, "sum_sq" = b² in float64, in `param_groups`, and a count a parameter. Under FSDP2 and tensor
    parallelism the norm is of whole tensors: one all-reduce of one number a tensor. Refused within torch's
    `ZeroRedundancyOptimizer`, which gives each rank some of the tensors; so is `LAMB(max_grad_norm=...)`.

    Raises `InputError` for hyperparameters out of range, and by name for sparse or complex tensors and for gradients
    that are not finite, which is looked at in every step and waits for the device.

    >>> x, y = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    >>> x.grad, y.grad = torch.tensor([3.0]), torch.tensor([4.0])
    >>> optimizer = AdaGradNorm([x, y], lr=1.0, b0=12.0)
    >>> optimizer.step()
    >>> optimizer.b, x.item()  # √(12² + 5²), -3/13
    (13.0, -0.23076924681663513)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        b0: float = 0.1,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_positive(b0=b0)
        check_not_in_zero("AdaGradNorm's b")
        defaults = {"lr": lr, "b0": b0, "weight_decay": weight_decay, "sum_sq": None}
        options: dict[str, Any] = {"foreach": foreach, "fused": fused, "maximize": maximize}
        super().__init__(params, defaults, **options, differentiable=differentiable)

    @property
    def b(self) -> float:
        """√(b₀² + Σ|g|²) over all steps so far."""
        return math.sqrt(self._sum_sq())

    def _sum_sq(self) -> float | Tensor:
        held = [group["sum_sq"] for group in self.param_groups if group["sum_sq"] is not None]
        return held[0] if held else float(self.param_groups[0]["b0"]) ** 2

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses what is out of range."""
        check_rate(**{name: group[name] for name in ("lr", "weight_decay")})
        first = self.param_groups[0]["b0"]
        if group["b0"] != first:
            raise InputError(
                f"b0 must be one for all groups, {first!r}, got {group['b0']!r}: b is the norm of all "
                "parameters together"
            )

    def before(self, leaves: Sequence[tuple[dict[str, Any], list[Leaf]]]) -> None:
        """b² ← b² + |g|²."""
        every = [leaf for _, each in leaves for leaf in each]
        if not every:
            return
        sums = sums_over([Sum(_square(leaf.g)) for leaf in every], [leaf.layout for leaf in every])
        device = sums[0].device
        before = torch.as_tensor(self._sum_sq(), dtype=sums[0].dtype, device=device)
        total = before + torch.stack([each.to(device) for each in sums]).sum()
        if not total.isfinite():
            bad = next((leaf.name for leaf, each in zip(every, sums, strict=True) if not each.isfinite()), "all")
            self.uncount(leaves)
            raise InputError(
                f"the gradient of {bad} must be finite, and so must b: what joins it stays for good. Skip such steps, "
                "as torch.amp.GradScaler does; nothing has moved"
            )
        for group in self.param_groups:
            group["sum_sq"] = total
        b = total.sqrt()
        self._b = {place: b.to(place) for place in {leaf.w.device for leaf in every}}

    def forms(self, group: dict[str, Any]) -> tuple[Form, Form | None]:
        """The rule and its form for lists."""
        return adagrad_norm_, adagrad_norm_foreach_

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """Those of `adagrad_norm_`."""
        lr = group["lr"] if isinstance(group["lr"], Tensor) else float(group["lr"])
        return {"lr": lr, "weight_decay": group["weight_decay"], "b": self._b[leaf.w.device]}


def _square(g: Tensor) -> Tensor:
    """|g|² in float64, in which no float32 gradient's square overflows; in float32 where the device has no other."""
    dtype = torch.float32 if g.device.type == "mps" else torch.float64
    norm: Tensor = torch.linalg.vector_norm(g, dtype=dtype)
    return norm.square()
