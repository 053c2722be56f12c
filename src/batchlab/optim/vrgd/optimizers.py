"""VR-SGD, VR-Adam, VR-LARS and VR-LAMB: optimizers that take r·gbar for their gradient (arXiv 2309.13681; see `vrgd`).

  VR-SGD, VR-LARS    the base's step with r·gbar
  VR-Adam, VR-LAMB   p ← β₃p + (1 - β₃)r, ghat = p/(1 - β₃ᵗ)·gbar; the base's moments and step with ghat

Decay is the base's own, untouched by r. The listings of VR-Adam and VR-LAMB could not be read: that p is corrected for
its start, and that v is of ghat, follow from the text. A p that varies slowly then cancels between m and √v; with
`second_moment="raw"` v is of gbar, and p shortens the step.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.core.checks import check_rate
from batchlab.core.errors import InputError
from batchlab.optim.in_groups import InGroups
from batchlab.optim.lamb import LAMB, lamb_, lamb_foreach_
from batchlab.optim.lars import LARS
from batchlab.optim.leaf import Leaf, names_of
from batchlab.optim.moments import adam_numbers, check_betas
from batchlab.optim.rule import Form, Numbers, Rule, weights_of_lerp
from batchlab.optim.shell import RuleOptimizer

SecondMoment = Literal["scaled", "raw"]
SECOND_MOMENTS = ("scaled", "raw")


class VRSGD(InGroups, torch.optim.SGD):
    """torch.optim.SGD on r·gbar.

        optimizer = VRSGD(model.parameters(), lr=0.1)
        for x, y in micro_batches:                                    # 8 or more
            (loss_mean(x, y) * len(x) / batch_size).backward()
            optimizer.add_group(examples=len(x))
        optimizer.step()
        optimizer.zero_grad()

    Under a `GradScaler` call `finish()` before `scaler.step(optimizer)`: that looks for the gradient in `.grad`.
    groups, gamma, cap, process_group: of `VRGradient`; the others torch's, but that `differentiable` is refused. No
    state beyond torch's; two float32 sums a parameter while groups are added. With the batch: the paper's rates mostly
    went with its square root, and stay to be tuned, for r shortens the step.

    Raises `InputError` for a step without two groups, hyperparameters out of range, sparse or complex tensors by name.

    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = VRSGD([w], lr=1.0)
    >>> for g in ([2.0, 2.0], [0.0, 2.0]):
    ...     w.grad = torch.tensor(g) / 2
    ...     optimizer.add_group()
    >>> optimizer.step()
    >>> w.detach()
    tensor([-1., -2.])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        groups: int | None = None,
        gamma: float = 0.1,
        cap: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        if differentiable:
            raise InputError("VRSGD cannot be differentiated through: differentiable must be False")
        check_rate(**{"lr": cast(Any, lr), "momentum": momentum, "weight_decay": weight_decay})
        self._own = {"gamma": gamma, "cap": cap}
        numbers: dict[str, Any] = {"lr": lr, "momentum": momentum, "dampening": dampening}
        options: dict[str, Any] = {"maximize": maximize, "foreach": foreach, "fused": fused}
        super().__init__(params, **numbers, weight_decay=weight_decay, nesterov=nesterov, **options)
        self._start(groups, process_group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; complex parameters and hyperparameters out of range are refused, by name."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_rate(**{name: group[name] for name in ("lr", "momentum", "weight_decay")})
            first = sum(len(each["params"]) for each in self.param_groups[:-1])
            for name, parameter in zip(names_of(group, first), group["params"], strict=True):
                if not parameter.is_floating_point():
                    raise InputError(f"VRSGD takes real parameters, got {name} of {parameter.dtype}")
        except InputError:
            self.param_groups.pop()
            raise


class VRLARS(InGroups, LARS):
    """LARS on r·gbar, its norms too.

    groups, gamma, cap, process_group: of `VRGradient`; the others of `LARS`. Driven as `VRSGD` is. One buffer a
    parameter, LARS's own. The paper's ImageNet runs to batch 96K are of this one.

    >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> optimizer = VRLARS([w], lr=1.0, momentum=0.0, weight_decay=0.0, trust=0.1)
    >>> for g in ([2.0, 0.0], [2.0, 0.0]):
    ...     w.grad = torch.tensor([g]) / 2
    ...     optimizer.add_group()
    >>> optimizer.step()
    >>> w.detach()
    tensor([[2.5000, 4.0000]])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        trust: float = 1e-3,
        *,
        groups: int | None = None,
        gamma: float = 0.1,
        cap: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        self._own = {"gamma": gamma, "cap": cap}
        super().__init__(params, lr, momentum, weight_decay, trust, **options)
        self._start(groups, process_group)


@weights_of_lerp("share1")
def vr_lamb_(w: Tensor, g: Tensor, p: Tensor, b: Tensor, m: Tensor, v: Tensor, *, raw: bool, **numbers: Any) -> Rule:
    """`lamb_` with g = ghat. p, b: of which ghat = (p/b)·gbar. raw: v of gbar, whose part is then done here."""
    if raw:
        h = (g * b).div_(p)
        v.mul_(numbers["keep2"]).addcmul_(h, h, value=numbers["share2"])
        numbers |= {"keep2": 1.0, "share2": 0.0}
    return lamb_(w, g, m, v, **numbers)


def vr_lamb_foreach_(
    ws: list[Tensor],
    gs: list[Tensor],
    ps: list[Tensor],
    bs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    *,
    raw: bool,
    **numbers: Any,
) -> Rule:
    """`vr_lamb_` on lists of tensors."""
    if raw:
        hs = list(torch._foreach_mul(gs, bs))
        torch._foreach_div_(hs, ps)
        torch._foreach_mul_(vs, numbers["keep2"])
        torch._foreach_addcmul_(vs, hs, hs, numbers["share2"])
        numbers |= {"keep2": 1.0, "share2": 0.0}
    return lamb_foreach_(ws, gs, ms, vs, **numbers)


class _Smoothed(InGroups, RuleOptimizer):
    """Those with a momentum of r."""

    STATE: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "multiplier_avg")
    SQUARES: ClassVar[tuple[str, ...]] = ("exp_avg_sq", "multiplier_avg")
    C_KERNELS: ClassVar[bool] = False

    def new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Zeros, and the sum of the weights of r's momentum."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        weight = torch.zeros((), dtype=dtype, device=parameter.device)
        return super().new_state(parameter, group) | {"multiplier_weight": weight}

    def forms(self, group: dict[str, Any]) -> tuple[Form, Form | None]:
        """The rule and its form for lists."""
        return vr_lamb_, vr_lamb_foreach_

    def tensors(self, leaf: Leaf, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """Those of `vr_lamb_`."""
        names = ("multiplier_avg", "multiplier_weight", "exp_avg", "exp_avg_sq")
        return (leaf.w, leaf.g, *[leaf.state[name] for name in names])

    def _make_state(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state_of(parameter, group)


class VRAdam(_Smoothed):
    """AdamW on r·gbar, with a momentum of r; without decay it is Adam.

    lr, betas, eps, weight_decay (decoupled), bias_correction: as torch.optim.AdamW has them, but for no decay by
    default. beta3: β₃, the paper's. second_moment: "scaled" (v of r·gbar) or "raw" (v of gbar); see the module. groups,
    gamma, cap, process_group: of `VRGradient`. Others: `RuleOptimizer`. Driven as `VRSGD` is, with three buffers a
    parameter.

    With the batch: √B for the rate, as for Adam. With "scaled" a steady r leaves no trace in the step but for ε.

    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = VRAdam([w], lr=0.5)
    >>> for g in ([2.0, 2.0], [0.0, 2.0]):
    ...     w.grad = torch.tensor(g) / 2
    ...     optimizer.add_group()
    >>> optimizer.step()
    >>> w.detach()
    tensor([-0.5000, -0.5000])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        beta3: float = 0.9,
        second_moment: SecondMoment = "scaled",
        bias_correction: bool = True,
        groups: int | None = None,
        gamma: float = 0.1,
        cap: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        self._own = {"gamma": gamma, "cap": cap, "beta3": beta3, "second_moment": second_moment}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"bias_correction": bias_correction}, **options)
        self._start(groups, process_group)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses what is out of range."""
        check_rate(**{name: group[name] for name in ("lr", "weight_decay", "eps")})
        check_betas(group["betas"])
        _check_second_moment(group)

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """Those of `vr_lamb_`, with a ratio of 1."""
        given = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "bias_correction")}
        numbers = adam_numbers(leaf.w, **given, t=leaf.t)
        return numbers | {"clamp": None, "max_ratio": None, "adapt": False, "raw": group["second_moment"] == "raw"}


class VRLAMB(_Smoothed, LAMB):  # type: ignore[misc]  # LAMB's STATE is typed by its length
    """LAMB on r·gbar, with a momentum of r: VR-Adam, followed by LAMB's rate for each tensor.

    beta3: β₃, the paper's. second_moment: "scaled" (v of r·gbar) or "raw" (v of gbar); see the module. groups, gamma,
    cap, process_group: of `VRGradient`; the others of `LAMB`. Driven as `VRSGD` is. Three buffers a parameter. The
    paper's BERT runs to batch 128K are of this one. `max_grad_norm` clips after r.

    >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> optimizer = VRLAMB([w], lr=0.1)
    >>> for g in ([2.0, 0.0], [2.0, 0.0]):
    ...     w.grad = torch.tensor([g]) / 2
    ...     optimizer.add_group()
    >>> optimizer.step()
    >>> w.detach()
    tensor([[2.5000, 4.0000]])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        beta3: float = 0.9,
        second_moment: SecondMoment = "scaled",
        groups: int | None = None,
        gamma: float = 0.1,
        cap: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        self._own = {"gamma": gamma, "cap": cap, "beta3": beta3, "second_moment": second_moment}
        LAMB.__init__(self, params, lr, betas, eps, weight_decay, **options)
        self._start(groups, process_group)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses what is out of range."""
        super().check_group(group)
        _check_second_moment(group)

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """Those of `vr_lamb_`."""
        return super().numbers(leaf, group) | {"raw": group["second_moment"] == "raw"}


def _check_second_moment(group: dict[str, Any]) -> None:
    if group["second_moment"] not in SECOND_MOMENTS:
        raise InputError(f'second_moment must be "scaled" or "raw", got {group["second_moment"]!r}')
