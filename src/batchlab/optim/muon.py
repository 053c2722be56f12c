"""Muon: momentum made orthogonal, for matrices; AdamW for the rest (Jordan et al. 2024; Liu et al. 2025, 2502.16982).

  M ← μM + (1 - μ)G  and  U = (1 - μ)G + μM        "ema", Jordan's and torch's; U = M without Nesterov's term
  M ← μM + G         and  U = G + μM               "sum", Moonlight's and of Shah et al. 2025 (arXiv 2505.02222)
  W ← W - η(s·NS(U) + λW)                          λ decoupled, times η alone
  s = 0.2·√max(rows, columns)                      "match_rms_adamw": AdamW's RMS, so that η and λ are its own
  s = √max(1, rows/columns)                        "jordan", with η of about 0.02

NS is `batchlab.optim.newton_schulz`: blind to the scale of U, so that the two momenta differ by rounding and ε alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchlab.core.checks import check_count, check_inside, check_positive, check_rate, holds
from batchlab.core.errors import InputError
from batchlab.optim.gains import gains_of, trained_of
from batchlab.optim.lamb import lamb_, lamb_foreach_
from batchlab.optim.leaf import Leaf
from batchlab.optim.moments import adam_numbers, check_betas
from batchlab.optim.newton_schulz import JORDAN, NewtonSchulz, orthogonalised, orthogonality_error
from batchlab.optim.rule import Form, Numbers, Rule, Sum, weights_of_lerp
from batchlab.optim.shell import RuleOptimizer
from batchlab.optim.state_dtype import StateDtype, state_like
from batchlab.parallel.owners import Whole
from batchlab.parallel.sums import sums_over

Scale = Literal["match_rms_adamw", "jordan"] | None
MomentumForm = Literal["ema", "sum"]


def muon_(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    *,
    lr: float,
    momentum: float | Tensor,
    nesterov: bool,
    momentum_form: MomentumForm,
    weight_decay: float,
    scale: float,
    shape: torch.Size,
    how: NewtonSchulz,
    watch: bool,
) -> Rule:
    """One step on one matrix. scale: s. shape: of the whole tensor. watch: whether the error is measured."""
    if momentum_form == "ema":
        m.lerp_(g, 1 - momentum)
        u = g.lerp(m, momentum) if nesterov else m
    else:
        m.mul_(momentum).add_(g)
        u = g + momentum * m if nesterov else m
    (o,), errors = yield Whole([u.to(how.dtype)], shape, partial(updates, how=how, watch=watch), notes=int(watch))
    if weight_decay != 0:
        w.mul_(1 - lr * weight_decay)
    step = w.new_ones(()) * (-lr * scale)  # torch.as_tensor of a rate that moves would be kept by compiled rules
    w.addcmul_(o.to(w.dtype, memory_format=torch.contiguous_format), step)
    return {"orthogonality_error": errors} if watch else None


def muon_foreach_(
    ws: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    momentum_form: MomentumForm,
    weight_decay: float,
    scale: float,
    shape: torch.Size,
    how: NewtonSchulz,
    watch: bool,
) -> Rule:
    """`muon_` on matrices of one shape: their products are batched, at the price of a copy of all of them."""
    if momentum_form == "ema":
        torch._foreach_lerp_(ms, gs, 1 - momentum)
        us = list(torch._foreach_lerp(gs, ms, momentum)) if nesterov else ms
    else:
        torch._foreach_mul_(ms, momentum)
        torch._foreach_add_(ms, gs)
        us = list(torch._foreach_add(gs, ms, alpha=momentum)) if nesterov else ms
    us = [u.to(how.dtype) for u in us]
    os, errors = yield Whole(us, shape, partial(updates, how=how, watch=watch), notes=int(watch))
    if weight_decay != 0:
        torch._foreach_mul_(ws, 1 - lr * weight_decay)
    os = [o.to(w.dtype) for o, w in zip(os, ws, strict=True)]
    torch._foreach_mul_(os, lr * scale)
    torch._foreach_sub_(ws, os)
    return {"orthogonality_error": errors} if watch else None


def updates(us: list[Tensor], *, how: NewtonSchulz, watch: bool) -> tuple[list[Tensor], Tensor]:
    """NS of each of some tensors of one shape, as [rows, the rest]; and of each its orthogonality error, if watched."""
    size = rows_and_columns(us[0].shape)
    found = orthogonalised(us[0].reshape(size) if len(us) == 1 else torch.stack([u.reshape(size) for u in us]), how)
    stack = found.view(len(us), *size) if len(us) > 1 else found.unsqueeze(0)
    errors = orthogonality_error(stack).unsqueeze(1) if watch else stack.new_empty(len(us), 0)
    return [each.reshape(us[0].shape) for each in stack.unbind()], errors


def step_scale(shape: Sequence[int], scale: Scale) -> float:
    """s of the update of a tensor, taken as the matrix [rows, the rest].

    >>> step_scale((64, 256), "match_rms_adamw"), step_scale((64, 16), "jordan"), step_scale((64, 16), None)
    (3.2, 2.0, 1.0)
    """
    rows, columns = rows_and_columns(shape)
    if scale == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / max(columns, 1))) if scale == "jordan" else 1.0


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """Of the matrix that a tensor is taken as: the weight of a convolution is [outputs, inputs x kernel]."""
    return shape[0], math.prod(shape[1:])


class Muon(RuleOptimizer):
    """Steps that move all directions of a matrix alike; AdamW for the tensors that are none.

    lr: η of both; AdamW's with the default scale. weight_decay: λ. momentum: μ. nesterov, momentum_form, scale: see the
    module. ns_steps, ns_coefficients, ns_dtype: of `NewtonSchulz`; by default bfloat16, and float64 for parameters in
    it. On CPUs without bfloat16 products (AMX, AVX512-BF16) float32 may be faster. use_muon: of a group. True: all its
    tensors must be matrices. "matrices": those that are none take AdamW. False: all do, with adamw_betas (the paper's)
    and adamw_eps. rows_below: matrices of that many rows or more take AdamW too. check_finite: refuse gradients that
    are not, of all tensors, before anything moves: one wait for the device a step; without it a matrix with one NaN is
    NaN after it. foreach: batches the products of matrices of one shape; by default on GPUs, and on CPUs of several
    threads. Others: `RuleOptimizer`.

    The defaults are those of torch.optim.Muon but for `scale`, which is "jordan" there. Not for embeddings and output
    heads, nor for small batches or fine-tuning of a model that AdamW trained. A fused QKV weight is one matrix here:
    split it into three parameters to orthogonalise each. With muP "match_rms_adamw" needs a rate that falls with width,
    "jordan" does not. State: one buffer a matrix, two for AdamW. A matrix spread over ranks is gathered on one of them,
    made orthogonal there once and handed back; under DDP every rank does all of it.

    Raises `InputError` for hyperparameters out of range; by name for sparse, complex or vector tensors, and for
    gradients that are not finite. `report()` gives `orthogonality_error` by matrix within `watching()`.

    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> w.grad = torch.tensor([[300.0, 0.0], [0.0, 3.0]])
    >>> Muon([w], lr=1.0, scale=None).step()
    >>> w.detach().round(decimals=1)  # both directions move alike, whatever their gradients' sizes
    tensor([[-0.7000,  0.0000],
            [ 0.0000, -0.7000]])
    """

    STATE = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    SQUARES = ("exp_avg_sq",)
    FLAT = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        momentum_form: MomentumForm = "ema",
        scale: Scale = "match_rms_adamw",
        use_muon: bool | Literal["matrices"] = True,
        rows_below: int | None = None,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = JORDAN,
        ns_dtype: torch.dtype | None = None,
        eps: float = 1e-7,
        adamw_betas: tuple[float, float] = (0.95, 0.95),
        adamw_eps: float = 1e-8,
        check_finite: bool = True,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        state_dtype: StateDtype = None,
    ) -> None:
        defaults: Numbers = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        defaults |= {"momentum_form": momentum_form, "scale": scale, "use_muon": use_muon, "rows_below": rows_below}
        defaults |= {"ns_steps": ns_steps, "ns_coefficients": ns_coefficients, "ns_dtype": ns_dtype, "eps": eps}
        defaults |= {"adamw_betas": adamw_betas, "adamw_eps": adamw_eps, "check_finite": check_finite}
        options: dict[str, Any] = {"foreach": foreach, "fused": fused, "maximize": maximize}
        super().__init__(params, defaults, **options, differentiable=differentiable, state_dtype=state_dtype)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses what is out of range or unknown."""
        check_rate(**{name: group[name] for name in ("lr", "weight_decay", "adamw_eps")})
        check_positive(eps=group["eps"])
        check_count(ns_steps=group["ns_steps"])
        check_betas(group["adamw_betas"], name="adamw_betas")
        if group["momentum"] != 0:
            check_inside(momentum=group["momentum"])
        if group["rows_below"] is not None:
            check_count(rows_below=group["rows_below"])
        for name, known in _CHOICES.items():
            if group[name] not in known:
                raise InputError(f"{name} must be one of {known}, got {group[name]!r}")
        given = group["ns_coefficients"]
        if not holds(lambda abc: len(abc) == 3 and all(math.isfinite(each) for each in abc), given):
            raise InputError(f"ns_coefficients must be three finite numbers, got {given!r}")

    def check_parameter(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        """Refuses a tensor that is no matrix in a group that takes matrices alone."""
        super().check_parameter(name, parameter, group)
        if group["use_muon"] not in (False, "matrices") and parameter.ndim < 2:
            raise InputError(
                f"Muon takes tensors of two or more dimensions, got {name} of shape {tuple(parameter.shape)}: give it "
                "to a group with use_muon=False, or use batchlab.optim.create('muon', model)"
            )

    def is_orthogonalised(self, shape: Sequence[int], group: dict[str, Any]) -> bool:
        """Whether a tensor of a group goes through Newton-Schulz; if not AdamW has it."""
        if not group["use_muon"] or len(shape) < 2:
            return False
        return group["rows_below"] is None or shape[0] < group["rows_below"]

    def new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """A momentum for Muon's tensors, two averages for AdamW's."""
        names = self.STATE[:1] if self.is_orthogonalised(parameter.shape, group) else self.STATE[1:]
        return {name: state_like(parameter, group["state_dtype"], squares=name in self.SQUARES) for name in names}

    def before(self, leaves: Sequence[tuple[dict[str, Any], list[Leaf]]]) -> bool | None:
        """Refuses gradients that are not finite: on all ranks, where one of them has such a one."""
        checked = [leaf for group, each in leaves for leaf in each if group["check_finite"]]
        sums = sums_over(list(map(Sum, _telling([leaf.g for leaf in checked]))), [*map(_layout, checked)])
        if sums and not torch.stack([each.to(sums[0]) for each in sums]).isfinite().all():
            self._refuse_not_finite(checked, leaves)
        return super().before(leaves)

    def _refuse_not_finite(self, checked: list[Leaf], leaves: Sequence[tuple[dict[str, Any], list[Leaf]]]) -> None:
        """The first leaf that has such a gradient, if any: the sum of finite numbers may be none too."""
        counts = sums_over([Sum(leaf.g.isfinite().logical_not().sum()) for leaf in checked], [*map(_layout, checked)])
        bad = next((leaf.name for leaf, count in zip(checked, counts, strict=True) if count), None)
        if bad is not None:
            self.uncount(leaves)
            raise InputError(
                f"the gradient of {bad} is not finite: {type(self).__name__} took no step. Skip this batch, or scale "
                "the loss down under float16"
            )

    def listed(self, leaf: Leaf, group: dict[str, Any]) -> bool:
        """As of all; but on CPUs of several threads what is made orthogonal goes together, of whatever size."""
        if group["foreach"] is None and not group["fused"] and self._shared_out(leaf, group):
            return torch.get_num_threads() > 1
        return super().listed(leaf, group)

    def at_once(self, leaf: Leaf, group: dict[str, Any]) -> int | None:
        """On CPUs as many as there are threads, or two: so each has a matrix, and larger stacks outgrow the caches."""
        return max(2, torch.get_num_threads()) if self._shared_out(leaf, group) else super().at_once(leaf, group)

    def _shared_out(self, leaf: Leaf, group: dict[str, Any]) -> bool:
        """Not what is spread over ranks, which may have unlike numbers of threads."""
        return leaf.w.is_cpu and leaf.layout.mesh is None and self.is_orthogonalised(leaf.shape, group)

    def forms(self, group: dict[str, Any]) -> tuple[Form, Form | None]:
        """The rule and its form for lists."""
        return _either, _either_foreach

    def tensors(self, leaf: Leaf, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """Those of `muon_`, or AdamW's."""
        names = self.STATE[:1] if self.is_orthogonalised(leaf.shape, group) else self.STATE[1:]
        return (leaf.w, leaf.g, *[leaf.state[name] for name in names])

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """Those of `muon_`, or AdamW's."""
        numbers: Numbers = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        if not self.is_orthogonalised(leaf.shape, group):
            numbers = adam_numbers(leaf.w, **numbers, betas=group["adamw_betas"], eps=group["adamw_eps"], t=leaf.t)
            return numbers | {"clamp": None, "max_ratio": None, "adapt": False, "orthogonal": False}
        dtype = group["ns_dtype"] or (torch.float64 if leaf.w.dtype == torch.float64 else torch.bfloat16)
        numbers |= {name: group[name] for name in ("momentum", "nesterov", "momentum_form")}
        numbers |= {"scale": step_scale(leaf.shape, group["scale"]), "shape": leaf.shape, "watch": self._watched}
        numbers["how"] = NewtonSchulz(group["ns_steps"], tuple(group["ns_coefficients"]), dtype, group["eps"])
        return numbers | {"orthogonal": True}


class DMuon(Muon):
    """Muon as Moonlight trains with it, and Semenov et al. 2025 (arXiv 2509.01440) compare it under the name D-Muon.

    Momentum as a sum, s = 0.2·√max(rows, columns), the decay on every tensor, one rate. Matrices of 10,000 rows or more
    (vocabularies) and tensors of one dimension take AdamW; smaller embeddings and the head need a group with
    `use_muon=False`, as `muon_groups` makes it. lr, weight_decay, adamw_betas: the benchmark's for 124 million weights;
    (0.9, 0.99) for 720 million. Else as `Muon`.

    >>> w, b = torch.nn.Parameter(torch.zeros(4, 4)), torch.nn.Parameter(torch.zeros(4))
    >>> w.grad, b.grad = torch.eye(4), torch.ones(4)
    >>> DMuon([w, b], lr=0.01).step()
    >>> b.detach()
    tensor([-0.0100, -0.0100, -0.0100, -0.0100])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        rows_below: int | None = 10_000,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        adamw_betas: tuple[float, float] = (0.8, 0.999),
        adamw_eps: float = 1e-8,
        check_finite: bool = True,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        state_dtype: StateDtype = None,
    ) -> None:
        recipe: Numbers = {"momentum_form": "sum", "scale": "match_rms_adamw", "use_muon": "matrices"}
        recipe |= {"rows_below": rows_below, "adamw_betas": adamw_betas, "adamw_eps": adamw_eps}
        recipe |= {"ns_steps": ns_steps, "ns_dtype": ns_dtype, "check_finite": check_finite}
        options: Numbers = {"foreach": foreach, "fused": fused, "maximize": maximize, "state_dtype": state_dtype}
        super().__init__(
            params, lr, weight_decay, momentum, nesterov, **recipe, **options, differentiable=differentiable
        )


def muon_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.1,
    adamw: str | Sequence[str] | None = None,
    decay_vectors: bool = False,
) -> list[dict[str, Any]]:
    """Groups for `Muon`: hidden matrices; embeddings and the head, with AdamW; biases and gains, without decay, of
    whatever shape (`gains_of`).

    adamw: the names of modules or parameters that AdamW has beside embeddings; by default the last `nn.Linear` that was
    registered, which most often is the head. A weight that an embedding shares is the embedding's. Frozen parameters
    are left out. decay_vectors: decay biases and gains too, as D-Muon's paper has it. Names go with the parameters.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    >>> [[name for name, _ in group["params"]] for group in muon_groups(model)]
    [['1.weight'], ['0.weight', '2.weight'], ['1.bias', '2.bias']]
    """
    if adamw is None:
        adamw = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    check_rate(weight_decay=weight_decay)
    trained, gains = trained_of(model), gains_of(model)
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    left_out = {id(p) for module in embeddings for p in module.parameters()}  # with those of a parametrization
    for prefix in [adamw] if isinstance(adamw, str) else adamw:
        named = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if _within(name, prefix)}
        if not named:
            raise InputError(f"adamw names {prefix!r}, and the model has no such module or parameter")
        left_out |= named
    matrices = [(name, p) for name, p in trained if p.ndim >= 2 and id(p) not in gains]
    hidden = [(name, p) for name, p in matrices if id(p) not in left_out]
    outer = [(name, p) for name, p in matrices if id(p) in left_out]
    vectors = [(name, p) for name, p in trained if p.ndim < 2 or id(p) in gains]
    groups = [
        {"params": hidden, "use_muon": True, "weight_decay": weight_decay},
        {"params": outer, "use_muon": False, "weight_decay": weight_decay},
        {"params": vectors, "use_muon": False, "weight_decay": weight_decay if decay_vectors else 0.0},
    ]
    return [group for group in groups if group["params"]]


_CHOICES: dict[str, tuple[Any, ...]] = {
    "momentum_form": ("ema", "sum"),
    "scale": ("match_rms_adamw", "jordan", None),
    "use_muon": (True, False, "matrices"),
    "ns_dtype": (None, torch.bfloat16, torch.float32, torch.float64),
}


_layout = attrgetter("layout")


def _telling(gs: list[Tensor]) -> Sequence[Tensor]:
    """Of each tensor a number that is finite where all its elements are: on GPUs the largest, of all at once."""
    if gs and all(g.is_cuda and g.numel() for g in gs):
        return torch._foreach_norm(gs, math.inf)
    return [g.sum() for g in gs]


def _within(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


@weights_of_lerp("share1", "momentum")
def _either(*tensors: Tensor, orthogonal: bool, **numbers: Any) -> Rule:
    return muon_(*tensors, **numbers) if orthogonal else lamb_(*tensors, **numbers)


def _either_foreach(*lists: list[Tensor], orthogonal: bool, **numbers: Any) -> Rule:
    return muon_foreach_(*lists, **numbers) if orthogonal else lamb_foreach_(*lists, **numbers)
