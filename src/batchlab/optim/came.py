"""CAME: Adafactor's factored squares, and steps that trust a momentum which agrees with itself (Luo et al. 2023).

For a tensor [..., n, m] (arXiv 2307.02047), with means ⟨·⟩ᵣ along the last axis and ⟨·⟩꜀ along the one before it:

  R ← β₂R + (1 - β₂)⟨G² + ε₁⟩ᵣ      C ← β₂C + (1 - β₂)⟨G² + ε₁⟩꜀      V = R·Cᵀ/⟨R⟩
  U = G/√V, divided by max(1, RMS(U)/d)                               RMS over the whole tensor
  M ← β₁M + (1 - β₁)U
  R' ← β₃R' + (1 - β₃)⟨(U - M)² + ε₂⟩ᵣ, C' likewise, with the new M    S = R'·C'ᵀ/⟨R'⟩
  W ← W - η(M/√S + λW)

Tensors of one dimension keep a full V and step by M. Nothing corrects for the averages' start from zero: see `CAME`.
The paper's sums instead of means give the same V and S. came-pytorch 0.1.3 is met within 3e-15 in float64, 200 steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchlab.core.checks import check_inside, check_positive, check_rate
from batchlab.core.errors import InputError
from batchlab.optim.leaf import Leaf
from batchlab.optim.moments import check_betas
from batchlab.optim.rule import Form, Numbers, Rule, Sum
from batchlab.optim.shell import RuleOptimizer
from batchlab.optim.state_dtype import StateDtype, state_like
from batchlab.parallel.margins import margin_like

_SQUARES = ("exp_avg_sq_row", "exp_avg_sq_col")
_RESIDUES = ("exp_avg_res_row", "exp_avg_res_col")


def came_(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    r: Tensor,
    c: Tensor,
    *residues: Tensor,
    lr: float,
    betas: tuple[float, float, float],
    eps: tuple[float, float],
    clip: float,
    weight_decay: float,
    shape: Sequence[int],
) -> Rule:
    """One step on one tensor of two or more dimensions. residues: R' and C', or none for steps by M alone."""
    u = g.square()
    sums = yield Sum(u.sum(-1), over=(len(shape) - 1,))
    _average_(r, sums, shape[-1], betas[1], eps[0])
    sums = yield Sum(u.sum(-2), over=(len(shape) - 2,))
    _average_(c, sums, shape[-2], betas[1], eps[0])
    sums = yield Sum(r.sum(-1, keepdim=True), over=(len(shape) - 2,))
    rho = r * (max(shape[-2], 1) / sums)
    u_sq = yield Sum((u @ c.reciprocal().unsqueeze(-1)).squeeze(-1).div_(rho).sum())
    shrunk = _shrunk(u_sq, shape, clip)
    torch.mul(g, (rho.rsqrt() / shrunk).unsqueeze(-1), out=u).mul_(c.rsqrt().unsqueeze(-2))
    m.lerp_(u, 1 - betas[0])
    if weight_decay != 0:
        w.mul_(1 - lr * weight_decay)
    if residues:
        rq, cq = residues
        u.sub_(m).square_()
        sums = yield Sum(u.sum(-1), over=(len(shape) - 1,))
        _average_(rq, sums, shape[-1], betas[2], eps[1])
        sums = yield Sum(u.sum(-2), over=(len(shape) - 2,))
        _average_(cq, sums, shape[-2], betas[2], eps[1])
        sums = yield Sum(rq.sum(-1, keepdim=True), over=(len(shape) - 2,))
        rho = rq * (max(shape[-2], 1) / sums)
        w.addcmul_(m, torch.mul(rho.rsqrt().unsqueeze(-1), (cq.rsqrt() * -lr).unsqueeze(-2), out=u))
    else:
        w.sub_(torch.mul(m, lr, out=u))
    return {"clip_ratio": 1 / shrunk}


def came_vector_(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: float,
    betas: tuple[float, float, float],
    eps: tuple[float, float],
    clip: float,
    weight_decay: float,
    shape: Sequence[int],
) -> Rule:
    """One step on one tensor of at most one dimension."""
    v.lerp_(g.square().add_(eps[0]), 1 - betas[1])
    u = v.rsqrt().mul_(g)
    u_sq = yield Sum(u.square().sum())
    shrunk = _shrunk(u_sq, shape, clip)
    m.lerp_(u.div_(shrunk), 1 - betas[0])
    if weight_decay != 0:
        w.mul_(1 - lr * weight_decay)
    w.sub_(m * lr)
    return {"clip_ratio": 1 / shrunk}


def came_foreach_(
    ws: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    rs: list[Tensor],
    cs: list[Tensor],
    *residues: list[Tensor],
    lr: float,
    betas: tuple[float, float, float],
    eps: tuple[float, float],
    clip: float,
    weight_decay: float,
    shape: Sequence[int],
) -> Rule:
    """`came_` on tensors of one shape, stacked: two copies of all of them."""
    g, r, c = torch.stack(gs), torch.stack(rs), torch.stack(cs)
    u = g.square()
    sums = yield Sum(u.sum(-1), over=(len(shape) - 1,))
    _average_(r, sums, shape[-1], betas[1], eps[0])
    sums = yield Sum(u.sum(-2), over=(len(shape) - 2,))
    _average_(c, sums, shape[-2], betas[1], eps[0])
    sums = yield Sum(r.sum(-1, keepdim=True), over=(len(shape) - 2,))
    rho = r * (max(shape[-2], 1) / sums)
    part = (u @ c.reciprocal().unsqueeze(-1)).squeeze(-1).div_(rho)
    u_sq = yield Sum(part.flatten(1).sum(1))
    shrunk = _shrunk(u_sq, shape, clip)
    torch.mul(g, (rho.rsqrt() / _per_tensor(shrunk, rho)).unsqueeze(-1), out=u).mul_(c.rsqrt().unsqueeze(-2))
    us = list(u.unbind())
    torch._foreach_lerp_(ms, us, 1 - betas[0])
    if weight_decay != 0:
        torch._foreach_mul_(ws, 1 - lr * weight_decay)
    if residues:
        rq, cq = map(torch.stack, residues)
        torch._foreach_sub_(us, ms)
        u.square_()
        sums = yield Sum(u.sum(-1), over=(len(shape) - 1,))
        _average_(rq, sums, shape[-1], betas[2], eps[1])
        sums = yield Sum(u.sum(-2), over=(len(shape) - 2,))
        _average_(cq, sums, shape[-2], betas[2], eps[1])
        sums = yield Sum(rq.sum(-1, keepdim=True), over=(len(shape) - 2,))
        rho = rq * (max(shape[-2], 1) / sums)
        torch.mul(rho.rsqrt().unsqueeze(-1), (cq.rsqrt() * -lr).unsqueeze(-2), out=u)
        torch._foreach_addcmul_(ws, ms, us)
        torch._foreach_copy_([*residues[0], *residues[1]], [*rq.unbind(), *cq.unbind()])
    else:
        torch._foreach_sub_(ws, list(torch._foreach_mul(ms, lr)))
    torch._foreach_copy_([*rs, *cs], [*r.unbind(), *c.unbind()])
    return {"clip_ratio": 1 / shrunk}


def came_vector_foreach_(
    ws: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float, float],
    eps: tuple[float, float],
    clip: float,
    weight_decay: float,
    shape: Sequence[int],
) -> Rule:
    """`came_vector_` on tensors of one shape."""
    g, v = torch.stack(gs), torch.stack(vs)
    v.lerp_(g.square().add_(eps[0]), 1 - betas[1])
    u = v.rsqrt().mul_(g)
    u_sq = yield Sum(u.square().view(len(gs), -1).sum(1))
    shrunk = _shrunk(u_sq, shape, clip)
    torch._foreach_lerp_(ms, list(u.div_(_per_tensor(shrunk, u)).unbind()), 1 - betas[0])
    if weight_decay != 0:
        torch._foreach_mul_(ws, 1 - lr * weight_decay)
    torch._foreach_sub_(ws, list(torch._foreach_mul(ms, lr)))
    torch._foreach_copy_(vs, list(v.unbind()))
    return {"clip_ratio": 1 / shrunk}


def first_step_rms(betas: Sequence[float] = (0.9, 0.999, 0.9999)) -> float:
    """(1 - β₁)/(β₁·√(1 - β₃)): the RMS of CAME's first step in units of lr, for a gradient of one size everywhere.

    Measured with these betas: 11.11, 10.56, 10.05, 9.58 and 9.16 for fresh Gaussian gradients, as came-pytorch 0.1.3;
    a gradient that does not change raises it to 34 in 10 steps and 50 in 100. So warm up.

    >>> round(first_step_rms(), 2)
    11.11
    """
    check_betas(betas, 3)
    check_positive(beta1=betas[0])
    return (1 - betas[0]) / (betas[0] * math.sqrt(1 - betas[2]))


class CAME(RuleOptimizer):
    """Adam-like steps with a state of one number a weight, and two numbers more for each row and column.

    lr: η, 0.5 to 0.9 of AdamW's, say the authors. betas: (β₁, β₂, β₃): β₁ and β₂ as AdamW's, β₃ > β₂; 0.9995 to 0.99995
    with (0.9, 0.999), 0.99 to 0.999 with (0.9, 0.95). eps: (ε₁, ε₂). clip: d. weight_decay: λ, decoupled, on every
    tensor of a group. confidence: false steps by M, which is Adafactor with momentum. Others: `RuleOptimizer`.

    Warm up: nothing corrects the averages' start, and the first steps have an RMS of 11 lr (`first_step_rms`). Factored
    over the last two dimensions, so over the kernel of a convolution, where it saves next to nothing; a stack of
    matrices has one clip. The factored averages stay in float32 whatever state_dtype; only M follows it. On GPUs TF32
    products, where they are allowed, round the clip to a thousandth.
    With the batch: as AdamW; the paper trained BERT with it at batch 32,768, for the memory that it leaves to the
    batch. Not where AdamW's state fits easily and speed counts, nor without a warm-up, nor for runs much shorter than
    1/(1 - β₃): after 300 updates it was 0.46 nats behind AdamW (`benchmarks/came_against_adamw.py`).

    Raises `InputError` for hyperparameters out of range, and for sparse or complex tensors by name; warns of β₃ ≤ β₂.

    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> w.grad = torch.tensor([[2.0, -2.0], [2.0, 2.0]])
    >>> CAME([w], lr=1e-3).step()
    >>> w.detach()  # the first step: 11.11 lr
    tensor([[-0.0111,  0.0111],
            [-0.0111, -0.0111]])
    """

    STATE = ("exp_avg", *_SQUARES, *_RESIDUES, "exp_avg_sq")
    SQUARES = (*_SQUARES, *_RESIDUES, "exp_avg_sq")
    FLAT = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip: float = 1.0,
        weight_decay: float = 0.0,
        *,
        confidence: bool = True,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        state_dtype: StateDtype = None,
    ) -> None:
        defaults: Numbers = {"lr": lr, "betas": betas, "eps": eps, "clip": clip, "weight_decay": weight_decay}
        defaults["confidence"] = confidence
        options: dict[str, Any] = {"foreach": foreach, "fused": fused, "maximize": maximize}
        super().__init__(params, defaults, **options, differentiable=differentiable, state_dtype=state_dtype)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses what is out of range; warns where the instability is averaged over fewer steps than the squares."""
        check_positive(clip=group["clip"])
        check_rate(lr=group["lr"], weight_decay=group["weight_decay"])
        check_betas(group["betas"], 3)
        if not isinstance(group["eps"], Sequence) or len(group["eps"]) != 2:
            raise InputError(f"eps must be two numbers > 0, for squares and for residues, got {group['eps']!r}")
        check_positive(eps1=group["eps"][0], eps2=group["eps"][1])
        check_inside(**{f"beta{i + 1}": beta for i, beta in enumerate(group["betas"]) if i})
        if group["confidence"] and group["betas"][2] <= group["betas"][1]:
            warnings.warn(f"CAME wants betas[2] above betas[1], got {tuple(group['betas'])}", stacklevel=2)

    def new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """M, and rows and columns of the two squares; a full square for a vector."""
        state = {"exp_avg": state_like(parameter, group["state_dtype"], squares=False)}
        if parameter.ndim < 2:
            return state | {"exp_avg_sq": state_like(parameter, None, squares=True)}
        for row, col in (_SQUARES, _RESIDUES) if group["confidence"] else (_SQUARES,):
            state |= {row: margin_like(parameter, -1), col: margin_like(parameter, -2)}
        return state

    def state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """As for all; the residues too where `confidence` was set later."""
        state = super().state_of(parameter, group)
        if group["confidence"] and parameter.ndim > 1 and _RESIDUES[0] not in state:
            state |= {name: margin_like(parameter, -1 - at) for at, name in enumerate(_RESIDUES)}
        return state

    def forms(self, group: dict[str, Any]) -> tuple[Form, Form | None]:
        """The rules and their forms for lists."""
        return _either, _either_foreach

    def tensors(self, leaf: Leaf, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """Those of `came_` or `came_vector_`."""
        left_out = () if group["confidence"] else _RESIDUES
        names = [name for name in self.STATE if name in leaf.state and name not in left_out]
        return (leaf.w, leaf.g, *[leaf.state[name] for name in names])

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """Those of `came_` or `came_vector_`."""
        numbers = {name: group[name] for name in ("lr", "clip", "weight_decay")}
        return numbers | {"betas": tuple(group["betas"]), "eps": tuple(group["eps"]), "shape": tuple(leaf.shape)}


def _either(w: Tensor, g: Tensor, *state: Tensor, **numbers: Any) -> Rule:
    return came_(w, g, *state, **numbers) if w.ndim > 1 else came_vector_(w, g, *state, **numbers)


def _either_foreach(ws: list[Tensor], *lists: list[Tensor], shape: Sequence[int], **numbers: Any) -> Rule:
    form = came_foreach_ if len(shape) > 1 else came_vector_foreach_
    return form(ws, *lists, shape=shape, **numbers)


def _per_tensor(numbers: Tensor, stack: Tensor) -> Tensor:
    """One number for each tensor of a stack, in the stack's dimensions."""
    return numbers.view(-1, *[1] * (stack.ndim - 1))


def _average_(average: Tensor, sums: Tensor, count: int, beta: float, eps: float) -> None:
    """The average takes the means, of `count` squares each, plus ε."""
    average.lerp_(sums.div(max(count, 1)).add_(eps), 1 - beta)


def _shrunk(u_sq: Tensor, shape: Sequence[int], clip: float) -> Tensor:
    """max(1, RMS(U)/d) from ΣU² over the whole tensor."""
    return u_sq.div(max(math.prod(shape), 1)).sqrt().div(clip).clamp(min=1.0)
