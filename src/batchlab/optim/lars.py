"""LARS: SGD with momentum whose rate follows each tensor's own norm (You et al. 2017, arXiv 1708.03888).

  λ = η·|w| / (|g| + β|w|)        1 where |w| = 0 or |g| = 0
  v ← m·v + γ·λ·(g + βw)          w ← w - v                    `lr_in_momentum`, the paper's
  v ← m·v + λ·(g + βw)            w ← w - γ·v                  without: as timm and apex have it

γ lr, η trust, β weight_decay, m momentum; norms over a whole tensor, of the raw gradient and of the weights before the
step. The two forms part only where a schedule moves γ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from batchlab.core.checks import check_inside, check_positive, check_rate
from batchlab.optim import on_cpu, on_gpu
from batchlab.optim.leaf import Leaf, plain
from batchlab.optim.moments import rate_of, scalar
from batchlab.optim.rule import Form, Numbers, Rule, squares, squares_of_lists
from batchlab.optim.shell import RuleOptimizer
from batchlab.optim.state_dtype import StateDtype
from batchlab.optim.tables import moved

LEAST = 2.0**-29  # the share of a gradient from which on 1 - (1 - share) in float64 is as exact as float32


def lars_(
    w: Tensor,
    g: Tensor,
    v: Tensor,
    *,
    rate: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    trust: Tensor,
    eps: Tensor,
    clip: bool,
    adapt: bool,
    decays: bool,
    lr_in_momentum: bool,
) -> Rule:
    """One step on one tensor. rate: γ. All numbers are tensors: for each that is not, a compiled rule takes 20 µs.
    adapt: false takes λ = 1 and no decay. decays: whether β is not 0.
    """
    if not adapt:
        v.mul_(momentum)
        if lr_in_momentum:
            w.sub_(v.addcmul_(g, rate))
        else:
            w.addcmul_(v.add_(g), rate, value=-1)
        return None
    norms = yield squares(w, g)
    ratio = _ratio(*norms.sqrt(), weight_decay=weight_decay, trust=trust, eps=eps, limit=rate if clip else None)
    scale = ratio * rate if lr_in_momentum else ratio
    v.mul_(momentum).addcmul_(g, scale)
    if decays:
        v.addcmul_(w, scale * weight_decay)
    if lr_in_momentum:
        w.sub_(v)
    else:
        w.addcmul_(v, rate, value=-1)
    return {"trust_ratio": ratio}


def lars_by_sgd_(w: Tensor, g: Tensor, v: Tensor, **numbers: Any) -> Rule:
    """`lars_` of adapted float32 tensors with torch's fused SGD as its second half, whose v ← m·v + (1-d)(g + βw) takes
    d = 1 - λ, or 1 - γλ. Where that is too near to 1 for float32, it is `lars_`.
    """
    norms = yield squares(w, g)
    rate, decay, trust, eps = (numbers[name].item() for name in ("rate", "weight_decay", "trust", "eps"))
    w_norm, g_norm = norms.sqrt().tolist()
    ratio = trust * w_norm / (g_norm + decay * w_norm + eps) if w_norm and g_norm else 1.0
    if numbers["clip"]:
        ratio = 1.0 if ratio >= rate else ratio / (rate or math.nan)
    share, lr = (ratio * rate, 1.0) if numbers["lr_in_momentum"] else (ratio, rate)
    if share and not LEAST <= share < math.inf:
        return (yield from lars_(w, g, v, **numbers) or ())
    settings = {"weight_decay": decay, "momentum": numbers["momentum"].item(), "lr": lr, "dampening": 1 - share}
    sgd([w], [g], [v], fused=True, nesterov=False, maximize=False, **settings)
    moved([w])
    return {"trust_ratio": torch.tensor(ratio, device="cpu")}


def lars_foreach_(
    ws: list[Tensor],
    gs: list[Tensor],
    vs: list[Tensor],
    *,
    rate: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    trust: Tensor,
    eps: Tensor,
    clip: bool,
    adapt: bool,
    decays: bool,
    lr_in_momentum: bool,
) -> Rule:
    """`lars_` on lists of tensors."""
    torch._foreach_mul_(vs, momentum)
    ratios = None
    if adapt:
        norms = yield squares_of_lists(ws, gs)
        ratios = _ratio(*norms.sqrt(), weight_decay=weight_decay, trust=trust, eps=eps, limit=rate if clip else None)
        if decays:
            decayed = list(torch._foreach_mul(ws, weight_decay))
            torch._foreach_add_(decayed, gs)
            gs = decayed
        gs = list(torch._foreach_mul(gs, list((ratios * rate if lr_in_momentum else ratios).unbind())))
    elif lr_in_momentum:
        gs = list(torch._foreach_mul(gs, rate))
    torch._foreach_add_(vs, gs)
    torch._foreach_sub_(ws, vs if lr_in_momentum else list(torch._foreach_mul(vs, rate)))
    return None if ratios is None else {"trust_ratio": ratios}


class LARS(RuleOptimizer):
    """SGD with momentum and a rate for each tensor, in proportion to |w|/|g|.

    lr: γ, which you raise with the batch; of order 2 to 40 with the paper's `trust`, and needs a warm-up. momentum,
    weight_decay, trust: the paper's. eps: added to the denominator; 1e-8 in timm. clip: LARC of apex, at most the
    global rate: min(λ/γ, 1), with a trust of 0.02 and `lr_in_momentum=False`. exclude_vectors: tensors of at most one
    dimension (biases, gains of norms) take λ = 1 and no decay, as in practice; the paper excludes none.
    lr_in_momentum: see the module. Others: `RuleOptimizer`.

    One buffer a parameter. With the batch: the paper's best rates grow a little slower than its square root. Well-tuned
    SGD with Nesterov momentum matched it at batch 32,768 on ResNet-50 (Nado et al. 2021, arXiv 2102.06356). Not for
    LoRA or other tensors that start at zero: they take plain steps of γ until they have a norm. Gradients must be
    unscaled and accumulated before the step; a global clip before it changes nothing but the decay's share.

    Raises `InputError` for hyperparameters out of range, and for sparse or complex tensors by name.

    >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> w.grad = torch.tensor([[100.0, 0.0]])
    >>> LARS([w], lr=1.0, momentum=0.0, weight_decay=0.0, trust=0.1).step()
    >>> w.detach()  # moved by γη|w| = 0.5, whatever the gradient's size
    tensor([[2.5000, 4.0000]])
    """

    STATE = ("momentum_buffer",)
    C_KERNELS = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        trust: float = 1e-3,
        *,
        eps: float = 0.0,
        clip: bool = False,
        exclude_vectors: bool = True,
        lr_in_momentum: bool = True,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        state_dtype: StateDtype = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps}
        defaults |= {"clip": clip, "exclude_vectors": exclude_vectors, "lr_in_momentum": lr_in_momentum}
        options: dict[str, Any] = {"foreach": foreach, "fused": fused, "maximize": maximize}
        super().__init__(params, defaults, **options, differentiable=differentiable, state_dtype=state_dtype)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses what is out of range."""
        check_rate(**{name: group[name] for name in ("lr", "weight_decay", "eps")})
        check_positive(trust=group["trust"])
        if group["momentum"] != 0:
            check_inside(momentum=group["momentum"])

    def forms(self, group: dict[str, Any]) -> tuple[Form, Form | None]:
        """The rule and its form for lists."""
        return lars_, lars_foreach_

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """Those of `lars_`."""
        dtype, device = leaf.w.dtype, leaf.w.device
        tensors = ("momentum", "weight_decay", "trust", "eps")
        numbers: Numbers = {name: scalar(group[name], dtype, device) for name in tensors}
        numbers |= {"rate": rate_of(group["lr"], leaf.w), "clip": group["clip"], "adapt": adapted(leaf, group)}
        return numbers | {"decays": group["weight_decay"] != 0, "lr_in_momentum": group["lr_in_momentum"]}

    def kernel(self, form: Form, tensors: Sequence[Any], numbers: Numbers, group: dict[str, Any]) -> Form | None:
        """On CPUs torch's fused SGD, or `on_cpu.lars` where that may be compiled; on GPUs `on_gpu.lars`."""
        if form is lars_foreach_ and on_gpu.takes(*tensors):
            from batchlab.optim.on_gpu.lars import lars_lists_ as on_gpus

            return on_gpus
        if form is lars_foreach_ and group["fused"] and on_cpu.takes(*tensors):
            from batchlab.optim.on_cpu.lars import lars_lists_ as on_cpus

            return partial(on_cpus, ratio_of=_ratio)
        fits = form is lars_ and plain(tensors) and tensors[0].dtype == torch.float32
        return lars_by_sgd_ if fits and group["momentum"] and numbers["adapt"] else None


def adapted(leaf: Leaf, group: dict[str, Any]) -> bool:
    """Whether a tensor's step follows its norm."""
    return len(leaf.shape) > 1 or not group["exclude_vectors"]


def _ratio(
    w_norm: Tensor, g_norm: Tensor, *, weight_decay: Tensor, trust: Tensor, eps: Tensor, limit: Tensor | None
) -> Tensor:
    ratio = trust * w_norm / (g_norm + weight_decay * w_norm + eps)
    if limit is not None:
        ratio = (ratio / limit).clamp(max=1.0)
    return torch.where((w_norm == 0) | (g_norm == 0), 1.0, ratio)
