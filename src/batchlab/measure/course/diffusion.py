"""Does a distance grow as a logarithm of the updates or as a power of them? Both fitted, with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_inside
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun

FEWEST, BLOCKS = 6, 6
# Of a straight line through a random walk: the variance of its slope by least squares over that from end to end.
_LEAST_SQUARES = 6 / 5
_EXPONENTS = (-2.0, 4.0)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Diffusion(JsonNoun):
    """Two laws through the same points: distance = intercept + slope·ln t, and distance = scale·t^exponent.

    slope: per factor e of the updates, in the unit of the weights. r2, power_r2: the share of the distances' variance
    that each law explains, both in the unit of the distances and with two free numbers each, so that they may be
    compared; NaN where the distances do not vary. low, high: the first and last update fitted. points: how many.
    """

    slope: Estimate
    intercept: float
    r2: float
    exponent: Estimate
    scale: float
    power_r2: float
    low: int
    high: int
    points: int

    @property
    def better(self) -> str:
        """Which law leaves less unexplained: "logarithm" or "power", "" where neither is defined."""
        if math.isnan(self.r2) or math.isnan(self.power_r2):
            return ""
        return "logarithm" if self.r2 >= self.power_r2 else "power"

    def logarithm(self, t: float) -> float:
        """The distance after t updates by the one law."""
        return self.intercept + self.slope.value * math.log(t)

    def power(self, t: float) -> float:
        """The distance after t updates by the other."""
        return self.scale * float(t**self.exponent.value)


def fit_diffusion(
    points: Sequence[tuple[float, float]], *, low: float = 1, high: float | None = None, coverage: float = 0.95
) -> Diffusion:
    """Least squares of both laws on the points (t, distance) with low <= t <= high.

    Each distance holds all the steps before it, so that the errors about the line are a path and not independent:
    the interval of least squares, which takes them so, would be several times too narrow. Here the range of ln t is
    cut into six blocks and the slope taken in each from end to end; the slopes' spread gives a Student interval with
    5 degrees of freedom, widened by 6/5 in variance because the line is least squares. It is exact for an error that
    is a random walk in ln t, and too wide for one that forgets. It holds for this run alone; over seeds use
    `mean_slope`. A law that bends makes the blocks differ, and the interval with them.

    Fewer than six points, or none that differ in t, leave all undefined. The power law needs distances > 0.

    >>> law = fit_diffusion([(t, 2 + 3 * math.log(t)) for t in (1, 2, 4, 8, 16, 32, 64)])
    >>> law.slope, round(law.intercept, 6), law.better
    (Estimate(3 [3, 3], 95 %, least squares on 7 points, 6 blocks of ln t), 2.0, 'logarithm')
    """
    check_inside(coverage=coverage)
    if not (low > 0 and (high is None or high > low)):
        raise InputError(f"low and high must satisfy 0 < low < high, got low={low!r}, high={high!r}")
    inside = [(t, d) for t, d in points if low <= t <= (math.inf if high is None else high)]
    if not all(0 < t < math.inf and math.isfinite(d) and d >= 0 for t, d in inside):
        raise InputError("points must be pairs of a finite t > 0 and a finite distance >= 0 in the range fitted")
    if len({t for t, _ in inside}) < FEWEST:
        return _undefined(f"undefined: {len(inside)} points from {low:g} on, a fit needs {FEWEST}", inside, coverage)
    t, d = np.array(sorted(inside), dtype=np.float64).T
    s = np.log(t)
    b, a = np.polyfit(s, d, 1)
    exponent, scale, power_r2 = _power(s, d, coverage)
    return Diffusion(
        slope=_interval(float(b), s, d, coverage),
        intercept=float(a),
        r2=_r2(d, a + b * s),
        exponent=exponent,
        scale=scale,
        power_r2=power_r2,
        low=int(t[0]),
        high=int(t[-1]),
        points=len(t),
    )


def _interval(value: float, s: Array, y: Array, coverage: float) -> Estimate:
    """Student's, from the slopes of y between the ends of blocks that are even in s."""
    from scipy.special import stdtrit

    wanted = np.linspace(s[0], s[-1], BLOCKS + 1)
    ends = np.unique([int(np.argmin(np.abs(s - each))) for each in wanted])
    ds, dy = np.diff(s[ends]), np.diff(y[ends])
    blocks, whole = len(ds), s[-1] - s[0]
    method = f"least squares on {len(s)} points, {blocks} blocks of ln t"
    if blocks < 3:
        return Estimate(value, -math.inf, math.inf, f"unbounded: the points make only {method}", coverage)
    slope = dy.sum() / whole
    variance = float((((dy - slope * ds) ** 2) / ds).sum() / (blocks - 1) / whole)
    reach = float(stdtrit(blocks - 1, 0.5 + coverage / 2)) * math.sqrt(_LEAST_SQUARES * variance)
    return Estimate(value, value - reach, value + reach, method, coverage)


def _power(s: Array, d: Array, coverage: float) -> tuple[Estimate, float, float]:
    """α, c and R² of d = c·e^(αs), by least squares in d itself; c is linear and profiled out."""
    from scipy.optimize import minimize_scalar

    if not (d > 0).all():
        why = "undefined: a power law needs distances > 0"
        return Estimate(math.nan, -math.inf, math.inf, why, coverage), math.nan, math.nan
    middle = s - s.mean()

    def left(alpha: float) -> float:
        shape = np.exp(alpha * middle)
        return float(((d - shape * (shape @ d) / (shape @ shape)) ** 2).sum())

    found = float(minimize_scalar(left, bounds=_EXPONENTS, method="bounded", options={"xatol": 1e-10}).x)
    shape = np.exp(found * middle)
    c = float((shape @ d) / (shape @ shape))
    return _interval(found, s, np.log(d), coverage), c * math.exp(-found * float(s.mean())), _r2(d, c * shape)


def _r2(d: Array, fitted: Array) -> float:
    total = float(((d - d.mean()) ** 2).sum())
    return 1 - float(((d - fitted) ** 2).sum()) / total if total > 0 else math.nan


def _undefined(reason: str, inside: Sequence[tuple[float, float]], coverage: float) -> Diffusion:
    nothing = Estimate(math.nan, -math.inf, math.inf, reason, coverage)
    ends = [int(t) for t, _ in inside] or [0]
    return Diffusion(nothing, math.nan, math.nan, nothing, math.nan, math.nan, min(ends), max(ends), len(inside))


def mean_slope(fits: Sequence[Diffusion], *, coverage: float = 0.95) -> Estimate:
    """The mean of the slopes of runs that differ in their seed alone, with Student's interval over runs.

    This is the interval to trust where there are seeds: it assumes nothing of the path of a run.
    """
    from scipy.special import stdtrit

    check_inside(coverage=coverage)
    slopes = [fit.slope.value for fit in fits]
    if len(slopes) < 2 or not all(map(math.isfinite, slopes)):
        reason = f"undefined: {sum(map(math.isfinite, slopes))} runs with a slope, an interval over runs needs 2"
        return Estimate(math.nan, -math.inf, math.inf, reason, coverage)
    mean, free = statistics.fmean(slopes), len(slopes) - 1
    reach = float(stdtrit(free, 0.5 + coverage / 2)) * statistics.stdev(slopes) / math.sqrt(len(slopes))
    return Estimate(mean, mean - reach, mean + reach, f"mean slope of {len(slopes)} runs", coverage)
