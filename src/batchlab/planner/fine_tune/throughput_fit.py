"""The logarithm's numbers from points; see `ThroughputModel`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from batchlab.core.checks import check_inside, check_positive
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.planner.fine_tune.least_squares import Array, LeastSquares, full_rank, least_squares
from batchlab.planner.fine_tune.measured_batch import MeasuredBatch, timed
from batchlab.planner.fine_tune.throughput_model import FORMS, ThroughputModel, regressor

_GRID = 201


def exponent_identified(points: Sequence[MeasuredBatch]) -> bool:
    """Whether g can be told: two sparsities with a batch other than 1."""
    return len({point.active for point in points if point.batch != 1}) >= 2


def fit_throughput(points: Sequence[MeasuredBatch], form: str, c3: float | None, coverage: float) -> ThroughputModel:
    """See `ThroughputModel.fit`."""
    check_inside(coverage=coverage)
    if form not in FORMS:
        raise InputError(f"form must be one of {list(FORMS)}, got {form!r}")
    if c3 is None:
        raise InputError("C3 is not identifiable: every C3 gives the same curve; hold it at a value, such as 1.0")
    check_positive(c3=c3)
    batch, active, speed = timed(points)
    g, exponent = _exponent(points, batch, active, speed, coverage) if form == "power" else (1.0, None)
    x = regressor(form, c3, g, batch, active)
    design = np.stack([np.ones_like(x), x], 1)
    if not full_rank(design):
        raise InputError("a and b are not identified: all points have the same ln(B) over sparsity")
    fit = least_squares(design, speed, coverage=coverage)
    residuals = speed - design @ fit.values
    if exponent is not None:
        fit = _linearised(design, fit.values[1] * x * -np.log(active), speed, (*fit.values, g), coverage)
    sparsities = tuple(sorted(set(active.tolist())))
    return ThroughputModel(form, c3, fit, exponent, sparsities, float(batch.max()), tuple(residuals.tolist()))


def _exponent(
    points: Sequence[MeasuredBatch], batch: Array, active: Array, speed: Array, coverage: float
) -> tuple[float, Estimate]:
    """g of least RSS on [0, 1], and its profile."""
    if not exponent_identified(points):
        raise InputError("g is not identified: measure batches above 1 at two sparsities, or take another form")
    from scipy.optimize import brentq, minimize_scalar
    from scipy.special import stdtrit

    logs, y = np.log(batch), speed - speed.mean()

    def rss(g: Array | float) -> Array:
        x = logs / active ** np.asarray(g, dtype=np.float64)[..., None]
        x = x - x.mean(-1, keepdims=True)
        slope = (x @ y) / np.square(x).sum(-1)
        return np.asarray(np.square(y - x * slope[..., None]).sum(-1))

    grid = np.linspace(0, 1, _GRID)
    values = rss(grid)
    near = int(values.argmin())
    ends = grid[max(near - 1, 0)], grid[min(near + 1, _GRID - 1)]
    inner = minimize_scalar(lambda at: float(rss(at)), bounds=ends, method="bounded", options={"xatol": 1e-12})
    g, least = (
        (float(inner.x), float(inner.fun)) if inner.fun < values[near] else (float(grid[near]), float(values[near]))
    )
    freedom = len(points) - 3
    method = f"profile of g, {len(points)} points"
    if freedom < 1:
        return g, Estimate(g, 0.0, 1.0, f"{method}: as many as unknowns", coverage)
    level = least * (1 + float(stdtrit(freedom, 0.5 + coverage / 2)) ** 2 / freedom)

    def crossing(outer: float) -> float:
        return outer if rss(outer) <= level else float(brentq(lambda at: float(rss(at)) - level, *sorted((g, outer))))

    return g, Estimate(g, crossing(0.0), crossing(1.0), method, coverage)


def _linearised(design: Array, third: Array, speed: Array, values: tuple[float, ...], coverage: float) -> LeastSquares:
    """The three coefficients with the covariance of the law's tangent."""
    slopes = np.column_stack([design, third])
    freedom = len(speed) - 3
    method = f"least squares, tangent, {len(speed)} points"
    if freedom < 1 or not full_rank(slopes):
        spread = np.full((3, 3), math.inf)
        return LeastSquares(values, tuple(map(tuple, spread.tolist())), 0, method, coverage)
    residuals = speed - design @ values[:2]
    spread = np.linalg.inv(slopes.T @ slopes) * float(residuals @ residuals) / freedom
    return LeastSquares(values, tuple(map(tuple, spread.tolist())), freedom, method, coverage)
