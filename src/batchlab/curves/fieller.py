"""The interval of a ratio of two estimates that err together (Fieller 1954)."""

from __future__ import annotations

import math


def fieller(x: float, y: float, v_xx: float, v_xy: float, v_yy: float) -> tuple[float, float]:
    """The ends of all r with (x - r·y)² <= v_xx - 2r·v_xy + r²·v_yy; -inf and inf where y may be zero.

    v: the covariance of (x, y), times the square of the quantile: with Student's t and a covariance that was estimated
    with as many degrees of freedom the interval is exact for Gaussian errors. It holds x/y wherever it is bounded.

    >>> fieller(6.0, 2.0, 0.0, 0.0, 0.0), fieller(6.0, 2.0, 1.0, 0.0, 5.0)
    ((3.0, 3.0), (-inf, inf))
    """
    a, b, c = y * y - v_yy, x * y - v_xy, x * x - v_xx
    if not (math.isfinite(a) and a > 0):
        return -math.inf, math.inf
    root = math.sqrt(max(b * b - a * c, 0.0))
    return (b - root) / a, (b + root) / a
