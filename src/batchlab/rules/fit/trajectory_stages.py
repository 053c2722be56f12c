"""The loss-trajectory law one stage at a time (Su et al. 2024, arXiv 2403.06563; forms of Kaplan et al. 2020).

Each stage is a straight line in logarithms, through what the stages before it have left:

  1, model size:      ln L(N)         = α_N·(ln N_c - ln N)
  2, critical batch:  ln B_crit       = ln B_* - ln(L)/α_B, with B_crit at a loss from S = S_min·(1 + B_crit/B) over B
  3, updates:         ln(L - L(N))    = α_S·(ln S_c - ln S_min)

An error of a constant share of L is one of L/(L - L(N)) such shares in L - L(N), and in S at a given loss: stages 2 and
3 weigh by that, and stage 2 by what the batch sizes tell of B_crit at that loss too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from batchlab.core.errors import InputError
from batchlab.rules.fit.loss_runs import Array, Curve, LossRun, crossings

STAGES = ("stage 1 (model size)", "stage 2 (critical batch)", "stage 3 (updates)")
FEWEST = 3
_BEYOND = 7.0  # a B_crit of e^7 times beyond the batch sizes changes S by less than 0.1 %
_GRID, _ZOOMS, _EDGE = 41, 7, 1e-6


class Line(NamedTuple):
    """ln y = exponent·(scale - x), x a logarithm: (α_N, ln N_c), (1/α_B, ln B_*·α_B) and (α_S, ln S_c)."""

    exponent: float
    scale: float

    def at(self, x: Array | float) -> Array:
        value: Array = self.exponent * (self.scale - np.asarray(x))
        return value


class Level(NamedTuple):
    """B_crit of one model at one loss. information: its weight in stage 2's line."""

    log_params: float
    log_loss: float
    log_critical: float
    information: float


def size_line(runs: Sequence[LossRun], weights: Array, *, fewest: int = FEWEST) -> Line:
    """Stage 1: L(N) through the final losses. fewest: sizes; two are a line in a drawn table."""
    known = [(math.log(run.params), math.log(run.final_loss), w) for run, w in zip(runs, weights) if run.final_loss]
    x, y, w = np.array(known).T if known else np.zeros((3, 0))
    _several(STAGES[0], x, w, "params with a final_loss, where the loss had flattened", fewest)
    return _falling(STAGES[0], x, y, w, "the final losses must fall as models grow")


def levels_of(curves: Sequence[Curve], sizes: Line, weights: Array, count: int, margin: float) -> list[Level]:
    """Stage 2, first half: B_crit at `count` losses for each model size that has three batch sizes.

    The losses lie between the highest where a run ends, or (1 + margin)·L(N), and the lowest where one begins, evenly
    in ln(L - L(N)).
    """
    found: list[Level] = []
    most, gap = 0, ""
    for size in sorted({curve.log_params for curve in curves}):
        mine = [curve for curve in curves if curve.log_params == size and weights[curve.place] > 0]
        batches = len({curve.log_batch for curve in mine})
        most = max(most, batches)
        if batches < FEWEST:
            continue
        floor = math.exp(sizes.at(size))
        high = math.exp(min(curve.fine[0] for curve in mine))
        low = max(floor * (1 + margin), math.exp(max(curve.fine[-1] for curve in mine)))
        if low >= high:
            gap = f": with {math.exp(size):.4g} params one run ends at {low:.4g} and one begins at {high:.4g}"
            continue
        losses = floor + np.geomspace(low - floor, high - floor, count + 2)[1:-1]
        found += _critical_batches(mine, floor, losses, weights)
    if most < FEWEST:
        raise InputError(f"{STAGES[1]} needs at least {FEWEST} batch sizes of one model, got {most}")
    if not found and gap:
        raise InputError(f"{STAGES[1]} needs losses that all batch sizes of a model reach{gap}; train longer")
    return found


def _critical_batches(mine: Sequence[Curve], floor: float, losses: Array, weights: Array) -> list[Level]:
    """The least Σ[ln S - ln S_min - ln(1 + B_crit/B)]² over S_min and B_crit, at each loss; on a grid, zoomed."""
    log_steps = np.array([crossings(curve, floor, losses) for curve in mine]).T
    reached = np.isfinite(log_steps).all(axis=1)
    losses, log_steps = losses[reached], log_steps[reached]
    log_batch = np.array([curve.log_batch for curve in mine])
    w = np.array([weights[curve.place] for curve in mine])
    low, high = float(log_batch.min()) - _BEYOND, float(log_batch.max()) + _BEYOND
    at, step = np.full(len(losses), (low + high) / 2), (high - low) / 2
    for _ in range(_ZOOMS):
        grid = np.clip(at[:, None] + step * np.linspace(-1, 1, _GRID), low, high)
        errors = log_steps[:, None] - np.logaddexp(0.0, grid[..., None] - log_batch)
        errors -= np.average(errors, axis=-1, weights=w)[..., None]
        best = np.argmin((w * errors**2).sum(axis=-1), axis=1)
        at, step = np.take_along_axis(grid, best[:, None], 1)[:, 0], 2 * step / (_GRID - 1)
    share = 1 / (1 + np.exp(log_batch - at[:, None]))
    spread = (w * (share - np.average(share, axis=1, weights=w)[:, None]) ** 2).sum(axis=1)
    told = spread * ((losses - floor) / losses) ** 2
    inside = (low + _EDGE < at) & (at < high - _EDGE)
    return [
        Level(mine[0].log_params, math.log(loss), float(c), float(weight))
        for loss, c, weight in zip(losses[inside], at[inside], told[inside], strict=True)
    ]


def batch_line(levels: Sequence[Level]) -> Line:
    """Stage 2, second half: B_crit against the loss."""
    _, x, y, w = np.array(levels).T if levels else np.zeros((4, 0))
    _several(STAGES[1], x, w, "losses at which the batch sizes bracket the critical one")
    return _falling(STAGES[1], x, y, w, "the critical batch must grow as the loss falls (is each rate tuned?)")


def step_line(
    runs: Sequence[LossRun], curves: Sequence[Curve], sizes: Line, batches: Line | None, weights: Array, margin: float
) -> Line:
    """Stage 3: L - L(N) against S_min, of losses at least `margin`·L(N) above L(N).

    batches: None takes S for S_min, which is wrong: it shows what stage 2 is for.
    """
    points = []
    for curve in curves:
        floor = math.exp(sizes.at(curve.log_params))
        losses = np.exp(curve.smooth)
        worst = int(np.argmin(losses))
        if losses[worst] < floor * (1 - margin):
            run = runs[curve.place]
            raise InputError(
                f"{STAGES[2]}: runs[{curve.place}], of {run.params:.4g} params and {run.batch_tokens:.4g} batch_tokens,"
                f" has a loss of {losses[worst]:.4g} at step {math.exp(curve.log_steps[worst]):.4g}, below L(N) = "
                f"{floor:.4g} of stage 1 by more than margin={margin:g}: were the final losses unfinished, or are "
                "these noisier than that?"
            )
        kept = losses > floor * (1 + margin)
        excess = losses[kept] - floor
        slower = 0.0 if batches is None else np.logaddexp(0.0, batches.at(curve.smooth[kept]) - curve.log_batch)
        told = weights[curve.place] * (excess / losses[kept]) ** 2
        points.append(np.stack([curve.log_steps[kept] - slower, np.log(excess), told]))
    x, y, w = np.concatenate(points, axis=1)
    _several(STAGES[2], x, w, f"updates with losses at least {margin:g} above L(N)")
    return _falling(STAGES[2], x, y, w, "losses must fall with updates")


def _several(stage: str, x: Array, w: Array, what: str, fewest: int = FEWEST) -> None:
    different = len(set(x[w > 0].tolist()))
    if different < fewest:
        raise InputError(f"{stage} needs at least {fewest} different {what}, got {different}")


def _falling(stage: str, x: Array, y: Array, w: Array, right: str) -> Line:
    """Weighted least squares; the slope must be negative."""
    mean_x, mean_y = np.average(x, weights=w), np.average(y, weights=w)
    slope = float((w * (x - mean_x) * (y - mean_y)).sum() / (w * (x - mean_x) ** 2).sum())
    if not slope < 0:
        raise InputError(f"{stage}: {right}, got an exponent of {slope:.3g}")
    return Line(-slope, float(mean_x - mean_y / slope))
