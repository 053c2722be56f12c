"""Optimizers whose step takes the gradient in groups: the half that those of VRGD share (see `vrgd.optimizers`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.core.checks import check_inside
from batchlab.optim.leaf import asks_for_state, names_of
from batchlab.optim.shell import RuleOptimizer
from batchlab.optim.vrgd.multiplier import check_multiplier
from batchlab.optim.vrgd.vrgd import Settings, VRGradient


class InGroups(torch.optim.Optimizer):
    """An optimizer that owns the `VRGradient` of its parameters; to be named before the base in a class's bases.

    gamma, cap and beta3 are options of parameter groups, read at each step: gamma=1 leaves a group to the base.
    """

    gradient: VRGradient
    _own: dict[str, Any]

    def _start(self, groups: int | None, process_group: dist.ProcessGroup | None) -> None:
        self.defaults |= self._own
        self.gradient = _Owned(self, groups, process_group=process_group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base's."""
        for name, value in self._own.items():
            param_group.setdefault(name, value)
        check_multiplier(param_group["gamma"], param_group["cap"])
        if "beta3" in param_group:
            check_inside(beta3=param_group["beta3"])
        super().add_param_group(param_group)

    def add_group(self, *, examples: float | None = None) -> None:
        """Takes one group's gradient out of `.grad`: after each micro-batch's backward pass; see `VRGradient`."""
        self.gradient.add_group(examples=examples)

    def finish(self) -> None:
        """Writes the multiplied gradient into `.grad`, for what comes before the step: to clip it, or to unscale it."""
        self.gradient.finish()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the groups since the last one. closure: runs the backward passes, with `add_group` each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.gradient.finished:
            if not self.gradient.added and asks_for_state(self):
                self._make_state()
                return loss
            self.gradient.finish()
        self.gradient.finished = False
        _without_hooks(super().step, self)()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; the groups of an unfinished step are forgotten too."""
        super().zero_grad(set_to_none)
        self.gradient.discard()

    def report(self) -> dict[str, dict[str, float]]:
        """What the base notes, and the `multiplier` and `at_gamma` of `VRGradient.report`, by parameter."""
        found: dict[str, dict[str, float]] = getattr(super(), "report", dict)()
        for name, noted in self.gradient.report().items():
            found.setdefault(name, {}).update(noted)
        return found

    def _make_state(self) -> None:
        _without_hooks(super().step, self)()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("gradient", "_own", "max_grad_norm")
        return super().__getstate__() | {name: self.__dict__[name] for name in kept if name in self.__dict__}


class _Owned(VRGradient):
    """The `VRGradient` of an optimizer: settings in its groups, the momentum of r in its state."""

    def _parameters(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        first = 0
        for group in cast(InGroups, self._source).param_groups:
            for name, parameter in zip(names_of(group, first), group["params"], strict=True):
                yield name, parameter, group
            first += len(group["params"])

    def _settings(self, group: Mapping[str, Any]) -> Settings:
        optimizer = cast(InGroups, self._source)
        own = {name: group.get(name, value) for name, value in optimizer._own.items()}
        return Settings(own["gamma"], own["cap"], own.get("beta3"))

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return cast(RuleOptimizer, self._source).state_of(parameter, group)


def _without_hooks(step: Callable[..., Any], optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    """A base's step as it was before torch wrapped it for the base's own instances: our hooks would run twice."""
    return partial(cast(Any, step).__wrapped__, optimizer) if getattr(step, "hooked", False) else step
