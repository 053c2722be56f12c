"""AGVM: a learning rate for each module, by how noisy its gradient is against the backbone's (Xue et al. 2022).

arXiv 2210.11078. Modules i = 1..n, one parameter group each; 1 is the anchor, the backbone. Every few steps:

    G_i^A, G_i^B          mean gradients of module i over the two halves of the batch
    φ_i = 1 - cos(G_i^A, G_i^B)                       ≈ (s/n)/(|g|² + s/n): the share of noise in half the batch
    μ_i = √clamp((φ_1 + ε)/(φ_i + ε), low, high)      the noisier module gets the smaller rate
    f_i ← α·f_i + (1 - α)·μ_i                         f_i = 1 at first
    the wrapped optimizer steps on (G^A + G^B)/2 with the rates η_i·f_i

g is the mean gradient of an example, s the trace of its covariance, n the examples of a half. Around an optimizer
with "exp_avg_sq" in its state the halves are compared as G/(√(β₂v + (1 - β₂)G²) + ε_adam), v the state before this
step, 0 before the first, without bias correction. The clamp and ε are those of the authors' code (Sense-X/AGVM). That
code, though, puts the half's gradient divided by the number of ranks into this formula; here it is the half's mean.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchlab.core.checks import check_count, check_positive, check_share, holds
from batchlab.core.errors import InputError
from batchlab.optim.agvm.half_gradients import Dots, Halves, even_size
from batchlab.optim.by_name import in_groups
from batchlab.optim.leaf import asks_for_state
from batchlab.optim.state_hooks import loads, saves

_ENTRIES: dict[str, Any] = {"agvm_step": 0, "agvm_skipped": 0, "agvm_factor": 1.0, "agvm_phi": math.nan}
_SETTINGS = ("anchor", "interval", "alpha", "start", "clamp", "eps")
_BARE = (
    "the state is of an optimizer without AGVM: load it into that optimizer before AGVM wraps it, and AGVM starts anew"
)


def noise_share(aa: float, ab: float, bb: float) -> float:
    """φ = 1 - cos of two vectors a and b, from a·a, a·b and b·b; NaN where one of them is 0 or not finite.

    0 for the same direction, 1 for orthogonal ones, 2 for opposite ones.

    >>> noise_share(4.0, 4.0, 4.0), noise_share(1.0, 0.0, 9.0), noise_share(1.0, -2.0, 4.0)
    (0.0, 1.0, 2.0)
    """
    if aa == 0 or bb == 0 or not all(map(math.isfinite, (aa, ab, bb))):
        return math.nan
    lengths = aa if aa == bb else math.sqrt(aa) * math.sqrt(bb)
    return 1 - max(-1.0, min(1.0, ab / lengths))


def rate_targets(
    phis: Sequence[float], anchor: int = 0, clamp: tuple[float, float] = (0.5, 10.0), eps: float = 1e-6
) -> list[float]:
    """μ_i = √clamp((φ_anchor + ε)/(φ_i + ε), low, high); NaN where φ_i is. anchor: a place among phis, from 0.

    >>> rate_targets([0.2, 0.2, 0.3, 0.9])
    [1.0, 1.0, 0.816497261338992, 0.7071067811865476]
    """
    check_count(0, anchor=anchor)
    if anchor >= len(phis):
        raise InputError(f"anchor must be a place among the {len(phis)} phis, from 0, got {anchor}")
    low, high = clamp
    ratios = [(phis[anchor] + eps) / (phi + eps) for phi in phis]
    return [math.nan if math.isnan(ratio) else math.sqrt(min(max(ratio, low), high)) for ratio in ratios]


class GroupNoise(NamedTuple):
    """Of one group. phi: as last measured, NaN before that and where it was left out. lr: the base rate.

    factor: f, what the base rate is multiplied by in a step.
    """

    name: str
    phi: float
    factor: float
    lr: float


class AGVM(torch.optim.Optimizer):
    """Wraps an optimizer whose parameter groups are modules, and is used in its place.

        optimizer = AGVM(torch.optim.SGD(groups_by_module(model, ["backbone", "neck", "head"]), lr=0.4, momentum=0.9))
        optimizer.zero_grad()
        with optimizer.half("A"):
            loss_mean(first_half).backward()
        with optimizer.half("B"):
            loss_mean(second_half).backward()
        optimizer.step()                             # clip before it, if you clip

    anchor: the group that the others are held against; its factor stays 1. Of the paper's five choices the backbone
    was best. interval: measures at steps t with t >= start and t % interval == 0; the paper has 10, and 5 above a batch
    of about 1,000, as the code. alpha: weight kept of the old factor, 0.97 in both; 1 measures and changes nothing.
    start: 500 as in the code; put it after the warm-up. clamp: of μ², so that μ lies in [0.71, 3.16]. eps: in φ's own
    unit. process_group: for `rank_halves`; the default group where it is None.

    The halves, in time: each `half` holds the backward passes of half the batch, several micro-batches if need be. At
    its end `.grad` must be the mean over that half, over all ranks: DDP and FSDP2 see to that, at one more reduction in
    a measuring step. After both `.grad` is their mean. Or in space, where a rank has too few examples to cut:
    `rank_halves`. `due` says whether the coming step measures: steps that do not may do without halves, and `step`
    refuses one that should measure and did not.

    The two halves must be equally large, drawn independently and their losses means: a mean over something that varies
    (positives, tokens) is not quite that. With batch normalisation each half has its own statistics. Small halves make
    φ nearly 1 and so μ nearly 1 everywhere: look at `phis`. NaN or infinite gradients are not measured and go to the
    wrapped optimizer as they are; nor is an anchor whose gradient is 0 in a half; `skipped` counts both. Another group
    that is frozen, or whose gradient is 0 in a half, keeps its factor. Under `GradScaler` give `loss_scale`, which
    Adam's form needs.

    Not for a model without parts that differ in noise, nor for parameters of one module in several groups: a group is
    what is measured and what gets a factor.

    State: four numbers in each of `param_groups`, which `state_dict` and tools that read `param_groups` save; a copy
    of the gradient between the halves of a measuring step. Save between steps. A scheduler may be given this or the
    wrapped optimizer: in `group["lr"]` is always the base rate.

    Raises `InputError` for fewer than two groups, hyperparameters out of range, sparse or complex gradients by name, a
    trainable group without any gradient or a frozen anchor when it is measured.

    >>> trunk, head = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    >>> agvm = AGVM(torch.optim.SGD([{"params": [trunk]}, {"params": [head]}], lr=1.0), start=0, alpha=0.0)
    >>> agvm.due()
    True
    >>> for half, g, noisy in (("A", [1.0, 0.5], [1.0, 1.0]), ("B", [1.0, -0.5], [1.0, -1.0])):
    ...     with agvm.half(half):
    ...         (trunk @ torch.tensor(g) + head @ torch.tensor(noisy)).backward()
    >>> agvm.step()
    >>> [round(phi, 3) for phi in agvm.phis], [round(factor, 3) for factor in agvm.factors]
    ([0.4, 1.0], [1.0, 0.707])
    >>> head.tolist(), agvm.param_groups[1]["lr"]
    ([-0.7071067690849304, 0.0], 1.0)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        anchor: int = 0,
        interval: int = 5,
        alpha: float = 0.97,
        start: int = 500,
        clamp: tuple[float, float] = (0.5, 10.0),
        eps: float = 1e-6,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        _check(optimizer, anchor, interval, alpha, start, clamp, eps)
        self.optimizer, self.anchor, self.interval, self.alpha = optimizer, anchor, interval, alpha
        self.start, self.clamp, self.eps, self._process_group = start, clamp, eps, process_group
        if process_group is not None:
            even_size(process_group)
        self._forget()
        for group in optimizer.param_groups:
            for name, value in _ENTRIES.items():
                group.setdefault(name, value)
        self.__setstate__({})

    def __getattr__(self, name: str) -> Any:
        # torch replaces these on the wrapped optimizer when it loads a state: they are looked up there each time.
        if name in ("param_groups", "state", "defaults") and "optimizer" in self.__dict__:
            return getattr(self.optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("optimizer", *_SETTINGS, "_process_group", "_halves", "_phis")}

    def due(self) -> bool:
        """Whether the coming step measures."""
        t = self._groups()[0]["agvm_step"]
        return bool(t >= self.start and t % self.interval == 0)

    @property
    def factors(self) -> tuple[float, ...]:
        """f of each group."""
        return tuple(group["agvm_factor"] for group in self._groups())

    @property
    def phis(self) -> tuple[float, ...]:
        """φ of each group as last measured."""
        return tuple(group["agvm_phi"] for group in self._groups())

    @property
    def skipped(self) -> int:
        """Measurements left out: a gradient was not finite, or the anchor's was 0."""
        return int(self._groups()[0]["agvm_skipped"])

    def report(self) -> tuple[GroupNoise, ...]:
        """Of each group its name (its number where it has none), φ, factor and base rate."""
        return tuple(
            GroupNoise(str(group.get("name", index)), group["agvm_phi"], group["agvm_factor"], float(group["lr"]))
            for index, group in enumerate(self._groups())
        )

    @contextlib.contextmanager
    def half(self, name: Literal["A", "B"], loss_scale: float = 1.0) -> Iterator[None]:
        """Around the backward passes of one half; at its end `.grad` is the half's mean times `loss_scale`.

        Each half once a step, in either order. After the second, `.grad` is the mean of both.
        """
        if name not in ("A", "B"):
            raise InputError(f'name must be "A" or "B", got {name!r}')
        check_positive(loss_scale=loss_scale)
        self._halves.begin([name], self.optimizer)
        yield
        dots = self._halves.end(name, self.optimizer, measure=self.due(), loss_scale=loss_scale)
        if dots is not None:
            self._phis = self._judged(dots)

    @contextlib.contextmanager
    def rank_halves(self, model: nn.Module | None = None, loss_scale: float = 1.0) -> Iterator[None]:
        """Around the forward and backward passes of a step, of which the first half of the ranks is half A.

        After it `.grad` is the mean over all ranks, at measuring steps and at others. model: the DDP module, if there
        is one, which then does not average in a measuring step; its communication hook is not used there. Without it
        `.grad` must be each rank's own, and is averaged here (averaging again changes nothing). Costs two all-reduces
        of the gradient in a measuring step, else one. Not for parameters spread over ranks: use `half`. Collective.
        """
        check_positive(loss_scale=loss_scale)
        measure, group = self.due(), self._process_group
        even_size(group)
        ddp = model if isinstance(model, DistributedDataParallel) else None
        self._halves.begin("AB", self.optimizer)
        with ddp.no_sync() if measure and ddp is not None else contextlib.nullcontext():
            yield
        self._halves.taken = {"A", "B"}
        if measure or ddp is None:
            dots = self._halves.over_ranks(self.optimizer, group, measure=measure, loss_scale=loss_scale)
            if measure:
                self._phis = self._judged(dots)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer at the rates η_i·f_i; returns the closure's loss.

        The closure, which may hold the halves, is called once. The base rates are put back as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        elif asks_for_state(self.optimizer):
            return self.optimizer.step()
        groups = self._groups()
        self._halves.check_complete(groups[0]["agvm_step"], due=self.due())
        self._take_in(groups)
        base = [group["lr"] for group in groups]
        try:
            for group in groups:
                group["lr"] = group["lr"] * group["agvm_factor"]
            self.optimizer.step()
        finally:
            for group, lr in zip(groups, base, strict=True):
                group["lr"] = lr
        for group in groups:
            group["agvm_step"] += 1
        self._forget()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; halves that no step used are forgotten."""
        self.optimizer.zero_grad(set_to_none)
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer, with factor 1."""
        self.optimizer.add_param_group(param_group)

    @saves
    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; AGVM's numbers are in `param_groups`."""
        self._groups()
        return self.optimizer.state_dict()

    @loads
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; refuses the state of a bare optimizer."""
        if any(name not in group for group in state_dict["param_groups"] for name in _ENTRIES):
            raise InputError(_BARE)
        self.optimizer.load_state_dict(state_dict)
        self._forget()

    def _groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups; one that was added since gets its entries."""
        groups = self.optimizer.param_groups
        clocks = [group["agvm_step"] for group in groups if "agvm_step" in group]
        if not clocks:
            raise InputError(_BARE)
        for group in groups:
            if "agvm_step" not in group:
                group.update(_ENTRIES | {"agvm_step": clocks[0]})
        return groups

    def _forget(self) -> None:
        self._halves, self._phis = Halves(), []

    def _judged(self, dots: Sequence[Dots | None]) -> list[float]:
        """φ of each group; none where nothing can be said. dots: None for a group without any gradient."""
        groups = self._groups()
        for index, (group, found) in enumerate(zip(groups, dots, strict=True)):
            if found is None and (not group["params"] or any(p.requires_grad for p in group["params"])):
                raise InputError(
                    f"param_groups[{index}] ({group.get('name', 'unnamed')}) has no gradient at a measuring step: use "
                    "its parameters in every one, freeze them, or leave the group out"
                )
        if dots[self.anchor] is None:
            raise InputError(f"the anchor, param_groups[{self.anchor}], is frozen: choose another anchor")
        phis = [math.nan if found is None else noise_share(*found) for found in dots]
        finite = all(math.isfinite(number) for found in dots if found for number in found)
        if not finite or math.isnan(phis[self.anchor]):
            for group in groups:
                group["agvm_skipped"] += 1
            return []
        return phis

    def _take_in(self, groups: Sequence[dict[str, Any]]) -> None:
        """f_i ← α·f_i + (1 - α)·μ_i from what this step's halves told."""
        if not self._phis:
            return
        targets = rate_targets(self._phis, self.anchor, self.clamp, self.eps)
        for group, phi, mu in zip(groups, self._phis, targets, strict=True):
            group["agvm_phi"] = phi
            if not math.isnan(mu):
                group["agvm_factor"] += (1 - self.alpha) * (mu - group["agvm_factor"])


def _check(
    optimizer: Any, anchor: int, interval: int, alpha: float, start: int, clamp: tuple[float, float], eps: float
) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, AGVM):
        raise InputError(f"optimizer must be a torch.optim.Optimizer other than AGVM, got {type(optimizer).__name__}")
    if in_groups(optimizer):
        raise InputError(
            f"optimizer must take its gradient from .grad, got {type(optimizer).__name__}, which takes it in groups"
        )
    groups = optimizer.param_groups
    if len(groups) < 2:
        raise InputError(
            f"optimizer must have a parameter group for each module, two or more, got {len(groups)}: groups_by_module "
            "makes them"
        )
    if any(group.get("differentiable") for group in groups):
        raise InputError("AGVM cannot be differentiated through: the optimizer's differentiable must be False")
    check_count(0, anchor=anchor, start=start)
    check_count(interval=interval)
    if anchor >= len(groups):
        raise InputError(f"anchor must be one of the {len(groups)} groups, 0 to {len(groups) - 1}, got {anchor}")
    check_share(alpha=alpha)
    check_positive(eps=eps)
    if not holds(lambda pair: len(pair) == 2 and 0 < pair[0] <= 1 <= pair[1] < math.inf, clamp):
        raise InputError(f"clamp must be (low, high) with 0 < low <= 1 <= high, finite, got {clamp!r}")
