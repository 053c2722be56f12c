"""LAMB: Adam's direction, rescaled to each tensor's own norm (You et al. 2020, arXiv 1904.00962, v5).

  m ← β₁m + (1 - β₁)g      v ← β₂v + (1 - β₂)g²
  u = m̂/(√v̂ + ε) + λw      m̂ = m/(1 - β₁ᵗ), v̂ = v/(1 - β₂ᵗ)
  w ← w - η·φ(|w|)/|u|·u   the ratio is 1 where |w| = 0 or |u| = 0

η lr, λ weight_decay: the decay joins before the norm is taken. φ is the identity, as in the authors' code, or a clamp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from batchlab.core.checks import check_positive, check_rate, check_share, holds
from batchlab.core.errors import InputError
from batchlab.optim import on_cpu, on_gpu
from batchlab.optim.lars import adapted
from batchlab.optim.leaf import Leaf, check_not_in_zero, plain, total_norm
from batchlab.optim.moments import adam_numbers, check_betas
from batchlab.optim.rule import Form, Numbers, Rule, squares, squares_of_lists, weights_of_lerp
from batchlab.optim.shell import RuleOptimizer
from batchlab.optim.state_dtype import StateDtype

_LONG_AGO = torch.tensor(math.inf, device="cpu")  # the first step, for an Adam that has nothing to correct any more


@weights_of_lerp("share1")
def lamb_(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    rate: Tensor,
    share1: float | Tensor,
    keep2: Tensor,
    share2: float,
    eps: Tensor,
    decay: Tensor,
    decays: bool,
    k: Tensor,
    clamp: tuple[float, float] | None,
    max_ratio: float | None,
    adapt: bool,
) -> Rule:
    """One step on one tensor, by the numbers of `adam_numbers`; u is k times u. adapt: false takes a ratio of 1."""
    m.lerp_(g, share1)
    v.mul_(keep2).addcmul_(g, g, value=share2)
    u = v.sqrt().add_(eps)
    torch.div(m, u, out=u)
    if decays:
        u.addcmul_(w, decay)
    if not adapt:
        w.addcmul_(u, rate, value=-1)
        return None
    norms = yield squares(w, u)
    ratio = _ratio(*norms.sqrt(), k=k, clamp=clamp, max_ratio=max_ratio)
    w.addcmul_(u, ratio * rate, value=-1)
    return {"trust_ratio": ratio}


def lamb_by_adam_(w: Tensor, g: Tensor, m: Tensor, v: Tensor, **numbers: Any) -> Rule:
    """`lamb_` with torch's fused Adam as its first half: from λ'w, by a rate of -1 and without its corrections, it goes
    to u.
    """
    u = torch.mul(w, numbers["decay"]) if numbers["decays"] else torch.zeros_like(w)
    settings = {"beta1": 1 - numbers["share1"], "beta2": 1 - numbers["share2"], "eps": numbers["eps"].item()}
    settings |= {"lr": -1.0, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
    adam([u], [g], [m], [v], [], [_LONG_AGO], fused=True, **settings)
    if not numbers["adapt"]:
        w.addcmul_(u, numbers["rate"], value=-1)
        return None
    norms = yield squares(w, u)
    ratio = _ratio(*norms.sqrt(), **{name: numbers[name] for name in ("k", "clamp", "max_ratio")})
    w.addcmul_(u, ratio * numbers["rate"], value=-1)
    return {"trust_ratio": ratio}


def lamb_foreach_(
    ws: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    *,
    rate: Tensor,
    share1: float,
    keep2: Tensor,
    share2: float,
    eps: Tensor,
    decay: Tensor,
    decays: bool,
    k: Tensor,
    clamp: tuple[float, float] | None,
    max_ratio: float | None,
    adapt: bool,
) -> Rule:
    """`lamb_` on lists of tensors."""
    torch._foreach_lerp_(ms, gs, share1)
    torch._foreach_mul_(vs, keep2)
    torch._foreach_addcmul_(vs, gs, gs, share2)
    us = list(torch._foreach_sqrt(vs))
    torch._foreach_add_(us, eps)
    us = list(torch._foreach_div(ms, us))
    if decays:
        torch._foreach_add_(us, list(torch._foreach_mul(ws, decay)))
    if not adapt:
        torch._foreach_mul_(us, rate)
        torch._foreach_sub_(ws, us)
        return None
    norms = yield squares_of_lists(ws, us)
    ratios = _ratio(*norms.sqrt(), k=k, clamp=clamp, max_ratio=max_ratio)
    torch._foreach_mul_(us, list((ratios * rate).unbind()))
    torch._foreach_sub_(ws, us)
    return {"trust_ratio": ratios}


class LAMB(RuleOptimizer):
    """Adam whose step has, for each tensor, the length η·|w|.

    lr: η; √B with the batch, as `lamb_schedule` gives it, with a warm-up. betas, eps: the authors'. weight_decay: λ,
    0.01 for BERT. bias_correction: without it the first steps are longer for lack of a correction of v, and the ratio
    hides it (v3 of the paper). clamp: (γ_l, γ_u) of φ(|w|) = min(max(|w|, γ_l), γ_u). max_ratio: an upper limit of the
    ratio; 1 gives LAMBC. max_grad_norm: divides all gradients by max(1, |g|/max_grad_norm), |g| over all tensors, as
    NVIDIA's variant does at 1.0. exclude_vectors: tensors of at most one dimension take a ratio of 1 and no decay, as
    in the authors' code. Others: `RuleOptimizer`.

    Two buffers a parameter. Norms over whole tensors: a flat buffer of many would be one tensor; a tied embedding is
    one. With ε > 0 it sees the gradient's scale where |g| is near ε. Adam, well tuned, matched it for BERT at batch
    32,768 (Nado et al. 2021, arXiv 2102.06356).

    Raises `InputError` for hyperparameters out of range, and for sparse or complex tensors by name.

    >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> w.grad = torch.tensor([[100.0, 0.0]])
    >>> LAMB([w], lr=0.1).step()
    >>> w.detach()  # moved by η|w| = 0.5
    tensor([[2.5000, 4.0000]])
    """

    STATE = ("exp_avg", "exp_avg_sq")
    SQUARES = ("exp_avg_sq",)
    OWN = ("max_grad_norm",)
    C_KERNELS = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        clamp: tuple[float, float] | None = None,
        max_ratio: float | None = None,
        max_grad_norm: float | None = None,
        exclude_vectors: bool = True,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        state_dtype: StateDtype = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clamp": clamp}
        defaults |= {"bias_correction": bias_correction, "max_ratio": max_ratio, "exclude_vectors": exclude_vectors}
        if max_grad_norm is not None:
            check_positive(max_grad_norm=max_grad_norm)
            check_not_in_zero("max_grad_norm")
        self.max_grad_norm = max_grad_norm
        options: dict[str, Any] = {"foreach": foreach, "fused": fused, "maximize": maximize}
        super().__init__(params, defaults, **options, differentiable=differentiable, state_dtype=state_dtype)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses what is out of range."""
        check_rate(**{name: group[name] for name in ("lr", "weight_decay", "eps")})
        check_betas(group["betas"])
        if group["max_ratio"] is not None:
            check_positive(max_ratio=group["max_ratio"])
        if group["clamp"] is not None and not holds(lambda two: len(two) == 2 and 0 <= two[0] < two[1], group["clamp"]):
            raise InputError(f"clamp must be (low, high) with 0 <= low < high, got {group['clamp']!r}")

    def before(self, leaves: Sequence[tuple[dict[str, Any], list[Leaf]]]) -> None:
        """Clips the gradient of all tensors together, where that is asked for."""
        if self.max_grad_norm is not None:
            every = [leaf for _, each in leaves for leaf in each]
            scale = torch.clamp(self.max_grad_norm / total_norm(every), max=1.0)
            for leaf in every:
                leaf.g = leaf.g * scale.to(leaf.g.device)

    def forms(self, group: dict[str, Any]) -> tuple[Form, Form | None]:
        """The rule and its form for lists."""
        return lamb_, lamb_foreach_

    def kernel(self, form: Form, tensors: Sequence[Any], numbers: Numbers, group: dict[str, Any]) -> Form | None:
        """On CPUs torch's fused Adam, or `on_cpu.lamb` where that may be compiled; on GPUs `on_gpu.lamb`."""
        if form is lamb_foreach_ and on_gpu.takes(*tensors):
            from batchlab.optim.on_gpu.lamb import lamb_lists_ as on_gpus

            return on_gpus
        if form is lamb_foreach_ and group["fused"] and on_cpu.takes(*tensors):
            from batchlab.optim.on_cpu.lamb import lamb_lists_ as on_cpus

            return partial(on_cpus, ratio_of=_ratio)
        return lamb_by_adam_ if form is lamb_ and plain(tensors) and not group["fused"] else None

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """Those of `lamb_`."""
        adapt, given = adapted(leaf, group), {name: group[name] for name in ("lr", "betas", "eps", "bias_correction")}
        decay = group["weight_decay"] if adapt else 0.0
        numbers = adam_numbers(leaf.w, **given, weight_decay=decay, t=leaf.t)
        clamp = None if group["clamp"] is None else tuple(group["clamp"])  # a plan in JSON has a list
        return numbers | {"clamp": clamp, "max_ratio": group["max_ratio"], "adapt": adapt}


class LambRecipe(NamedTuple):
    """lr: the peak. warmup: the share of all updates that the rate rises over, linearly from 0; then it falls to 0."""

    lr: float
    warmup: float


def lamb_schedule(
    batch: float, *, ref_batch: float = 32768, ref_lr: float = 0.005, ref_warmup: float = 0.2
) -> LambRecipe:
    """The rate and warm-up of LAMB at a batch size: η = η₀·√(B/B₀), the warm-up's share in proportion to B.

    batch, ref_batch: in one unit; BERT's sequences. The defaults are the paper's for BERT, which used it from batch 512
    to 32,768 without tuning anew: 5/(2ᵏ·1000) for k = 3, 2.5, ..., 0. Raises `InputError` where the warm-up would be
    more than the whole run.

    >>> lamb_schedule(512)
    LambRecipe(lr=0.000625, warmup=0.003125)
    """
    check_positive(batch=batch, ref_batch=ref_batch, ref_lr=ref_lr)
    check_share(ref_warmup=ref_warmup)
    warmup = ref_warmup * batch / ref_batch
    if warmup > 1:
        raise InputError(f"batch {batch:g} would need {warmup:.3g} of the run to warm up: the rule ends before it")
    return LambRecipe(ref_lr * math.sqrt(batch / ref_batch), warmup)


def _ratio(
    w_norm: Tensor, u_norm: Tensor, *, k: Tensor, clamp: tuple[float, float] | None, max_ratio: float | None
) -> Tensor:
    length = w_norm if clamp is None else w_norm.clamp(*clamp)
    ratio = k * length / u_norm
    if max_ratio is not None:
        ratio = ratio.clamp(max=max_ratio)
    return torch.where((w_norm == 0) | (u_norm == 0), 1.0, ratio)
