"""How N, D, steps and batch grow along a compute budget: the lower envelope of the runs' losses (Shuai et al. 2024).

For every model size N and batch B, at the best learning rate, the losses against compute C = 6ND are a curve; the
frontier is the least of all curves at each C. On its points ln N, ln D, ln S and ln B are regressed on ln C, all on the
same ones, so that the slopes of S and B add to that of D, and those of N and D to 1. arXiv 2412.01505; how it draws its
frontier was not to be read: a grid of equal steps in ln C, and curves straight in logarithms, are batchlab's reading.

A point counts only where a smaller and a larger N, and at its N a smaller and a larger B, were tried at that compute:
elsewhere the frontier shows the edge of the table and not an optimum.

N and B step from one size tried to the next. On 40 simulated tables (12 N over two decades, batches by √2, 0.1 % noise
in the loss) the exponents of N and B were 0.448 and 0.146 on average, for 0.452 and 0.145, and their intervals at 90 %
held the truth in 88 and 98 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_count, check_not_negative, check_positive
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.curves.log_line import LogLine
from batchlab.rules.batch import ComputeBudget
from batchlab.rules.fit.bootstrap import Draws, Rows, bootstrap
from batchlab.rules.fit.power_laws import PowerLaw, leave_groups_out
from batchlab.rules.fit.table import RunTable
from batchlab.rules.fit.tuning import ids, tuned
from batchlab.rules.token_batch import TokenBatch

Array = NDArray[np.float64]
FLOP_PER_PARAM_TOKEN = 6.0
CELLS = 200
FEWEST_CURVES, FEWEST_SIZES, FEWEST_BATCHES = 3, 3, 2
_NAMES = ("params", "tokens", "steps", "batch_tokens")


class Envelope(NamedTuple):
    """The least of several curves on a grid. x: of each cell that a curve covers. y: the least there. winner: whose."""

    x: Array
    y: Array
    winner: NDArray[np.intp]


def lower_envelope(x: Sequence[Array], y: Sequence[Array], grid: Array) -> Envelope:
    """At each x of `grid` the curve of least y, each straight in logarithms between its points and nowhere beyond.

    x, y: one array a curve, x ascending, all > 0. A curve that is never least is no cell's winner.
    """
    heights = _heights(x, y, grid)
    covered = np.isfinite(heights.min(0))
    winner = heights[:, covered].argmin(0)
    return Envelope(grid[covered], np.exp(heights[:, covered].min(0)), winner)


def _heights(x: Sequence[Array], y: Sequence[Array], grid: Array) -> Array:
    log_grid = np.log(grid)
    return np.stack(
        [np.interp(log_grid, np.log(a), np.log(b), left=np.inf, right=np.inf) for a, b in zip(x, y, strict=True)]
    )


@dataclass(frozen=True)
class ComputeLaws(JsonNoun):
    """N, D, S and B against C = 6ND, each a law through the same frontier points. Plain counts; batch in tokens.

    The exponents satisfy steps + batch = tokens and params + tokens = 1. Their intervals, and those of the middles, are
    a bootstrap's over runs; held-out errors leave out all points of one curve. frontier_loss: at each point. curves:
    how many were on the frontier. dropped: the cells of the frontier that lie at an edge of the table.
    """

    params: PowerLaw
    tokens: PowerLaw
    steps: PowerLaw
    batch: PowerLaw
    frontier_loss: tuple[float, ...]
    curves: int
    dropped: int

    def plan(self, *, compute: float) -> ComputeBudget:
        """N, D, S and B for a compute of C FLOP; `batch.outside` says where that lies beyond the frontier's."""
        check_positive(compute=compute)
        batch = TokenBatch(self.batch.value(compute), "your runs, fixed compute", self.batch.outside(compute))
        return ComputeBudget(self.params.value(compute), self.tokens.value(compute), self.steps.value(compute), batch)


def compute_laws(
    table: RunTable,
    *,
    warmup_steps: float = 0,
    cells: int = CELLS,
    draws: int = 200,
    seed: int = 0,
    coverage: float = 0.95,
) -> ComputeLaws:
    """The four laws from runs, or checkpoints of runs at a constant rate, with params, tokens, batch_tokens and loss.

    warmup_steps: rows with fewer steps are dropped: they are still in warm-up. cells: of the grid in ln C. With a
    learning_rate column each setting counts at its best. Rows of one `run` are drawn together.

    Raises `InputError` for one N or one B, and where fewer than three curves, three N or two B are on the frontier
    inside the table.
    """
    table.need("params", "tokens", "batch_tokens", "loss", law="compute budget")
    check_count(2, cells=cells)
    check_not_negative(warmup_steps=warmup_steps)
    runs = _Runs.of(table, warmup_steps)
    for name, column in (("params", runs.params), ("batch_tokens", runs.batch)):
        if (count := len(np.unique(column))) < FEWEST_SIZES:
            raise InputError(f"{name} must hold at least {FEWEST_SIZES} sizes for a compute budget, got {count}")
    grid = np.geomspace(runs.compute.min(), runs.compute.max(), cells)
    points = _frontier(runs, np.arange(len(runs.losses)), grid)
    lines = _lines(points)
    middle = math.exp(lines[0].mean_x)
    drawn = bootstrap(
        lambda rows: _numbers(_lines(_frontier(runs, rows, grid)), middle),
        runs.labels,
        draws=draws,
        seed=seed,
        coverage=coverage,
    )
    params, tokens, steps, batch = (
        _law(place, line, points, drawn, middle, coverage) for place, line in enumerate(lines)
    )
    kept = points.bracketed
    losses, curves = tuple(map(float, points.loss[kept])), len(np.unique(points.curve[kept]))
    return ComputeLaws(params, tokens, steps, batch, losses, curves, int((~kept).sum()))


class _Runs(NamedTuple):
    params: Array
    tokens: Array
    batch: Array
    compute: Array
    losses: Array
    length: NDArray[np.intp]  # ids of (N, D, B)
    cell: NDArray[np.intp]  # and of the learning rate
    labels: list[str]

    @classmethod
    def of(cls, table: RunTable, warmup_steps: float) -> _Runs:
        kept = np.flatnonzero(table["steps"] >= warmup_steps)
        if len(kept) == 0:
            raise InputError(f"warmup_steps must leave runs that are longer, got {warmup_steps!r}")
        params, tokens, batch, losses = (table[name][kept] for name in ("params", "tokens", "batch_tokens", "loss"))
        rates = table["learning_rate"][kept] if "learning_rate" in table else np.ones(len(kept))
        length, cell = ids(params, tokens, batch), ids(params, tokens, batch, rates)
        labels = [table.texts["run"][row] for row in kept]
        return cls(params, tokens, batch, FLOP_PER_PARAM_TOKEN * params * tokens, losses, length, cell, labels)


class _Frontier(NamedTuple):
    compute: Array
    params: Array
    batch: Array
    loss: Array
    curve: NDArray[np.intp]
    bracketed: NDArray[np.bool_]


def _frontier(runs: _Runs, rows: Rows, grid: Array) -> _Frontier:
    rows = rows[tuned(runs.losses[rows], runs.length[rows], runs.cell[rows])]
    _, first, which = np.unique(runs.length[rows], return_index=True, return_inverse=True)
    means = np.bincount(which, runs.losses[rows]) / np.bincount(which)
    point = rows[first]
    params, batch, compute = runs.params[point], runs.batch[point], runs.compute[point]
    curve_of = ids(params, batch)
    xs, ys, sizes, batches = [], [], [], []
    for curve in range(int(curve_of.max()) + 1):
        members = np.flatnonzero(curve_of == curve)
        members = members[np.argsort(compute[members])]
        xs.append(compute[members])
        ys.append(means[members])
        sizes.append(float(params[members[0]]))
        batches.append(float(batch[members[0]]))
    n, b = np.array(sizes), np.array(batches)
    envelope = lower_envelope(xs, ys, grid)
    covers = np.stack([(envelope.x >= x[0]) & (envelope.x <= x[-1]) for x in xs])
    inside = _inside(n, b, envelope.winner, covers)
    return _Frontier(envelope.x, n[envelope.winner], b[envelope.winner], envelope.y, envelope.winner, inside)


def _inside(n: Array, b: Array, winner: NDArray[np.intp], covers: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a smaller and a larger N, and at the winner's N a smaller and a larger B, cover each cell."""
    won_n, won_b = n[winner], b[winner]
    same = n[:, None] == won_n
    sides = (
        covers & (n[:, None] < won_n),
        covers & (n[:, None] > won_n),
        covers & same & (b[:, None] < won_b),
        covers & same & (b[:, None] > won_b),
    )
    inside: NDArray[np.bool_] = np.all([side.any(0) for side in sides], axis=0)
    return inside


def _columns(points: _Frontier) -> dict[str, Array]:
    kept = points.bracketed
    compute, params, batch = points.compute[kept], points.params[kept], points.batch[kept]
    tokens = compute / (FLOP_PER_PARAM_TOKEN * params)
    return {"params": params, "tokens": tokens, "steps": tokens / batch, "batch_tokens": batch}


def _lines(points: _Frontier) -> list[LogLine]:
    kept = points.bracketed
    found = {
        "curves": (len(np.unique(points.curve[kept])), FEWEST_CURVES),
        "params": (len(np.unique(points.params[kept])), FEWEST_SIZES),
        "batch_tokens": (len(np.unique(points.batch[kept])), FEWEST_BATCHES),
    }
    for name, (count, least) in found.items():
        if count < least:
            raise InputError(
                f"the frontier must hold at least {least} different {name} inside the table, got {count}: at "
                f"{int((~kept).sum())} of {len(kept)} computes its best N or B is the smallest or largest tried, so "
                "they are not bracketed; add sizes, batches or lengths"
            )
    compute = points.compute[kept].tolist()
    return [LogLine.through(compute, column.tolist()) for column in _columns(points).values()]


def _numbers(lines: Sequence[LogLine], middle: float) -> list[float]:
    return [number for line in lines for number in (line.slope, line.value(middle))]


def _law(place: int, line: LogLine, points: _Frontier, drawn: Draws, middle: float, coverage: float) -> PowerLaw:
    name = _NAMES[place]
    method = f"least squares on the frontier's ln {name}, bootstrap over runs (approximate)"
    exponent = drawn.estimate(2 * place, line.slope, method, coverage)
    at = drawn.estimate(2 * place + 1, line.value(middle), method, coverage)
    at = Estimate(at.value, max(at.low, 0.0), at.high, at.method, coverage)
    x, y = points.compute[points.bracketed], _columns(points)[name]
    held_out = leave_groups_out(np.log(x), np.log(y), points.curve[points.bracketed])
    rows = tuple(map(float, x)), tuple(map(float, y)), line.residuals, held_out
    return PowerLaw(exponent, at, middle, line.deviation, *rows, "compute", name)
