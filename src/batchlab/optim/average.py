"""Averages of the weights along training, counted in examples, so that they mean the same at any batch size."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from batchlab.core.checks import holds
from batchlab.core.errors import InputError


class WeightAverage:
    """ζ, a weighted mean of the weights after each update; the weights before the first one have no part in it.

    half_life: examples after which a contribution has lost half its weight (an exponential average); an update
    with n examples keeps 2^(-n/half_life), the scaling rule ρ̂ = ρ^κ of Busbridge et al. 2023. power: in its place,
    the p of a polynomial average, Σ (xₜ^(p+1) - xₜ₋₁^(p+1))·θₜ over positions x: about the last 1/(p + 1) of the run,
    whatever its length (Shamir and Zhang 2013).

    `module` is a copy of the model that holds ζ; integer buffers and running statistics are copied, not averaged. Of
    weights in half precision ζ is kept in float32, and `module` holds it rounded: at a small share of a new value a
    half-precision average would stand still.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> average = WeightAverage(model, power=0.0)
    >>> for value in (1.0, 2.0, 6.0):
    ...     _ = nn.init.constant_(model.weight, value)
    ...     average.update(model, examples=8)
    >>> average.module.weight.item()
    3.0
    """

    def __init__(self, model: nn.Module, *, half_life: float | None = None, power: float | None = None) -> None:
        if (half_life is None) == (power is None):
            raise InputError(f"give one of half_life and power, got half_life={half_life!r}, power={power!r}")
        if half_life is not None and not 0 < half_life < math.inf:
            raise InputError(f"half_life must be finite and > 0 examples, got {half_life!r}")
        if power is not None and not 0 <= power < float("inf"):
            raise InputError(f"power must be finite and >= 0, got {power!r}")
        self.half_life, self.power = half_life, power
        self._averaged = AveragedModel(model, multi_avg_fn=self._lerp)
        self._weight, self._position, self._share = 0.0, 0, 1.0
        self._fine = {name: p.detach().float() for name, p in self.module.named_parameters() if _half(p)}
        self._known: weakref.ref[nn.Module] | None = None
        self._count = len(list(model.parameters()))

    @property
    def module(self) -> nn.Module:
        """The copy that holds the average."""
        inner: nn.Module = self._averaged.module
        return inner

    @property
    def empty(self) -> bool:
        """Whether nothing was averaged yet."""
        return self._weight == 0.0

    def update(self, model: nn.Module, examples: int) -> None:
        """Takes in the weights after an update with `examples` examples."""
        if not holds(lambda n: 1 <= n < math.inf, examples):
            raise InputError(f"examples must be at least 1, got {examples!r}")
        grown = len(list(model.parameters())) != self._count
        if grown or self._known is None or self._known() is not model:
            self._check(model)
        self._position += examples
        log_kept = self._log_kept(examples)
        new = -math.expm1(log_kept)
        self._weight = math.exp(log_kept) * self._weight + new
        self._share = new / self._weight
        self._averaged.update_parameters(model)
        self._update_fine(model)

    def _check(self, model: nn.Module) -> None:
        """Refuses a model whose parameters are of other shapes, which might be broadcast."""
        mine, theirs = ({name: tuple(p.shape) for name, p in each.named_parameters()} for each in (self.module, model))
        if len(mine) != len(theirs):
            raise InputError(f"model must have the {len(mine)} parameters that are averaged, got {len(theirs)}")
        for (name, shape), other in zip(mine.items(), theirs.values(), strict=True):
            if shape != other:
                raise InputError(f"model's parameter {name} must be of the shape averaged, {shape}, got {other}")
        self._known = weakref.ref(model)

    @torch.no_grad()
    def _update_fine(self, model: nn.Module) -> None:
        if self._fine:
            for (name, average), weights in zip(self.module.named_parameters(), model.parameters(), strict=True):
                if name in self._fine:
                    fine = self._fine[name]
                    average.copy_(fine.lerp_(weights.to(fine.device, torch.float32), self._share))

    def _log_kept(self, examples: int) -> float:
        if self.half_life is not None:
            return -math.log(2) * examples / self.half_life
        assert self.power is not None
        before = self._position - examples
        return (self.power + 1.0) * math.log(before / self._position) if before else -math.inf

    @torch.no_grad()
    def _lerp(self, averages: Any, weights: Any, _: Tensor | int) -> None:
        """ζ ← ζ + (θ - ζ)·(1 - kept)/W, W the sum of all contributions' weights so far."""
        torch._foreach_lerp_(list(averages), list(weights), self._share)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": None}  # a weak reference cannot be pickled

    def state_dict(self) -> dict[str, Any]:
        """The average, its weight and its position."""
        state = {"averaged": self._averaged.state_dict(), "weight": self._weight, "position": self._position}
        return state | ({"fine": dict(self._fine)} if self._fine else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self._averaged.load_state_dict(state["averaged"])
        self._weight, self._position = state["weight"], state["position"]
        rounded = dict(self.module.named_parameters())
        for name, fine in self._fine.items():
            fine.copy_(state.get("fine", rounded)[name].detach())


def _half(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.element_size() < 4
