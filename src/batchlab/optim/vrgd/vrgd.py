"""VRGD: a gradient weighted by how well the groups of its batch agree (Jiang et al. 2023, arXiv 2309.13681).

  gbar = Σ n_d g_d / N        var = Σ n_d (g_d - gbar)² / N      over the k groups of one step; N = Σ n_d
  r = gbar²/var               r ← r / (mean of r over the tensor)          r ← clamp(r, γ, 1)
  p ← β₃p + (1 - β₃)r         r ← p / (1 - β₃ᵗ)                  only with `ema`, as for the Adam family
  the base optimizer takes r·gbar in place of gbar

g_d: the mean gradient of group d, a micro-batch of n_d examples on one rank. Where var is 0 within rounding (a
deviation below k roundings of gbar) the groups agree: r is 1 and stays out of the tensor's mean; where gbar is 0, r is
0 and ends at γ. Squares are taken in float32 at least; deviations below 1e-19 vanish in them and count as agreement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.core.checks import check_count, check_inside, check_positive
from batchlab.core.errors import InputError
from batchlab.optim.leaf import names_of
from batchlab.optim.rule import side_by_side
from batchlab.optim.state_dtype import dense, put_back
from batchlab.optim.vrgd.multiplier import (
    FEWEST_GROUPS,
    add_group_,
    add_group_foreach_,
    check_multiplier,
    enough_groups,
    merge_,
    multiplier_,
    smooth_,
)
from batchlab.parallel.agree import device_of
from batchlab.parallel.shards import is_spread, part_like
from batchlab.parallel.sums import layout_of


def keep_local(state, bucket):  # type: ignore[no-untyped-def]  # DDP takes no annotations that are texts
    """A communication hook that leaves each rank its own gradient: `ddp.register_comm_hook(None, keep_local)`."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


class _Sums(NamedTuple):
    """Of one parameter over the groups so far: S = Σ n_d g_d and M = Σ n_d (g_d - gbar)², this rank's part."""

    s: Tensor
    m2: Tensor


@dataclass
class Settings:
    """Of one parameter's group. beta3: None without a momentum of r."""

    gamma: float
    cap: float | None
    beta3: float | None


class VRGradient:
    """Turns the gradient in `.grad` into r·gbar, for any optimizer, from the groups that a batch is taken in.

        vr = VRGradient(optimizer)
        for x, y in micro_batches:
            (loss_mean(x, y) * len(x) / batch_size).backward()
            vr.add_group(examples=len(x))
        vr.finish()
        optimizer.step()

    params: an optimizer, whose parameters are looked up at each step, or tensors or (name, tensor) pairs. groups: k
    over all ranks, refused if another number came; None takes what comes, from 2. gamma: γ, the paper's, best between
    0.04 and 0.2 there. ema: β₃ of r's momentum; 0.9 for Adam and LAMB, None for SGD and LARS. cap: an upper limit of r
    before the mean is taken, which tames few groups; the paper has none. process_group: see below.

    Each backward pass must be of the group's share of the loss, its mean times n_d/N, or all groups be of one size; a
    common factor (a loss scale, a forgotten 1/k) stays in the gradient as it would without this, and leaves r alone.
    `add_group` takes the gradient out of `.grad`; `finish` puts the whole batch's back, times r. Between them sums live
    in two float32 tensors a parameter; `ema` keeps one. A parameter without a gradient in a group counts as 0 there.
    Clip norms after `finish`; with torch.amp, `finish` before `scaler.unscale_`. r of few groups is heavy-tailed, above
    all for k = 2, where one coordinate can push all others to γ: take 8 groups or more, of 8 to 64 examples.

    Over ranks. With `process_group` every rank's `.grad` must be its own: run all backward passes in DDP's `no_sync`,
    or give DDP `keep_local`. `finish` reduces S, then M about the common mean (the cost of two gradients) and leaves
    the mean over ranks of what each accumulated, as DDP would. Without it gradients must be reduced already (DDP,
    FSDP2, tensor parallelism): the groups are the micro-batches, each reduced. DTensors can be had only so.

    When not: where you cannot tune the rate anew, for the mean of r is below 1, so that steps become shorter: compare
    at equally tuned rates. With batch normalisation groups see their own statistics. Not a variance over time (Adam's,
    M-SVAG's): groups are of one step.

    Raises `InputError` for fewer than two groups, a gradient that belongs to no group, sparse or complex tensors, ranks
    whose gradients were averaged before.

    >>> w = torch.nn.Parameter(torch.zeros(3))
    >>> vr = VRGradient([("w", w)])
    >>> for g in ([3.0, 3.0, 2.0], [1.0, 3.0, -1.0]):
    ...     w.grad = torch.tensor(g) / 2  # of half the batch each
    ...     vr.add_group()
    >>> vr.finish()
    >>> w.grad  # gbar = 2, 3, 0.5 and r = 4, inf, 1/9: over their mean, 1.95, 1 and 0.054, which ends at 0.1
    tensor([2.0000, 3.0000, 0.0500])
    """

    def __init__(
        self,
        params: torch.optim.Optimizer | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        groups: int | None = None,
        *,
        gamma: float = 0.1,
        ema: float | None = None,
        cap: float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_multiplier(gamma, cap)
        if ema is not None:
            check_inside(ema=ema)
        if groups is not None:
            enough_groups(groups)
            check_count(FEWEST_GROUPS, groups=groups)
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise InputError(
                "process_group must be a torch.distributed.ProcessGroup that this rank is in, or None, got "
                f"{process_group!r:.80}: of a mesh give mesh.get_group()"
            )
        self.gamma, self.ema, self.cap, self.groups = gamma, ema, cap, groups
        self.process_group = process_group
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._source = params if isinstance(params, torch.optim.Optimizer) else _as_group(params)
        self.discard()
        self._report: dict[str, dict[str, Tensor]] = {}
        for name, parameter, _ in self._parameters():
            self._check(name, parameter)

    def discard(self) -> None:
        """Forgets the groups since the last `finish`."""
        self._sums: dict[Tensor, _Sums] = {}
        self._sizes: list[float] = []
        self._sized: bool | None = None
        self._last: Tensor | None = None
        self.finished = False

    @property
    def added(self) -> int:
        """Groups of this rank since the last `finish`."""
        return len(self._sizes)

    @torch.no_grad()
    def add_group(self, *, examples: float | None = None) -> None:
        """Takes the gradient of one group out of `.grad`: to be called after each backward pass.

        examples: n_d, in any unit; to be given for all groups of a step or for none, which are then of one size.
        """
        if examples is not None:
            check_positive(examples=examples)
        if self._sized is not None and self._sized != (examples is not None):
            raise InputError("examples must be given for all groups of a step, or for none if they are of one size")
        members = [(name, parameter) for name, parameter, _ in self._parameters()]
        for name, parameter in members:
            self._check(name, parameter)
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise InputError(f"VRGD takes dense gradients, got a sparse one of {name}: build it with sparse=False")
        if all(parameter.grad is None for _, parameter in members):
            raise InputError(
                "add_group found no gradient: call it after each micro-batch's backward pass; under FSDP2 each must "
                "reduce its gradients (set_requires_gradient_sync)"
            )
        size, before = 1.0 if examples is None else float(examples), float(sum(self._sizes))
        found = [(self._of(parameter), _taken(parameter)) for _, parameter in members if self._known(parameter)]
        _add(found, size, before)
        if self.process_group is not None:
            sums = [g.sum(dtype=torch.float64) for _, g in found if g is not None]
            self._last = torch.stack([each.to(sums[0].device) for each in sums]).sum()
        self._sizes.append(size)
        self._sized, self.finished = examples is not None, False

    @torch.no_grad()
    def finish(self) -> None:
        """Writes r·gbar into `.grad`, in the scale in which the groups' gradients came."""
        left = [name for name, parameter, _ in self._parameters() if parameter.grad is not None]
        if left:
            raise InputError(f"{left[0]} has a gradient of no group: call add_group() after each backward pass")
        world = 1 if self.process_group is None else dist.get_world_size(self.process_group)
        groups, examples = self._over_ranks() if self.process_group is not None else (self.added, sum(self._sizes))
        self._check_number(groups)
        members = [each for each in self._parameters() if each[1] in self._sums]
        rules, layouts = [], [layout_of(parameter) for _, parameter, _ in members]
        for _, parameter, group in members:
            set_, count = self._settings(group), max(parameter.numel(), 1)
            numbers: dict[str, Any] = {"examples": examples, "groups": groups, "count": count}
            rules.append(multiplier_(*self._sums[parameter], **numbers, gamma=set_.gamma, cap=set_.cap))
        self._report = {}
        for (name, parameter, group), noted in zip(members, side_by_side(rules, layouts), strict=True):
            self._report[name] = cast(dict[str, Tensor], noted)
            s, r = self._sums[parameter]
            self._smooth(parameter, group, r, self._report[name]["multiplier"].isfinite())
            parameter.grad = _gradient_like(parameter, s.mul_(r) if world == 1 else s.mul_(r).div_(world))
        self.discard()
        self.finished = True

    def report(self) -> dict[str, dict[str, float]]:
        """Of the last step by parameter: the mean of r before its momentum, and the share of coordinates at γ."""
        return {name: {what: float(value) for what, value in found.items()} for name, found in self._report.items()}

    def state_dict(self) -> dict[str, Any]:
        """The momenta of r, by the parameters' places; a step's groups are not saved, so save between steps."""
        places = {parameter: str(place) for place, (_, parameter, _) in enumerate(self._parameters())}
        return {places[parameter]: dict(state) for parameter, state in self.state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave, for the same parameters in the same order; those not in it begin anew."""
        members = [parameter for _, parameter, _ in self._parameters()]
        unknown = [place for place in state_dict if not place.isdigit() or int(place) >= len(members)]
        if unknown:
            raise InputError(f"the state is of parameter {unknown[0]!r}, but there are {len(members)} parameters")
        found: dict[Tensor, dict[str, Tensor]] = {}
        for place, saved in state_dict.items():
            parameter = members[int(place)]
            if saved["multiplier_avg"].shape != parameter.shape:
                shapes = f"{tuple(saved['multiplier_avg'].shape)}, not {tuple(parameter.shape)}"
                raise InputError(f"the state of parameter {place} has the shape {shapes}")
            found[parameter] = {name: value.detach().clone().to(parameter.device) for name, value in saved.items()}
        self.state = found

    def _settings(self, group: Mapping[str, Any]) -> Settings:
        return Settings(self.gamma, self.cap, self.ema)

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return self.state.setdefault(parameter, {})

    def _parameters(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        groups = self._source.param_groups if isinstance(self._source, torch.optim.Optimizer) else [self._source]
        first = 0
        for group in groups:
            for name, parameter in zip(names_of(group, first), group["params"], strict=True):
                yield name, parameter, group
            first += len(group["params"])

    def _check(self, name: str, parameter: Tensor) -> None:
        if not parameter.is_floating_point():
            raise InputError(
                f"VRGD takes real parameters, got {name} of {parameter.dtype}: train torch.view_as_real of it"
            )
        if self.process_group is not None and is_spread(parameter):
            raise InputError(
                f"{name} is spread over ranks, so that no rank has its own gradient of it: process_group must be None, "
                "and the groups are micro-batches whose gradients are reduced one by one"
            )

    def _known(self, parameter: Tensor) -> bool:
        return parameter.grad is not None or parameter in self._sums

    def _of(self, parameter: Tensor) -> _Sums:
        if parameter not in self._sums:
            like = part_like(parameter.detach(), parameter)
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self._sums[parameter] = _Sums(*(torch.zeros_like(like, dtype=dtype) for _ in range(2)))
        return self._sums[parameter]

    def _check_number(self, groups: int) -> None:
        if groups < FEWEST_GROUPS:
            raise InputError(
                f"the gradient needs at least two groups, got {groups}: call add_group() after the backward pass of "
                "each micro-batch, and take two micro-batches or more a step"
            )
        if self.groups is not None and groups != self.groups:
            raise InputError(f"the step must have groups={self.groups} groups, got {groups} over all ranks")

    def _smooth(self, parameter: Tensor, group: dict[str, Any], r: Tensor, finite: Tensor) -> None:
        beta3 = self._settings(group).beta3
        if beta3 is None:
            return
        state = self._state_of(parameter, group)
        if "multiplier_avg" not in state:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            state["multiplier_avg"] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            state["multiplier_weight"] = torch.zeros((), dtype=dtype, device=r.device)
        p, b = dense(state["multiplier_avg"], r.dtype), dense(state["multiplier_weight"], r.dtype)
        smooth_(r, p, b, beta3=beta3, finite=finite)
        put_back(state["multiplier_avg"], p)
        put_back(state["multiplier_weight"], b)

    def _over_ranks(self) -> tuple[int, float]:
        """Makes S and M those of all ranks; returns their groups and examples."""
        members = [parameter for _, parameter, _ in self._parameters()]
        device = device_of(self.process_group)
        mine = sum(self._sizes)
        seen = [float(parameter in self._sums) for parameter in members]
        counts = torch.tensor([float(self.added), mine, *seen], dtype=torch.float64, device=device)
        dist.all_reduce(counts, group=self.process_group)
        last = counts.new_zeros(()) if self._last is None else self._last.to(device)
        ends = torch.stack([last, -last])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.process_group)
        groups, examples, *seen = counts.tolist()
        if ends[0] and ends[0] == -ends[1] and dist.get_world_size(self.process_group) > 1:
            raise InputError(
                "all ranks have the same gradient, averaged before finish() could compare them: run the backward "
                "passes in DDP's no_sync() or with keep_local, or set process_group to None"
            )
        sums = [self._of(parameter) for parameter, some in zip(members, seen, strict=True) if some]
        if groups >= FEWEST_GROUPS:
            merge_([each.s for each in sums], [each.m2 for each in sums], mine, examples, self.process_group)
        return int(groups), examples


def _add(found: Sequence[tuple[_Sums, Tensor | None]], examples: float, before: float) -> None:
    numbers: dict[str, Any] = {"examples": examples, "before": before}
    every = [(s, m2, torch.zeros_like(s) if g is None else g.to(s.dtype)) for (s, m2), g in found]
    if every and all(s.device.type == "cuda" for s, _, _ in every):
        alike: dict[Any, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for each in every:
            alike.setdefault((each[0].device, each[0].dtype), []).append(each)
        for bucket in alike.values():
            add_group_foreach_(*(list(column) for column in zip(*bucket, strict=True)), **numbers)
        return
    for s, m2, g in every:
        add_group_(s, m2, g, **numbers)


def _taken(parameter: Tensor) -> Tensor | None:
    gradient, parameter.grad = parameter.grad, None
    return None if gradient is None else part_like(gradient.detach(), parameter)


def _gradient_like(parameter: Tensor, part: Tensor) -> Tensor:
    """This rank's part as a gradient of the parameter, in its dtype and spread as it is."""
    part = part.to(parameter.dtype)
    if not is_spread(parameter):
        return part
    from torch.distributed.tensor import DTensor

    spread: Any = parameter
    whole: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(part, spread.device_mesh, spread.placements, run_check=False, **whole)


def _as_group(params: Any) -> dict[str, Any]:
    given = [params] if isinstance(params, Tensor) else list(params)
    pairs = [each if isinstance(each, tuple) else (None, each) for each in given]
    if not pairs or not all(isinstance(parameter, Tensor) for _, parameter in pairs):
        raise InputError("params must be an optimizer, or tensors or (name, tensor) pairs, at least one")
    members = [parameter for _, parameter in pairs]
    if len(set(members)) < len(members):
        raise InputError("params must name each parameter once, got one that is there twice")
    named = {} if any(name is None for name, _ in pairs) else {"param_names": [name for name, _ in pairs]}
    return {"params": members, **named}
