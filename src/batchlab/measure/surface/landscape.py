"""The loss around trained weights, along filter-normalised directions (Li et al. 2018, arXiv 1712.09913).

f(a) = L(θ + a·d) and f(a, b) = L(θ + a·d₁ + b·d₂). L is the mean loss over all examples in evaluation mode, without
a weight decay term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.core.random import derive_seed
from batchlab.measure.surface.directions import Axes, Direction, check_settings, random_direction, trainable, wide
from batchlab.measure.surface.displaced import Loss, MeanLoss, displaceable
from batchlab.measure.surface.grid_points import Array, check_alike, fill, given_axis, symmetric
from batchlab.measure.surface.level_width import Reach, median_width, reach

DIRECTIONS = 10
_SAME = 1e-6


@dataclass(frozen=True)
class Landscape(JsonNoun):
    """Losses along directions from the weights θ, in the loss's own unit.

    dimensions: 1, then `x` are the steps a, `y` is empty and `losses` has one row for each direction; or 2, then
    `losses[i][j]` is f(x[i], y[j]). A loss that is not finite is infinite here; NaN is a point not yet evaluated.
    origin: f(0). examples: of one pass. direction_norms: ‖d‖ of each direction over all weights.
    norm, ignore, seed: how the directions were drawn, as in `random_direction`; norm is "given" for the caller's own.
    """

    dimensions: int
    x: tuple[float, ...]
    y: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    origin: float
    examples: int
    direction_norms: tuple[float, ...]
    norm: str
    ignore: str | None
    seed: int

    def __post_init__(self) -> None:
        rows, columns = (len(self.x), len(self.y)) if self.dimensions == 2 else (len(self.direction_norms), len(self.x))
        if len(self.losses) != rows or any(len(row) != columns for row in self.losses):
            raise InputError(f"a landscape's losses must be {rows} rows of {columns}, got {len(self.losses)} rows")

    @property
    def non_finite(self) -> int:
        """How many points had a loss that is not finite."""
        return sum(math.isinf(loss) for row in self.losses for loss in row)

    @property
    def unfilled(self) -> int:
        """How many points are still to be evaluated."""
        return sum(math.isnan(loss) for row in self.losses for loss in row)

    def widths(self, level: float) -> tuple[float, ...]:
        """Of each direction: the distance in a between the nearest points on both sides of 0 where f = f(0) + level.

        level: in the loss's unit, > 0. Infinite where f stays below it up to an end of `x`. Linear between points: too
        short on a convex curve, by less than one step on each side.
        """
        return tuple(each.value for each in self._reaches(level))

    def width(self, level: float, *, coverage: float = 0.95) -> Estimate:
        """The median width at `level` over random directions, with an interval for the median of all directions.

        The interval lies between order statistics of the directions and assumes nothing of their distribution; its
        own coverage is stated, and is below the wish where fewer than 6 directions allow no more. It holds the grid's
        own error, up to one step on each side: more points narrow it. A direction that does not reach the level
        counts as at least as wide as what was seen of it: the median may then be undefined, and the interval open.
        Directions that the caller gave are no sample, and have no interval.

        It holds for these weights: other seeds of training have other minima.
        Compare two models only with the same `x`, norm and level, and only where neither is censored. Half precision
        rounds small steps away.
        """
        return median_width(self._reaches(level), coverage=coverage, sampled=self.norm != "given")

    def profile(self) -> tuple[tuple[float, float, float, float], ...]:
        """(a, median, least, largest) over the directions at each step; for pictures of a 1-D landscape."""
        self._check_line()
        columns = np.array(self.losses, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            middle = np.median(columns, axis=0)
        rows = zip(self.x, middle, columns.min(axis=0), columns.max(axis=0), strict=True)
        return tuple((float(a), float(m), float(low), float(high)) for a, m, low, high in rows)

    def _reaches(self, level: float) -> list[Reach]:
        self._check_line()
        if not 0 < level < math.inf:
            raise InputError(f"level must be finite and > 0, in the loss's unit, got {level!r}")
        return [reach(self.x, row, self.origin, level) for row in self.losses]

    def _check_line(self) -> None:
        if self.dimensions != 1:
            raise InputError("widths and profiles are of a landscape of 1 dimension, this one has 2")
        if self.unfilled:
            raise InputError(f"{self.unfilled} points are not evaluated yet: give the landscape as resume first")


def landscape(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Any],
    *,
    dimensions: int = 1,
    points: int = 51,
    span: float = 1.0,
    norm: str = "filter",
    ignore: str | None = "biasbn",
    directions: int | Sequence[Direction] | None = None,
    coordinates: Sequence[float] | tuple[Sequence[float], Sequence[float]] | None = None,
    axes: Axes | None = None,
    count: Callable[[Any], int] | None = None,
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
    resume: Landscape | None = None,
    progress: Callable[[Landscape], None] | None = None,
) -> Landscape:
    """The loss along random directions from the model's weights, or over the plane of two of them.

    loss: `(model, batch) ->` scalar mean over the batch's examples, as a job's loss is. data: batches that can be gone
        through at every point, as a list or a DataLoader, without augmentation; the last may be smaller. One pass a
        point: (points - 1)·directions + 1 passes, or points².
    dimensions: 1 for f(a) along several directions, 2 for f(a, b) over one plane.
    points, span: odd number of points from -span to span on each axis; 51 and 1 as in the paper. coordinates: the
        steps themselves in their place, ascending; a pair of them for 2 dimensions.
    norm, ignore, axes: of the directions, see `random_direction`. The second is drawn as the first is, and is nearly
        orthogonal to it where there are many weights.
    directions: how many (10 by default; 2 dimensions take 2), or the caller's own, name -> tensor, used as they are.
    count: the examples of a batch, by default its tensors' first dimension; where `loss` is the mean over tokens, the
        tokens.
    process_group: ranks that share the points out. All hold the same weights and data, and all get the whole result.
    resume: a landscape with the same settings; only its NaN points are evaluated. progress: called after each point
        with what is there by then; what it raises ends the work, and the last landscape it got can be resumed.

    The model is in evaluation mode meanwhile; weights, buffers, modes and generators are given back bit for bit,
    whatever happens. Each point gets the same random numbers, if the loss draws any.

    Not for: comparing models by un-normalised directions, where scaling weights alone makes a minimum sharp; a verdict
    from one direction or one plane, which is a slice through very many dimensions; models with sharded parameters.

    Raises `InputError` where the loss at the weights themselves is not finite.

    >>> line = nn.Linear(1, 1, bias=False)
    >>> _ = line.weight.data.fill_(2.0)
    >>> square = lambda model, batch: (model(batch) ** 2).mean()
    >>> d = {"weight": torch.ones(1, 1)}
    >>> landscape(line, square, [torch.ones(3, 1)], points=3, directions=[d]).losses
    ((1.0, 4.0, 9.0),)
    """
    x, y = grid_axes(dimensions, points, span, coordinates)
    drawn = chosen_directions(model, dimensions, directions, norm, ignore, axes, seed)
    own = not (directions is None or isinstance(directions, int))
    start = _unfilled(dimensions, x, y, drawn, "given" if own else norm, None if own else ignore, seed)
    with displaceable(model) as weights:
        mean = MeanLoss(model, loss, data, count, seed)
        origin = mean()
        if not math.isfinite(origin):
            raise InputError("the loss at the model's own weights is not finite: there is no landscape around them")
        check_alike([origin], process_group, "weights and data")
        start = replace(start, origin=origin, examples=mean.examples)
        if resume is not None:
            start = replace(start, losses=_same_settings(resume, start).losses)

        def evaluate(point: int) -> list[float]:
            i, j = divmod(point, len(start.losses[0]))
            steps, along = ((x[i], y[j]), drawn) if dimensions == 2 else ((x[j],), drawn[i : i + 1])
            if not any(steps):
                return [origin]
            weights.move(steps, along)
            return [mean()]

        def made(values: Array) -> Landscape:
            return replace(start, losses=tuple(map(tuple, values.reshape(len(start.losses), -1).tolist())))

        report = None if progress is None else lambda values: progress(made(values))
        return made(fill(np.array(start.losses).reshape(-1, 1), evaluate, process_group, report))


def _unfilled(
    dimensions: int,
    x: tuple[float, ...],
    y: tuple[float, ...],
    directions: Sequence[Direction],
    norm: str,
    ignore: str | None,
    seed: int,
) -> Landscape:
    rows, columns = (len(x), len(y)) if dimensions == 2 else (len(directions), len(x))
    losses = ((math.nan,) * columns,) * rows
    return Landscape(dimensions, x, y, losses, math.nan, 0, _norms(directions), norm, ignore, seed)


def grid_axes(
    dimensions: int,
    points: int,
    span: float,
    coordinates: Sequence[float] | tuple[Sequence[float], Sequence[float]] | None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The steps along each axis, none along a second one of a line."""
    if dimensions not in (1, 2):
        raise InputError(f"dimensions must be 1 or 2, got {dimensions!r}")
    if coordinates is None:
        axis = symmetric(points, span)
        return axis, axis if dimensions == 2 else ()
    pair: Any = coordinates
    nested = len(pair) == 2 and not any(isinstance(each, (int, float)) for each in pair)
    if nested != (dimensions == 2):
        raise InputError(f"coordinates must be {'a pair of axes' if dimensions == 2 else 'one axis'}, got {pair!r:.80}")
    if dimensions == 1:
        return given_axis(pair, "coordinates", 2), ()
    return given_axis(pair[0], "coordinates[0]", 1), given_axis(pair[1], "coordinates[1]", 1)


def chosen_directions(
    model: nn.Module,
    dimensions: int,
    directions: int | Sequence[Direction] | None,
    norm: str,
    ignore: str | None,
    axes: Axes | None,
    seed: int,
) -> list[dict[str, Tensor]]:
    """The caller's directions, checked, or random ones; without the parameters that they leave where they are."""
    check_settings(norm, ignore)
    number = (2 if dimensions == 2 else DIRECTIONS) if directions is None else directions
    if isinstance(number, int):
        if isinstance(number, bool) or number < 1 or (dimensions == 2 and number != 2):
            raise InputError(f"directions must be {'2' if dimensions == 2 else 'at least 1'}, got {number!r}")
        seeds = [derive_seed(seed, "landscape", k) for k in range(number)]
        found = [random_direction(model, seed=each, norm=norm, ignore=ignore, axes=axes) for each in seeds]
    else:
        if not number or (dimensions == 2 and len(number) != 2):
            raise InputError(f"directions must be {'2' if dimensions == 2 else 'at least 1'}, got {len(number)}")
        found = [_checked(model, each) for each in number]
    return [{name: d for name, d in each.items() if d.any()} for each in found]


def _checked(model: nn.Module, direction: Direction) -> dict[str, Tensor]:
    if not isinstance(direction, Mapping):
        raise InputError(f"a direction must be a mapping of name to tensor, got {type(direction).__name__}")
    parameters, checked = trainable(model), {}
    for name, d in direction.items():
        if name not in parameters or parameters[name].shape != d.shape:
            known = tuple(parameters[name].shape) if name in parameters else "no trainable parameter of this name"
            raise InputError(f"a direction must fit the model: {name!r} has {tuple(d.shape)}, the model {known}")
        if not d.isfinite().all():
            raise InputError(f"a direction must be finite, that of {name!r} is not")
        checked[name] = d.detach().to(parameters[name].device, wide(parameters[name].dtype))
    return checked


def _norms(directions: Sequence[Direction]) -> tuple[float, ...]:
    squares = [[torch.linalg.vector_norm(d).item() for d in each.values()] for each in directions]
    return tuple(math.hypot(*each) for each in squares)


def _same_settings(resume: Landscape, start: Landscape) -> Landscape:
    if not isinstance(resume, Landscape):
        raise InputError(f"resume must be a Landscape, got {type(resume).__name__}")
    for name in ("dimensions", "x", "y", "norm", "ignore", "seed", "examples"):
        if getattr(resume, name) != getattr(start, name):
            there, now = getattr(resume, name), getattr(start, name)
            raise InputError(f"resume must have the same {name}: {there!r:.60} there, {now!r:.60} now")
    held, fresh = (resume.origin, *resume.direction_norms), (start.origin, *start.direction_norms)
    if len(held) != len(fresh) or not all(map(_close, held, fresh)):
        raise InputError("resume must be of the same weights, data and directions: its f(0) or direction norms differ")
    return resume


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_SAME, abs_tol=1e-12)
