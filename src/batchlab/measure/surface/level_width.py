"""How wide a loss curve is at a level above its centre, and the median of that over directions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.measure.order import median_interval


class Reach(NamedTuple):
    """value: the width, infinite where the curve ends before the level.

    low, high: the crossings lie between two neighbouring points each, so that the width is between these.
    """

    value: float
    low: float
    high: float


def reach(x: Sequence[float], losses: Sequence[float], origin: float, level: float) -> Reach:
    """The width of the curve (x, losses) through (0, origin) between its nearest crossings of origin + level.

    Linear between points; halfway to a point that is infinite.

    >>> reach([-1.0, 0.0, 1.0, 2.0], [2.0, 0.0, 0.5, 1.5], 0.0, 1.0)
    Reach(value=2.0, low=1.0, high=3.0)
    """
    target = origin + level
    if not target > origin:
        raise InputError(f"level must be large enough to tell f(0) + level from f(0) = {origin:.6g}, got {level!r}")
    pairs = list(zip(x, losses, strict=True))
    right = _side([(a, f) for a, f in pairs if a > 0], origin, target)
    left = _side([(-a, f) for a, f in reversed(pairs) if a < 0], origin, target)
    return Reach(*(l + r for l, r in zip(left, right, strict=True)))


def _side(points: Sequence[tuple[float, float]], origin: float, target: float) -> Reach:
    """The first crossing outwards from 0."""
    before, f_before = 0.0, origin
    for a, f in points:
        if f >= target:
            share = 0.5 if f == math.inf else (target - f_before) / (f - f_before)
            return Reach(before + (a - before) * share, before, a)
        before, f_before = a, f
    return Reach(math.inf, before, math.inf)


def median_width(reaches: Sequence[Reach], *, coverage: float, sampled: bool) -> Estimate:
    """The median of the widths; `sampled`: whether their directions are a random sample, else there is no interval.

    A width that is only known to lie between bounds counts with its low one for the interval's low end, and with its
    high one for the other.
    """
    n = len(reaches)
    ranks = median_interval(range(n), coverage=coverage)
    censored = sum(math.isinf(each.value) for each in reaches)
    value = statistics.median(each.value for each in reaches)
    method = f"median of {n} directions"
    method += f", {censored} of them below the level as far as the curve goes" if censored else ""
    if not math.isfinite(value):
        value, method = math.nan, f"undefined: {method}"
    if not sampled or n == 1:
        why = "one direction has" if n == 1 else "directions that were given have"
        return Estimate(value, 0.0, math.inf, f"{method}, {why} no interval", coverage)
    low = sorted(each.low for each in reaches)[int(ranks.low)]
    high = sorted(each.high for each in reaches)[int(ranks.high)]
    return Estimate(value, low, high, method, ranks.coverage)
