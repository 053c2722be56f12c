"""A straight line through the logarithms of points, y = e^a·x^b, with Student's intervals (n - 2 free)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchlab.core.checks import check_inside, check_positive
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate

FEWEST = 3


@dataclass(frozen=True)
class LogLine:
    """ln y = mean_y + slope·(ln x - mean_x) by least squares. spread: Σ(ln x - mean_x)².

    deviation: the standard deviation of ln y about the line. residuals: ln(measured/fitted) at each point. The
    intervals take ln y as scattered alike, and independently, about the line.

    >>> line = LogLine.through([1, 10, 100], [50, 500, 5000])
    >>> round(line.slope, 6), round(line.value(1000), 6)
    (1.0, 50000.0)
    """

    count: int
    mean_x: float
    mean_y: float
    slope: float
    spread: float
    deviation: float
    residuals: tuple[float, ...]

    @classmethod
    def through(cls, xs: Sequence[float], ys: Sequence[float]) -> LogLine:
        """The line through at least three points with at least two different x; all must be finite and > 0."""
        if len(xs) != len(ys):
            raise InputError(f"x and y must be of one length, got {len(xs)} and {len(ys)}")
        if len(xs) < FEWEST:
            raise InputError(f"a power law needs at least {FEWEST} points, got {len(xs)}")
        for x, y in zip(xs, ys, strict=True):
            check_positive(x=x, y=y)
        log_x, log_y = np.log(np.asarray(xs, dtype=np.float64)), np.log(np.asarray(ys, dtype=np.float64))
        dx, dy = log_x - log_x.mean(), log_y - log_y.mean()
        spread = float(dx @ dx)
        if not spread > 0:
            raise InputError(f"a power law needs at least two different x, got only {xs[0]!r}")
        slope = float(dx @ dy) / spread
        residuals = dy - slope * dx
        deviation = math.sqrt(float(residuals @ residuals) / (len(xs) - 2))
        means = float(log_x.mean()), float(log_y.mean())
        return cls(len(xs), *means, slope, spread, deviation, tuple(map(float, residuals)))

    def student(self, coverage: float) -> float:
        """Student's two-sided quantile."""
        from scipy.special import stdtrit

        return float(stdtrit(self.count - 2, 0.5 + coverage / 2))

    def exponent(self, method: str, coverage: float = 0.95) -> Estimate:
        """b with its interval."""
        check_inside(coverage=coverage)
        half = self.student(coverage) * self.deviation / math.sqrt(self.spread)
        return Estimate(self.slope, self.slope - half, self.slope + half, method, coverage)

    def value(self, x: float) -> float:
        """y on the line."""
        check_positive(x=x)
        return _exp(self.mean_y + self.slope * (math.log(x) - self.mean_x))

    def at(self, x: float, method: str, coverage: float = 0.95, *, new_point: bool = False) -> Estimate:
        """y at x. new_point: the interval of one more measured point, not of the line."""
        check_positive(x=x)
        check_inside(coverage=coverage)
        away = math.log(x) - self.mean_x
        width = math.sqrt(float(new_point) + 1 / self.count + away**2 / self.spread)
        half = self.student(coverage) * self.deviation * width
        value = self.mean_y + self.slope * away
        return Estimate(_exp(value), _exp(value - half), _exp(value + half), method, coverage)


def _exp(value: float) -> float:
    """e^value, infinite where a float cannot hold it."""
    return math.exp(value) if value < 709.0 else math.inf
