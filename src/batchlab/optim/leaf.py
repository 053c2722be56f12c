"""What a step takes of each parameter: this rank's part of it, of its gradient and of its state."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor

from batchlab.optim.rule import Sum
from batchlab.optim.state_dtype import in_dtype
from batchlab.parallel.shards import is_spread, share
from batchlab.parallel.sums import PLAIN, Layout, layout_of, sums_over

_NO_GRADIENT = torch.empty(0, device="cpu")


@dataclass(slots=True)
class Leaf:
    """One parameter at one step: what this rank holds of it, in the dtype of the arithmetic.

    given_name, place: see `name`. w, g: weights and gradient (its negative under `maximize`). state: by the names of
    `RuleOptimizer.STATE`. t: the steps this parameter has taken, this one included. shape: of the whole tensor. layout:
    how it is spread. rounded: what is kept in another dtype, beside its value here, which is rounded to it after the
    step. kind: a number of the shell's for leaves alike in all but their step. dtype, address, kept: of the
    weights, where they are, and which tensors the state was of, to tell whether it `goes_on`.
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
    dtype: torch.dtype = torch.float32
    address: int = 0
    kept: tuple[tuple[str, weakref.ref[Tensor]], ...] = ()

    def goes_on(self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Any], *, maximize: bool) -> bool:
        """Takes in another step, where `leaf_of` would make the same of these but for it; False where not."""
        if self.parameter is not parameter or self.rounded or self.layout is not PLAIN:
            return False
        dtype = self.dtype
        if parameter.dtype is not dtype or gradient.dtype is not dtype or parameter.data_ptr() != self.address:
            return False
        found: dict[str, Tensor] = {}
        for key, known in self.kept:
            value = cast(Tensor, state.get(key))
            if value is None or known() is not value or value.dtype is not dtype:
                return False
            found[key] = value
        if len(found) != len(state) - 1:
            return False
        self.state, self.g, self.t = found, gradient.neg() if maximize else gradient, int(state["step"].item())
        return True

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
    leaf = Leaf(given_name, place, parameter, w, g, fine, step, parameter.shape, layout, rounded)
    leaf.dtype, leaf.address = dtype, 0 if spread else parameter.data_ptr()
    leaf.kept = tuple((key, weakref.ref(value)) for key, value in fine.items())
    return leaf


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
    if any(optimizer.state.values()) or any(float(group["lr"]) != 0 for group in groups):
        return False
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if not gradients or any(each.is_sparse for each in gradients):
        return False
    counts = [Sum(share(each).part.count_nonzero()) for each in gradients]
    return not any(sums_over(counts, [layout_of(each) for each in gradients]))


def names_of(group: Mapping[str, Any], first: int = 0) -> list[str]:
    """The group's own names, else the parameters' places, from `first` on, and shapes."""
    given = group.get("param_names", [None] * len(group["params"]))
    return [name_at(*each) for each in zip(given, count(first), [p.shape for p in group["params"]])]


def name_at(given: str | None, place: int, shape: torch.Size) -> str:
    """The given name, if any, else one by place and shape."""
    return given or f"parameter {place} of shape {tuple(shape)}"
