"""The telescoping sweep: tune hyper-parameters across widths under μP at about one cost a width (arXiv 2505.02222).

Shah et al. 2025. k hyper-parameters, m points each at the base width N₀: a full grid of m^k runs. Under μP the optimum
moves as x*(n) = x* - α/n, and a run costs (n/N₀)² as much at the same number of tokens, 4 times for a doubling. So at
each doubling of the width the points of an axis and their spacing, the mesh, shrink by 4^(-1/k), around the last best:

  m_s = m·4^(-s/k),   h_s = h₀·4^(-s/k),   runs·cost = m^k at every width,   in all about log₂(N/N₀) + 1 such sweeps.

Two errors stay, and are told apart: half a mesh, and the drift α/n. A grid sees the optimum only where its reach,
m_s·h_s/2 to either side of the last best, is wider than half the mesh before plus the drift since. With fewer than
4^(1/k) points it does not reach even that half mesh: one axis alone wants many points. The reach shrinks by 4^(-2/k),
the drift by 2. With two axes and odd counts of points (m = 8: 8, 5, 3, 1, as in a figure of the source) the best at the
last width is within a mesh of the last grid of the optimum if the first doubling moves that by at most a quarter of the
first mesh. Where a best lies at the edge of its grid, the optimum may be beyond it: then the sweep says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from batchlab.core.checks import check_count, holds
from batchlab.core.errors import InputError
from batchlab.core.jsonio import from_plain, loads
from batchlab.rules.telescope_nouns import Drift, Stage, Suggestion, Telescoped, TelescopeState

_NEAR = 1e-9


def telescope(
    evaluate: Callable[[int, Mapping[str, float]], float],
    space: Mapping[str, tuple[float, float]],
    widths: Sequence[int],
    *,
    points: int = 8,
    odd: bool = True,
    linear: Iterable[str] = (),
) -> Telescoped:
    """Runs the whole sweep. evaluate: `(width, settings) -> loss` of one run, lower is better; not finite: it diverged.

    The others as of `Telescope`, which gives and takes one run at a time, for machines that run them side by side.

    >>> loss = lambda width, x: (math.log2(x["lr"]) + 6 + 16 / width) ** 2
    >>> found = telescope(loss, {"lr": (2**-10, 2**-2)}, [32, 64, 128], points=9)
    >>> [stage.runs for stage in found.stages], round(math.log2(found.best["lr"]), 2)
    ([9, 3, 1], -6.25)
    """
    sweep = Telescope(space, widths, points=points, odd=odd, linear=linear)
    while not sweep.done:
        for each in sweep.suggest():
            sweep.observe(each, evaluate(each.width, each.values))
    return sweep.result()


class Telescope:
    """A telescoping sweep, one run at a time: `suggest` says what to run, `observe` takes its loss, `result` sums up.

    space: hyper-parameter -> (lowest, highest), both in the first grid: base values under μP (`rules.mup`), such as the
    base learning rate and the weight decay. Axes are logarithmic, but for those in `linear`. A later grid that would
    reach out of the space is moved inside it.
    widths: from that of the base to that of the last calibration, each twice the one before. points: m, of each axis at
    the base width; 8 in the source. odd: whether later grids have the odd count of points around m_s and so hold the
    last optimum too (8, 5, 3, 1 for two axes; at up to 2.25 times the cost); else m_s rounded (8, 4, 2, 1).

    All its state goes through `to_json` and `from_json`. Not for hyper-parameters that do not carry over between
    widths, nor for noise in the loss as large as its rise over a mesh.

    >>> sweep = Telescope({"lr": (1e-3, 1e-1)}, [64, 128], points=3)
    >>> [round(each.values["lr"], 6) for each in sweep.suggest()]
    [0.001, 0.01, 0.1]
    """

    def __init__(
        self,
        space: Mapping[str, tuple[float, float]],
        widths: Sequence[int],
        *,
        points: int = 8,
        odd: bool = True,
        linear: Iterable[str] = (),
    ) -> None:
        names, widths = _tuple("linear", linear), _tuple("widths", widths)
        _check(space, widths, points, names)
        ends = {name: (float(low), float(high)) for name, (low, high) in space.items()}
        losses: tuple[tuple[float | None, ...], ...] = ()
        self.state = TelescopeState(ends, names, int(points), tuple(map(int, widths)), bool(odd), losses)
        self._losses: list[list[float | None]] = []
        self._grids = [first_grid(self.state)]
        self._open()

    @property
    def done(self) -> bool:
        """Whether all widths are swept."""
        return len(self._losses) == len(self.state.widths) and None not in self._losses[-1]

    def suggest(self) -> tuple[Suggestion, ...]:
        """The runs of the present width that have no loss yet; none once it is done."""
        if self.done:
            return ()
        stage, grid = len(self._losses) - 1, self._grids[-1]
        return tuple(
            Suggestion(stage, number, self.state.widths[stage], values)
            for number, (values, loss) in enumerate(zip(_settings(self.state, grid), self._losses[-1], strict=True))
            if loss is None
        )

    def observe(self, suggestion: Suggestion, loss: float) -> None:
        """Takes the loss of a run that was suggested; the last of a width opens the next. Not finite: diverged."""
        if not isinstance(suggestion, Suggestion):
            raise InputError(f"suggestion must be of those that suggest() gives now, got {suggestion!r}")
        stage = len(self._losses) - 1
        if self.done or suggestion.stage != stage or not 0 <= suggestion.number < len(self._losses[stage]):
            raise InputError(f"suggestion must be of those that suggest() gives now, got {suggestion!r}")
        if self._losses[stage][suggestion.number] is not None:
            raise InputError(f"suggestion has a loss already, got {suggestion!r}")
        if isinstance(loss, (str, bool)) or not holds(lambda value: [float(value)], loss):
            raise InputError(f"loss must be a number, got {loss!r}")
        self._losses[stage][suggestion.number] = float(loss) if math.isfinite(loss) else math.inf
        self._open()

    def _open(self) -> None:
        """The next width, where the present one is swept."""
        if self._losses:
            if None in self._losses[-1] or len(self._losses) == len(self.state.widths):
                return
            last = self._grids[-1]
            self._grids.append(next_grid(self.state, len(self._losses), _best(last, self._losses[-1])[1]))
        self._losses.append([None] * math.prod(len(axis) for axis in self._grids[-1]))

    def result(self) -> Telescoped:
        """What the widths that are swept so far say; at least the first must be."""
        swept = [i for i, losses in enumerate(self._losses) if None not in losses]
        if not swept:
            raise InputError("the first width is not swept yet: observe its runs first")
        stages = tuple(_stage(self.state, i, self._grids[i], self._losses[i]) for i in swept)
        return _sum_up(self.state, stages, [_seen(self.state, self._grids[i], self._losses[i], i) for i in swept])

    def to_json(self) -> str:
        """The settings and all losses so far, as JSON."""
        losses = tuple(tuple(each) for each in self._losses)
        return TelescopeState(**{**self.state.__dict__, "losses": losses}).to_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Telescope:
        """The sweep that `to_json` wrote; it goes on where that one stood."""
        state = from_plain(TelescopeState, loads(text, source="telescope"), source="telescope")
        sweep = cls(state.space, state.widths, points=state.points, odd=state.odd, linear=state.linear)
        for losses in state.losses:
            if len(losses) != len(sweep._losses[-1]):
                raise InputError(f"telescope: a width of {len(sweep._losses[-1])} runs has {len(losses)} losses")
            for each in sweep.suggest():
                if (loss := losses[each.number]) is not None:
                    sweep.observe(each, loss)
        return sweep


Grid = tuple[tuple[float, ...], ...]  # each axis's points, ascending, in ln where the axis is logarithmic


def counts(points: int, axes: int, stages: int, *, odd: bool = True) -> list[int]:
    """Points of an axis at each width: m·4^(-s/k), rounded, or the odd count about it.

    >>> counts(8, 2, 4), counts(8, 2, 4, odd=False)
    ([8, 5, 3, 1], [8, 4, 2, 1])
    """
    exact = [points * 4 ** (-stage / axes) for stage in range(stages)]
    if odd:
        return [points, *(2 * math.floor(each / 2 + _NEAR) + 1 for each in exact[1:])]
    return [points, *(max(1, round(each)) for each in exact[1:])]


def first_grid(state: TelescopeState) -> Grid:
    """The full grid from end to end of the space."""
    return tuple(tuple(np.linspace(*_ends(state, name), state.points).tolist()) for name in state.space)


def next_grid(state: TelescopeState, stage: int, centre: Sequence[float]) -> Grid:
    """The grid around the last optimum, moved inside the space."""
    count = counts(state.points, len(state.space), stage + 1, odd=state.odd)[stage]
    axes = []
    for name, middle in zip(state.space, centre, strict=True):
        (low, high), half = _ends(state, name), _mesh(state, name, stage) * (count - 1) / 2
        inside = min(max(middle, low + half), high - half)
        axes.append(tuple(np.linspace(inside - half, inside + half, count).tolist()))
    return tuple(axes)


def _mesh(state: TelescopeState, name: str, stage: int) -> float:
    low, high = _ends(state, name)
    return float((high - low) / (state.points - 1) * 4 ** (-stage / len(state.space)))


def _ends(state: TelescopeState, name: str) -> tuple[float, float]:
    low, high = state.space[name]
    return (low, high) if name in state.linear else (math.log(low), math.log(high))


def _value(state: TelescopeState, name: str, place: float) -> float:
    """What stands on the axis: the ends of the space to the last digit."""
    low, high = state.space[name]
    value = place if name in state.linear else math.exp(place)
    return next((end for end in (low, high) if abs(value - end) <= _NEAR * abs(end)), value)


def _settings(state: TelescopeState, grid: Grid) -> list[dict[str, float]]:
    """The settings of all runs, the last axis fastest."""
    names = list(state.space)
    return [
        {name: _value(state, name, place) for name, place in zip(names, places, strict=True)}
        for places in itertools.product(*grid)
    ]


def _best(grid: Grid, losses: Sequence[float | None]) -> tuple[int, tuple[float, ...]]:
    """The number and the places of the least loss; the first of equal ones."""
    known = [math.inf if loss is None else loss for loss in losses]
    number = min(range(len(known)), key=lambda i: known[i])
    if math.isinf(known[number]):
        raise InputError(f"all {len(known)} runs of a width diverged: move the space to where some do not")
    return number, list(itertools.product(*grid))[number]


def _stage(state: TelescopeState, stage: int, grid: Grid, losses: Sequence[float | None]) -> Stage:
    number, places = _best(grid, losses)
    edge = tuple(
        name
        for name, axis, place in zip(state.space, grid, places, strict=True)
        if len(axis) >= 3 and place in (axis[0], axis[-1])
    )
    known = [math.inf if loss is None else loss for loss in losses]
    cost = len(losses) * (state.widths[stage] / state.widths[0]) ** 2
    mesh = {name: _mesh(state, name, stage) for name in state.space}
    best, diverged = _settings(state, grid)[number], sum(map(math.isinf, known))
    return Stage(state.widths[stage], len(grid[0]), len(losses), cost, mesh, best, known[number], diverged, edge)


def _sum_up(
    state: TelescopeState, stages: tuple[Stage, ...], seen: Sequence[Mapping[str, tuple[int, float, float]]]
) -> Telescoped:
    grids = [i for i, stage in enumerate(stages) if stage.points > 1]
    last, total = stages[-1], math.fsum(stage.cost for stage in stages)
    full = state.points ** len(state.space) * (last.width / state.widths[0]) ** 2
    drift = {name: _drift([seen[i][name] for i in grids], last.width) for name in state.space}
    spacing = {name: stages[grids[-1]].mesh[name] / 2 for name in state.space}
    notes = [
        f"width {stage.width}: the best {name} lies at the edge of "
        + ("the space: widen it" if i == 0 else "its grid: its optimum may lie beyond")
        for i, stage in enumerate(stages)
        for name in stage.at_edge
    ]
    notes += [
        f"{name}: its optima do not move as 1/width within their meshes"
        for name, each in drift.items()
        if not each.consistent
    ]
    return Telescoped(last.best, last.width, stages, total, 1 - total / full, spacing, drift, tuple(notes))


def _seen(state: TelescopeState, grid: Grid, losses: Sequence[float | None], stage: int) -> dict[str, Any]:
    """Axis -> (width, from, to): where the optimum lies, half a mesh around the best, with no end beyond an edge."""
    found = {}
    for name, axis, place in zip(state.space, grid, _best(grid, losses)[1], strict=True):
        half = _mesh(state, name, stage) / 2
        low = -math.inf if place == axis[0] else place - half
        found[name] = (state.widths[stage], low, math.inf if place == axis[-1] else place + half)
    return found


def _drift(seen: Sequence[tuple[int, float, float]], last: int) -> Drift:
    """All α for which some x* has x* - α/n in [from, to] at every (n, from, to): pair by pair, x* eliminated."""
    low, high = -math.inf, math.inf
    for (n, start, end), (later, later_start, later_end) in itertools.combinations(seen, 2):
        apart = 1 / n - 1 / later
        low, high = max(low, (later_start - end) / apart), min(high, (later_end - start) / apart)
    if low > high + _NEAR * abs(high):
        return Drift(math.nan, -math.inf, math.inf, math.nan, False)
    alpha = (low + high) / 2 if math.isfinite(high - low) else math.nan
    return Drift(alpha, low, max(low, high), alpha * (1 / seen[-1][0] - 1 / last), True)


def _tuple(name: str, values: Any) -> tuple[Any, ...]:
    try:
        return tuple(values)
    except TypeError:
        raise InputError(f"{name} must be a sequence, got {values!r}") from None


def _check(space: Any, widths: Any, points: Any, linear: Sequence[str]) -> None:
    if not isinstance(space, Mapping) or not space:
        raise InputError(f"space must map at least one hyper-parameter to (lowest, highest), got {space!r}")
    for name, ends in space.items():
        if not holds(lambda pair: len(pair) == 2 and -math.inf < pair[0] < pair[1] < math.inf, ends):
            raise InputError(f"space must have lowest < highest, both finite, for {name!r}, got {ends!r}")
        if name not in linear and not ends[0] > 0:
            raise InputError(f"space must be > 0 for {name!r}, or {name!r} be named in linear, got {ends!r}")
    if unknown := sorted(set(linear) - set(space)):
        raise InputError(f"linear must name hyper-parameters of the space, got {unknown[0]!r}")
    check_count(2, points=points)
    for width in widths:
        check_count(widths=width)
    if not widths or any(b != 2 * a for a, b in itertools.pairwise(widths)):
        raise InputError(f"widths must each be twice the one before, got {list(widths)!r}")
