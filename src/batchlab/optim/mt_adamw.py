"""MT-AdamW: AdamW for one task a step, each task's gradient of one length (Li et al. 2023, arXiv 2211.09808).

  g = ω_k·∇L_k/|∇L_k|                        |·| over all parameters together
  m ← β₁m + (1 - β₁)·g/s_k                   n ← β₂n + (1 - β₂)·g²/s_k
  θ ← θ - η·(m̂/(√n̂ + ε) + λθ)               m̂ = m/(1 - β₁ᵗ), n̂ = n/(1 - β₂ᵗ)

k is the task of the step, s_k its share of all steps. m and n have the means Σω_k·ghat_k and Σω_k²·ghat_k², whatever
s: s_k says how often a task comes, ω_k how much it counts. Note n takes g²/s_k, not (g/s_k)². The paper writes β for
the weight of the new term; here it is torch's, of the old. It prints neither decay nor the correction: both are
AdamW's, and the divisors 1 - βᵗ are right in the mean, for 1/s_k times the indicator of task k has the mean 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from batchlab.core.checks import check_positive, check_rate
from batchlab.core.errors import InputError
from batchlab.optim.leaf import Leaf, asks_for_state, check_not_in_zero, total_norm
from batchlab.optim.moments import bias_corrections, check_betas
from batchlab.optim.rule import Form, Numbers
from batchlab.optim.shell import RuleOptimizer
from batchlab.optim.state_dtype import StateDtype

Inactive = Literal["decay", "hold"]
RAREST = 1e-3  # below it one visit moves m by more than 100ω at β₁ = 0.9


def mt_adamw_(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    n: Tensor,
    *,
    scale: float,
    visits: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    c1: float,
    c2: float,
) -> None:
    """One step on one tensor. scale: ω/|g|. visits: 1/s_k. c1, c2: 1 - βᵗ, or 1 without bias correction."""
    h = g * scale
    m.mul_(beta1).add_(h * ((1 - beta1) * visits))
    n.mul_(beta2).add_(h.square_().mul_((1 - beta2) * visits))
    torch.sqrt(n, out=h)
    torch.div(m, h.div_(c2**0.5).add_(eps), out=h)
    w.mul_(1 - lr * weight_decay).sub_(h.mul_(lr / c1))


def mt_adamw_foreach_(
    ws: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    ns: list[Tensor],
    *,
    scale: float,
    visits: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    c1: float,
    c2: float,
) -> None:
    """`mt_adamw_` on lists of tensors."""
    hs = list(torch._foreach_mul(gs, scale))
    torch._foreach_mul_(ms, beta1)
    torch._foreach_add_(ms, list(torch._foreach_mul(hs, (1 - beta1) * visits)))
    torch._foreach_mul_(hs, hs)
    torch._foreach_mul_(hs, (1 - beta2) * visits)
    torch._foreach_mul_(ns, beta2)
    torch._foreach_add_(ns, hs)
    hs = list(torch._foreach_sqrt(ns))
    torch._foreach_div_(hs, c2**0.5)
    torch._foreach_add_(hs, eps)
    hs = list(torch._foreach_div(ms, hs))
    torch._foreach_mul_(hs, lr / c1)
    torch._foreach_mul_(ws, 1 - lr * weight_decay)
    torch._foreach_sub_(ws, hs)


class MTAdamW(RuleOptimizer):
    """AdamW for training on several tasks, one of them a step on all ranks.

        optimizer = MTAdamW(model.parameters(), lr=1e-3, ratios={"caption": 0.75, "retrieval": 0.25})
        for task, batch in unmixed_batches:
            losses[task](model, batch).backward()
            optimizer.step(task=task)
            optimizer.zero_grad()

    ratios: s_k of each task, its share of all steps; normalised, with a warning, where they do not sum to 1. weights:
    ω_k, 1 for all by default; a weight inside a task's loss cancels. lr, betas, eps, weight_decay (λ, decoupled): as
    torch.optim.AdamW has them; the paper's values are not known. inactive: what happens to a parameter that the task
    does not touch (its gradient is None): "decay" takes a gradient of 0, as the formula is written, so that m and n
    decay and the parameter moves on; "hold" leaves it and its state alone. cap: an upper limit of 1/s_k; a rare task's
    one visit adds (1 - β₁)ω/s_k to m. Others: `RuleOptimizer`.

    Gradients must be the mean over all ranks' batch of one task, accumulated and unscaled: a mean of gradients that
    were normalised before is another method. A global clip before the step does nothing. A step whose norm is 0 or not
    finite is not taken: `skipped` counts them by task (saved in `state_dict`, but not by torch.distributed.checkpoint),
    and the first that is not finite warns. Two buffers a parameter; one wait for the norm, one reduction where sharded.

    With "hold" the factor 1/s_k stays, so that a head of one task alone moves 1/√s_k as far at each of its visits.
    With the batch: each task has the global batch to itself, and η goes as Adam's. When not: at batches where a task
    no longer gains from more examples, a mixed batch gives each task more updates; or where losses are balanced by
    their scale on purpose, for the norm takes it away. With ε = 0 a coordinate that never had a gradient is 0/0.

    Raises `InputError` for a step without a task, an unknown one, ratios or weights that do not fit, hyperparameters
    out of range, and sparse or complex tensors by name.

    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = MTAdamW([w], lr=0.1, ratios={"a": 0.5, "b": 0.5}, betas=(0.0, 0.0))
    >>> w.grad = torch.tensor([3000.0, 4000.0])
    >>> optimizer.step(task="a")
    >>> w.detach()  # m = g/s and √n = |g|/√s: the step is η/√s
    tensor([-0.1414, -0.1414])
    """

    STATE = ("exp_avg", "exp_avg_sq")
    SQUARES = ("exp_avg_sq",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        ratios: Mapping[str, float] | None = None,
        weights: Mapping[str, float] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        inactive: Inactive = "decay",
        cap: float | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        state_dtype: StateDtype = None,
    ) -> None:
        check_not_in_zero("MTAdamW's norm of a gradient")
        self.ratios = _ratios(ratios)
        self.weights = _weights(weights, self.ratios)
        if inactive not in ("decay", "hold"):
            raise InputError(f'inactive must be "decay" or "hold", got {inactive!r}')
        if cap is not None:
            check_positive(cap=cap)
        self.inactive, self.cap = inactive, cap
        self.skipped = dict.fromkeys(self.ratios, 0)
        self._task: str | None = None
        self._scale = 0.0
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options: dict[str, Any] = {"foreach": foreach, "fused": fused, "maximize": maximize}
        options |= {"differentiable": differentiable, "state_dtype": state_dtype}
        super().__init__(params, defaults | {"bias_correction": bias_correction}, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses what is out of range."""
        check_rate(**{name: group[name] for name in ("lr", "weight_decay", "eps")})
        check_betas(group["betas"])

    def step(self, closure: Callable[[], Any] | None = None, *, task: str | None = None) -> Any:
        """One update from the gradient of `task`; returns the closure's loss.

        torch.distributed.checkpoint asks for the state of an optimizer that has none by a step of zero gradients at a
        rate of 0, without a task: that makes the state, and takes no step.
        """
        if task is None and not (closure is None and asks_for_state(self)):
            raise InputError(
                f"step needs the task that the gradient is of, as in step(task={next(iter(self.ratios))!r})"
            )
        if task is not None and task not in self.ratios:
            raise InputError(f"task must be one of {list(self.ratios)}, got {task!r}")
        self._task = task
        return super().step(closure)

    def gradient_of(self, parameter: Tensor) -> Tensor | None:
        """Zeros for a trained parameter that the task does not touch, unless it is held."""
        if parameter.grad is None and self.inactive == "decay" and parameter.requires_grad:
            return torch.zeros_like(parameter)
        return parameter.grad

    def before(self, leaves: Sequence[tuple[dict[str, Any], list[Leaf]]]) -> bool | None:
        """Takes the norm; a step of no length, or of one that is not finite, is not taken."""
        norm = float(total_norm([leaf for _, each in leaves for leaf in each]))
        if self._task is None:
            return False
        if norm == 0 or not math.isfinite(norm):
            self._skip(self._task, norm)
            return False
        self._scale = self.weights[self._task] / norm
        return None

    def _skip(self, task: str, norm: float) -> None:
        self.skipped[task] += 1
        if norm and self.skipped[task] == 1:
            warnings.warn(f"the gradient of task {task!r} has the norm {norm}: such steps are skipped", stacklevel=7)

    def forms(self, group: dict[str, Any]) -> tuple[Form, Form | None]:
        """The rule and its form for lists."""
        return mt_adamw_, mt_adamw_foreach_

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """Those of `mt_adamw_`."""
        visits = 1 / self.ratios[str(self._task)]
        c1, c2 = bias_corrections(group["betas"], leaf.t) if group["bias_correction"] else (1.0, 1.0)
        numbers = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        numbers |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "c1": c1, "c2": c2}
        numbers |= {"scale": self._scale, "visits": visits if self.cap is None else min(visits, self.cap)}
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and the `skipped` steps by task."""
        return super().state_dict() | {"skipped": dict(self.skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave; without `skipped`, as from torch.optim.AdamW, the counts stay."""
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "skipped"})
        self.skipped |= {task: int(n) for task, n in state_dict.get("skipped", {}).items() if task in self.skipped}

    def __getstate__(self) -> dict[str, Any]:
        kept = ("ratios", "weights", "inactive", "cap", "skipped", "_task", "_scale")
        return super().__getstate__() | {name: self.__dict__[name] for name in kept}


def _ratios(ratios: Mapping[str, float] | None) -> dict[str, float]:
    if not ratios or not isinstance(ratios, Mapping):
        raise InputError('ratios must give each task\'s share of the steps, as {"caption": 0.75, "retrieval": 0.25}')
    for task, share in ratios.items():
        check_positive(**{f"ratios[{task!r}]": share})
    total = math.fsum(ratios.values())
    found = {task: float(share) for task, share in ratios.items()}
    if not math.isclose(total, 1.0, rel_tol=1e-6):
        found = {task: share / total for task, share in found.items()}
        warnings.warn(f"ratios sum to {total:g}, not 1: they were divided by it", stacklevel=3)
    for task, share in found.items():
        if share < RAREST:
            message = f"ratios[{task!r}] is {share:g}: each of its steps enters with {1 / share:.3g} times its weight"
            warnings.warn(f"{message}; cap limits that", stacklevel=3)
    return found


def _weights(weights: Mapping[str, float] | None, ratios: Mapping[str, float]) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(ratios, 1.0)
    if weights.keys() != ratios.keys():
        raise InputError(f"weights must name the tasks of ratios, {list(ratios)}, got {list(weights)}")
    for task, weight in weights.items():
        check_positive(**{f"weights[{task!r}]": weight})
    return {task: float(weight) for task, weight in weights.items()}
