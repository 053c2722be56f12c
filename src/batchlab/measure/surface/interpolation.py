"""The loss on the line through two models: θ(a) = θ₁ + a·(θ₂ - θ₁) (Goodfellow et al. 2015; Li et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.measure.surface.directions import bare, wide
from batchlab.measure.surface.displaced import Loss, MeanLoss, Weights, displaceable
from batchlab.measure.surface.grid_points import Array, check_alike, fill, given_axis

Mode = Literal["states", "weights"]


@dataclass(frozen=True)
class Interpolation(JsonNoun):
    """losses: L(θ(a)) at each a of `x`, in the loss's own unit: infinite where it is not finite.

    mode: "states" or "weights", as in `interpolate`. examples: of one pass.
    """

    x: tuple[float, ...]
    losses: tuple[float, ...]
    mode: str
    examples: int

    @property
    def non_finite(self) -> int:
        """How many points had a loss that is not finite."""
        return sum(map(math.isinf, self.losses))

    @property
    def barrier(self) -> float:
        """The most by which the curve lies above the straight line between its two ends a = 0 and a = 1, at least 0.

        NaN where these are not points of it, or are not finite.
        """
        ends = {a: f for a, f in zip(self.x, self.losses, strict=True) if a in (0.0, 1.0)}
        if len(ends) < 2 or not all(map(math.isfinite, ends.values())):
            return math.nan
        inside = [(a, f) for a, f in zip(self.x, self.losses, strict=True) if 0 <= a <= 1]
        return max(f - (1 - a) * ends[0.0] - a * ends[1.0] for a, f in inside)


def interpolate(
    model_a: nn.Module,
    model_b: nn.Module,
    loss: Loss,
    data: Iterable[Any],
    *,
    low: float = -0.5,
    high: float = 1.5,
    points: int = 401,
    coordinates: Sequence[float] | None = None,
    mode: Mode = "states",
    count: Callable[[Any], int] | None = None,
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
    progress: Callable[[Interpolation], None] | None = None,
) -> Interpolation:
    """The mean loss at weights on the line through those of `model_a` (a = 0) and `model_b` (a = 1).

    low, high, points: 401 points from -0.5 to 1.5, as in the reference code. coordinates: the a in their place.
    mode: "states" moves all floating-point entries of the state dict, batch norm's running statistics too, without
        which the line does not end in `model_b`; integer ones, as the number of batches seen, stay those of `model_a`.
        "weights" moves parameters alone.
    loss, data, count, process_group, progress: as for `landscape`.

    At a = 0 and 1 the weights are those of the models bit for bit. Beyond them a running variance may become negative:
    the loss is then not finite, stored as infinite and counted. `model_a` is evaluated in evaluation mode and given
    back bit for bit; `model_b` is only read.

    Not for telling which of two minima is sharper: by weight decay alone either can be made to look so (Li et al. 2018,
    section 3). Take `landscape` with filter normalisation for that.

    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = a.weight.data.fill_(1.0), b.weight.data.fill_(3.0)
    >>> square = lambda model, batch: (model(batch) ** 2).mean()
    >>> interpolate(a, b, square, [torch.ones(3, 1)], coordinates=[0, 0.5, 1]).losses
    (1.0, 4.0, 9.0)
    """
    x = _between(low, high, points) if coordinates is None else given_axis(coordinates, "coordinates", 2)
    if mode not in ("states", "weights"):
        raise InputError(f'mode must be "states" or "weights", got {mode!r}')
    with displaceable(model_a) as weights:
        ends = _ends(bare(model_a), bare(model_b), weights, mode)
        line = {name: _difference(weights.origin[name], end) for name, end in ends.items()}
        mean = MeanLoss(model_a, loss, data, count, seed)
        check_alike([mean()], process_group, "weights and data")
        start = Interpolation(x, (math.nan,) * len(x), mode, mean.examples)

        def evaluate(point: int) -> list[float]:
            weights.move([x[point]], [line])
            if x[point] == 1:
                for name, end in ends.items():
                    weights.tensors[name].copy_(end)
            return [mean()]

        def made(values: Array) -> Interpolation:
            return replace(start, losses=tuple(values[:, 0].tolist()))

        report = None if progress is None else lambda values: progress(made(values))
        return made(fill(np.full((len(x), 1), math.nan), evaluate, process_group, report))


def _between(low: float, high: float, points: int) -> tuple[float, ...]:
    """Weighted means of the ends, so that round numbers are met exactly."""
    if not (isinstance(points, int) and points >= 2 and -math.inf < low < high < math.inf):
        raise InputError(f"points must be at least 2 and low below high, got points={points!r}, {low!r} to {high!r}")
    last = points - 1
    return tuple((low * (last - k) + high * k) / last for k in range(points))


def _ends(a: nn.Module, b: nn.Module, weights: Weights, mode: Mode) -> dict[str, Tensor]:
    """What differs between the models, as it is in the second one, by its name in the first."""
    first, second = _entries(a, mode), _entries(b, mode)
    if set(first) != set(second):
        odd = sorted(set(first) ^ set(second))[0]
        raise InputError(f"model_a and model_b must have the same entries, {odd!r} is in one of them only")
    ends = {}
    for name, mine in first.items():
        theirs = second[name]
        if mine.shape != theirs.shape:
            raise InputError(
                f"model_a and model_b must have the same shapes, {name!r} has {tuple(mine.shape)} and "
                f"{tuple(theirs.shape)}"
            )
        if name not in weights.tensors or not mine.is_floating_point():
            continue
        end = theirs.detach().to(mine.device, mine.dtype)
        if not torch.equal(end, mine):
            ends[name] = end
    return ends


def _entries(model: nn.Module, mode: Mode) -> dict[str, Tensor]:
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    kept = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**parameters, **buffers} if mode == "states" else parameters


def _difference(start: Tensor, end: Tensor) -> Tensor:
    """end - start in float32 at least; 0 where they are equal, infinite ones too."""
    a, b = start.to(wide(start.dtype)), end.to(wide(start.dtype))
    return torch.where(a == b, torch.zeros_like(a), b - a)
