"""What a step takes of each parameter: this rank's part of it, of its gradient and of its state."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from operator import attrgetter, is_
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from batchlab.core.errors import InputError
from batchlab.optim.rule import Sum
from batchlab.optim.state_dtype import in_dtype
from batchlab.parallel.shards import is_spread, share
from batchlab.parallel.sums import PLAIN, Layout, layout_of, sums_over

_dtype, _there = attrgetter("dtype"), weakref.ref.__call__
_NO_GRADIENT = torch.empty(0, device="cpu")


@dataclass(slots=True)
class Leaf:
    """One parameter at one step: what this rank holds of it, in the dtype of the arithmetic.

    given_name, place: see `name`. w, g: weights and gradient (its negative under `maximize`). state: by the names of
    `RuleOptimizer.STATE`. t: the steps this parameter has taken, this one included. shape: of the whole tensor. layout:
    how it is spread. rounded: what is kept in another dtype, beside its value here, which is rounded to it after the
    step. kind: a number of the shell's for leaves alike in all but their step.
    """

    given_name: str | None
    place: int
    parameter: Tensor
    w: Tensor
    g: Tensor
    state: dict[str, Tensor]
    t: int
    shape: torch.Size
    layout: Layout
    rounded: list[tuple[Tensor, Tensor]]
    kind: int = -1

    def rest(self) -> None:
        """Between steps it keeps neither a gradient nor a state alive, which others may take away to free memory."""
        self.g, self.state = _NO_GRADIENT, {}

    @property
    def name(self) -> str:
        """The one given with the parameter, else its place among all and its shape."""
        return name_at(self.given_name, self.place, self.shape)


def leaf_of(
    given_name: str | None,
    place: int,
    parameter: Tensor,
    gradient: Tensor,
    state: Mapping[str, Any],
    *,
    maximize: bool,
) -> Leaf:
    """A parameter and its gradient, which the layout of the parameter is given."""
    held, layout = parameter, PLAIN
    spread = is_spread(parameter)
    if spread:
        held, layout = parameter.detach(), layout_of(parameter)
        if cast(Any, gradient).placements != cast(Any, parameter).placements:
            gradient = cast(Any, gradient).redistribute(placements=cast(Any, parameter).placements)
        held, gradient = share(held).part, share(gradient).part
    dtype = wide(held.dtype)
    w, g = in_dtype(held, dtype), in_dtype(gradient, dtype)
    fine: dict[str, Tensor] = {}
    rounded = [] if w is held else [(held, w)]
    for key, value in state.items():
        if key != "step" and isinstance(value, Tensor):
            kept = share(value).part if spread else value
            fine[key] = value = in_dtype(kept, dtype)
            if value is not kept:
                rounded.append((kept, value))
    step = int(state["step"].item())
    g = g.neg() if maximize else g
    return Leaf(given_name, place, parameter, w, g, fine, step, parameter.shape, layout, rounded)


class Steady:
    """Leaves of plain parameters in the dtype of the arithmetic, which go on from step to step as long as nothing but
    gradients and values changes: to tell that of all at once takes a fraction of what `leaf_of` does for each.
    """

    def __init__(self, leaves: list[Leaf], states: Sequence[dict[str, Any]]) -> None:
        self.leaves = leaves
        self._parameters = [leaf.parameter for leaf in leaves]
        self._dtypes = [leaf.w.dtype for leaf in leaves]
        self._addresses = [leaf.w.data_ptr() for leaf in leaves]
        self._names = [list(state) for state in states]
        values = _values(states)
        self._kept, self._kept_dtypes = list(map(weakref.ref, values)), list(map(_dtype, values))

    @staticmethod
    def fits(leaves: Sequence[Leaf], states: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the leaves are what it is for, and their states of tensors alone."""
        return all(not leaf.rounded and leaf.layout is PLAIN for leaf in leaves) and all(
            isinstance(value, Tensor) for state in states for value in state.values()
        )

    def goes_on(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[dict[str, Any]]
    ) -> bool:
        """Whether `leaf_of` would make the same leaves of these, but for gradients and steps."""
        if len(parameters) != len(self.leaves) or not all(map(is_, parameters, self._parameters)):
            return False
        values = _values(states)
        if list(map(list, states)) != self._names or type(None) in set(map(type, values)):
            return False
        return (
            all(map(is_, values, map(_there, self._kept)))
            and list(map(_dtype, values)) == self._kept_dtypes
            and list(map(_dtype, parameters)) == self._dtypes == list(map(_dtype, gradients))
            and list(map(Tensor.data_ptr, parameters)) == self._addresses
        )

    def take(self, gradients: Sequence[Tensor], states: Sequence[dict[str, Any]], *, maximize: bool) -> None:
        """Makes of the leaves those of another step, which is counted already."""
        if maximize:
            gradients = torch._foreach_neg(list(gradients))
        for leaf, gradient, state in zip(self.leaves, gradients, states, strict=True):
            leaf.g, leaf.state, leaf.t = gradient, state, int(state["step"].item())


def _values(states: Sequence[dict[str, Any]]) -> list[Any]:
    return [value for state in states for value in state.values()]


@cache
def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def plain(tensors: Sequence[Tensor]) -> bool:
    """Whether torch's fused kernels take what a rule takes of a leaf: one size, dtype and memory order, on a CPU.

    They want numbers, for which a GPU would have to be waited for; and sizes that differ they do not refuse.
    """
    w = tensors[0]
    alike = all(each.is_cpu and each.dtype == w.dtype and each.shape == w.shape for each in tensors)
    return alike and all(each.is_contiguous() for each in tensors)


def total_norm(leaves: Sequence[Leaf]) -> Tensor:
    """|g| over all tensors together, whole ones: on the first one's device, on all ranks the same."""
    requests = [Sum(leaf.g.square().sum()) for leaf in leaves]
    sums = sums_over(requests, [leaf.layout for leaf in leaves])
    return torch.stack([each.to(sums[0].device) for each in sums]).sum().sqrt() if sums else torch.zeros(())


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 has it, as one buffer of many or as this rank's piece of one; alone in its world it is whole."""
    if getattr(parameter, "_is_flat_param", False):
        return True
    return getattr(parameter, "_fsdp_flattened", False) and torch.distributed.get_world_size() > 1


def asks_for_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step can only mean that the state is wanted, as torch.distributed.checkpoint does before it loads:
    there is none yet, all rates are 0, and the gradients are there and all 0, over all ranks.
    """
    groups = optimizer.param_groups
    if any(optimizer.state.values()) or any(float(group.get("lr", 1)) != 0 for group in groups):
        return False
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if not gradients or any(each.is_sparse for each in gradients):
        return False
    counts = [Sum(share(each).part.count_nonzero()) for each in gradients]
    return not any(sums_over(counts, [layout_of(each) for each in gradients]))


def checkpoint_calls() -> bool:
    """Whether torch.distributed.checkpoint is what calls, by whatever way: to have the state of an optimizer made.

    For optimizers whose replicas have gradients of their own, of which one may be 0: `asks_for_state` would part them.
    """
    return _called_from("torch.distributed.checkpoint.state_dict")


def check_not_in_zero(what: str) -> None:
    """Refuses to be made by torch's `ZeroRedundancyOptimizer`, which gives each rank's optimizer a part of the tensors.

    what: looks at all tensors together.
    """
    if _called_from("torch.distributed.optim.zero_redundancy_optimizer"):
        raise InputError(
            f"{what} is over all tensors together, and ZeroRedundancyOptimizer gives each rank some of them: shard "
            "with torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def _called_from(module: str) -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False


def names_of(group: Mapping[str, Any], first: int = 0) -> list[str]:
    """The group's own names, else the parameters' places, from `first` on, and shapes."""
    given = group.get("param_names", [None] * len(group["params"]))
    return [name_at(*each) for each in zip(given, count(first), [p.shape for p in group["params"]])]


def name_at(given: str | None, place: int, shape: torch.Size) -> str:
    """The given name, if any, else one by place and shape."""
    return given or f"parameter {place} of shape {tuple(shape)}"
