"""The loss-trajectory law fitted to all points at once, and one-step refits of it for drawn runs.

The least squares are of ln L - ln L_law, where L_law is the root of the law at each point: errors in ln L count alike.
The right side taken at the measured loss in place of the root, which is simpler, has the measured error on both sides:
at 0.5 % noise it puts B_* 7 % off, always to one side, where this is within 3 %.

The parameters are those that the data tell apart: with N₀, S₀, L₀ the geometric means of the data,

  F = exp(q₀ - q₁·ln(N/N₀)),  X = exp(q₂ - q₃·ln(S_min/S₀)),  B_crit = exp(q₄ - q₅·ln(L/L₀)),  L = F + X.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from batchlab.rules.fit.loss_runs import Array, Curve, LossRun
from batchlab.rules.fit.trajectory_stages import Line
from batchlab.rules.law_loss import TrajectoryConstants

FREE = 6
_ITERATIONS = 200
_SAME = 1e-13
_LARGEST = 700.0


class Points(NamedTuple):
    """All measured points; a final loss is one with ln S and ln B infinite. run: which run each is of.

    floor: ln F = floor @ (q₀, q₁), one row a point. centre: ln N₀, ln S₀, ln L₀.
    """

    floor: Array
    log_batch: Array
    log_steps: Array
    log_losses: Array
    run: Array
    centre: tuple[float, float, float]


def points_of(
    runs: Sequence[LossRun], curves: Sequence[Curve], centre: tuple[float, float, float] | None = None
) -> Points:
    """Of the curves as measured, not smoothed, and the final losses. centre: that of a q already found."""
    columns = [
        np.stack(np.broadcast_arrays(each.log_params, each.log_batch, each.log_steps, each.log_losses, each.place))
        for each in curves
    ]
    columns += [
        np.array([[math.log(run.params)], [math.inf], [math.inf], [math.log(run.final_loss)], [place]])
        for place, run in enumerate(runs)
        if run.final_loss
    ]
    table = np.concatenate(columns, axis=1)
    finite = np.isfinite(table[2])
    centre = centre or (float(table[0].mean()), float(table[2][finite].mean()), float(table[3].mean()))
    floor = np.stack([np.ones_like(table[0]), centre[0] - table[0]], axis=1)
    return Points(floor, table[1], table[2], table[3], table[4].astype(np.intp), centre)


def log_losses(q: Array, points: Points) -> tuple[Array, Array]:
    """ln L of the law at each point and its slopes in q, one row a point."""
    height, exponent, critical, growth = q[2:]
    floor = np.exp(points.floor @ q[:2])
    finite = np.isfinite(points.log_steps)
    f, at = floor[finite], points.log_steps[finite] - points.centre[1]

    def right(u: Array) -> tuple[Array, Array]:
        """ln(1 + B_crit/B) at u = ln X, and its slope in ln B_crit."""
        over = critical - growth * (np.log(f + np.exp(u)) - points.centre[2]) - points.log_batch[finite]
        slower = np.logaddexp(0.0, over)
        return slower, np.exp(over - slower)

    u = _root(height - exponent * at, exponent, growth, f, right)
    slower, share = right(u)
    losses = floor.copy()
    losses[finite] += np.exp(u)
    part = np.exp(u) / losses[finite]
    slopes = np.zeros((len(floor), FREE))
    slopes[:, :2] = (floor / losses)[:, None] * points.floor
    bent = part * exponent * share
    own = [part, -part * (at - slower), bent, -bent * (np.log(losses[finite]) - points.centre[2])]
    slopes[finite, 2:] = np.stack(own, axis=1)
    slopes[finite] /= (1 + bent * growth)[:, None]
    return np.log(losses), slopes


def _root(
    low: Array, exponent: float, growth: float, floor: Array, right: Callable[[Array], tuple[Array, Array]]
) -> Array:
    """u = ln X where u = low + q₃·ln(1 + B_crit/B), and B_crit falls with u: between low and the right side there.

    Newton's steps where they stay between the bounds and halve, else bisection; a point that is found is left alone.
    """
    limit = low
    high = limit + exponent * right(low)[0]
    u, last, done = high, high - low, np.zeros(high.shape, dtype=bool)
    for _ in range(_ITERATIONS):
        slower, share = right(u)
        gap = u - limit - exponent * slower
        low, high = np.where(gap > 0, low, u), np.where(gap > 0, u, high)
        x = np.exp(u)
        newton = u - gap / (1 + exponent * growth * share * x / (floor + x))
        trusted = (newton >= low) & (newton <= high) & (2 * np.abs(newton - u) <= last)
        new = np.where(done, u, np.where(trusted, newton, (low + high) / 2))
        u, last = new, np.abs(new - u)
        done |= ~(last > _SAME * (1 + np.abs(u)))
        if done.all():
            break
    return u


def start_at(sizes: Line, batches: Line, steps: Line, centre: tuple[float, float, float]) -> Array:
    """q of three lines."""
    pairs = ((sizes, centre[0]), (steps, centre[1]), (batches, centre[2]))
    return np.array([number for line, at in pairs for number in (float(line.at(at)), line.exponent)])


def constants_of(q: Array, centre: tuple[float, float, float]) -> TrajectoryConstants | None:
    """q's six constants; None where q has one that is not finite and > 0."""
    if not np.isfinite(q).all() or not (q[[1, 3, 5]] > 0).all():
        return None
    size, step = q[0] / q[1] + centre[0], q[2] / q[3] + centre[1]
    batch = q[4] + q[5] * centre[2]
    if max(abs(size), abs(step), abs(batch)) > _LARGEST:
        return None
    return TrajectoryConstants(q[1], math.exp(size), q[3], math.exp(step), 1 / q[5], math.exp(batch))


def least_squares(start: Array, points: Points) -> Array | None:
    """The q of least squared error of ln L, by Levenberg and Marquardt's method; None where it finds none."""
    from scipy.optimize import least_squares as solve

    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        found = solve(
            lambda q: _clean(log_losses(q, points)[0]) - points.log_losses,
            start,
            jac=lambda q: _clean(log_losses(q, points)[1]),
            method="lm",
            xtol=1e-12,
            ftol=1e-12,
        )
    return np.asarray(found.x, dtype=np.float64) if found.success and np.isfinite(found.x).all() else None


def _clean(values: Array) -> Array:
    """A trial far off overflows; large in place of infinite makes the solver turn back."""
    return np.nan_to_num(values, nan=1e100, posinf=1e100, neginf=-1e100)


class OneStep:
    """q for runs weighed anew: one Gauss-Newton step from the least squares of all runs (Schucany and Wang 1991)."""

    def __init__(self, q: Array, points: Points, runs: int) -> None:
        fitted, slopes = log_losses(q, points)
        errors = points.log_losses - fitted
        self.q = q
        self.squares = np.zeros((runs, FREE, FREE))
        self.pulls = np.zeros((runs, FREE))
        for run in range(runs):
            mine = slopes[points.run == run]
            self.squares[run], self.pulls[run] = mine.T @ mine, mine.T @ errors[points.run == run]

    def __call__(self, weights: Array) -> Array:
        try:
            step = np.linalg.solve(np.tensordot(weights, self.squares, 1), weights @ self.pulls)
        except np.linalg.LinAlgError:
            return np.full(FREE, np.nan)
        return np.asarray(self.q + step)
