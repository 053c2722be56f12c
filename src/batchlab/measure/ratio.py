"""A ratio of two means with Fieller's interval, from weighted pairs, in constant memory."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from batchlab.core.checks import check_inside
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate

_FEWEST = 3.0
_ROUNDS = 3
_SYMMETRIC = 1e-6
_LARGEST = 1e100  # whose cube is a number still


class RatioOfMeans:
    """E[x]/E[y] from pairs (x, y), later pairs weighing more if `ema` is given.

    ema: the factor by which older pairs lose weight at each new one, in [0, 1); None weighs all alike.
    coverage: of the interval, in (0, 1).

    The interval is Fieller's (1954): all r for which mean(x - r·y) does not differ from 0 by Student's t with
    n_eff - 1 degrees of freedom, n_eff = (Σw)²/Σw². It is exact for Gaussian pairs, and unbounded where the
    denominator may be zero. Squared norms are skewed, and a few large pairs yet to come make that interval end too
    early: each end is moved out, never in, to where Hall's (1992) transformation of t for skewness puts it. The pairs
    are taken as independent and of one distribution: a mean that drifts widens the interval.

    >>> ratio = RatioOfMeans()
    >>> for x, y in [(4.0, 2.1), (4.2, 1.9), (3.9, 2.0), (4.1, 2.0), (3.8, 2.0)]:
    ...     ratio.update(x, y)
    >>> ratio.ratio()
    Estimate(2 [1.847, 2.667], 95 %, 5 steps)
    """

    def __init__(self, *, ema: float | None = None, coverage: float = 0.95) -> None:
        if ema is not None and not 0 <= ema < 1:
            raise InputError(f"ema must lie in [0, 1) or be None, got {ema!r}")
        check_inside(coverage=coverage)
        self.ema, self.coverage, self.count = ema, coverage, 0
        self._weight = self._weight_sq = 0.0
        self._mean = (0.0, 0.0)
        self._spread = (0.0, 0.0, 0.0)
        self._skew = (0.0, 0.0, 0.0, 0.0)

    def update(self, x: float, y: float) -> None:
        """Adds one pair, of numbers up to 1e100 (Welford's: sums of powers about the running mean lose no digits)."""
        if not (abs(x) <= _LARGEST and abs(y) <= _LARGEST):
            raise InputError(f"a pair must be finite, and within 1e100 of 0, got ({x!r}, {y!r})")
        keep = 1.0 if self.ema is None else self.ema
        self._weight = keep * self._weight + 1.0
        self._weight_sq = keep**2 * self._weight_sq + 1.0
        dx, dy = x - self._mean[0], y - self._mean[1]
        self._mean = (self._mean[0] + dx / self._weight, self._mean[1] + dy / self._weight)
        share = 1.0 / self._weight
        xx, xy, yy = (keep * moment for moment in self._spread)
        xxx, xxy, xyy, yyy = (keep * moment for moment in self._skew)
        left = 1.0 - share
        cubic = left * (1.0 - 2.0 * share)
        self._spread = (xx + left * dx * dx, xy + left * dx * dy, yy + left * dy * dy)
        self._skew = (
            xxx + cubic * dx**3 - share * 3 * dx * xx,
            xxy + cubic * dx**2 * dy - share * (dy * xx + 2 * dx * xy),
            xyy + cubic * dx * dy**2 - share * (dx * yy + 2 * dy * xy),
            yyy + cubic * dy**3 - share * 3 * dy * yy,
        )
        self.count += 1

    @property
    def effective_count(self) -> float:
        """(Σw)²/Σw²: as many equally weighted pairs would tell as much."""
        return self._weight**2 / self._weight_sq if self._weight_sq else 0.0

    @property
    def means(self) -> tuple[float, float]:
        """The weighted means of x and of y."""
        return self._mean

    def ratio(self, *, lowest: float = -math.inf) -> Estimate:
        """mean(x)/mean(y) with its interval; E[y] > 0 is taken as known.

        lowest: a bound that the truth is known to respect, as tr(Σ) >= 0 is; the interval ends there. Where the data
        contradict what is known, nothing is claimed: the interval is [lowest, inf].
        """
        x, y = self._mean
        n = self.effective_count
        method = f"{self.count} steps" if self.ema is None else f"{self.count} steps, {n:.0f} in effect"
        if n < _FEWEST:
            return Estimate(math.nan, lowest, math.inf, f"undefined: {method} are too few", self.coverage)
        low, high = self._interval(n, lowest)
        value = x / y if y > 0 else math.nan
        if not y > 0:
            method = f"undefined: the mean of the denominator is {y:.3g}; {method}"
        elif high == math.inf:
            method = f"unbounded above: the denominator may be zero; {method}"
        return Estimate(value, low, high, method, self.coverage)

    def _interval(self, n: float, lowest: float) -> tuple[float, float]:
        """Fieller's interval, each end moved out by the skewness at that end."""
        t = _student(round(n, 3), self.coverage)
        low, high = self._fieller(n, t, lowest)
        return min(low, self._moved_out(0, low, n, t, lowest)), max(high, self._moved_out(1, high, n, t, lowest))

    def _moved_out(self, side: int, end: float, n: float, t: float, lowest: float) -> float:
        for _ in range(_ROUNDS):
            skewness = self._skewness(n, end)
            stretched = -_hall(-t, skewness) if side else _hall(t, skewness)
            if stretched <= t:
                break
            end = self._fieller(n, stretched, lowest)[side]
        return end

    def _fieller(self, n: float, t: float, lowest: float) -> tuple[float, float]:
        """The hull of all r >= lowest with (x - r·y)² <= t²·(v_xx - 2r·v_xy + r²·v_yy): a·r² - 2b·r + c <= 0.

        v is the covariance of the means.
        """
        t_sq = t * t
        x, y = self._mean
        scale = 1 / self._weight / (n - 1)
        v_xx, v_xy, v_yy = scale * self._spread[0], scale * self._spread[1], scale * self._spread[2]
        a, b, c = y * y - t_sq * v_yy, x * y - t_sq * v_xy, x * x - t_sq * v_xx
        root = math.sqrt(max(b * b - a * c, 0.0))
        if a > 0:
            low, high = (b - root) / a, (b + root) / a
            return (max(low, lowest), high) if y > 0 and high >= lowest else (lowest, math.inf)
        if a < 0 < root and (b + root) / a < lowest:  # two rays, of which one is known to be wrong
            return max((b - root) / a, lowest), math.inf
        return lowest, math.inf

    def _skewness(self, n: float, r: float) -> float:
        """The skewness of x - r·y, that of y where r is infinite, over √n."""
        p, q = (1.0, -r) if math.isfinite(r) else (0.0, -1.0)
        (xx, xy, yy), (xxx, xxy, xyy, yyy) = self._spread, self._skew
        variance = (p * p * xx + 2 * p * q * xy + q * q * yy) / self._weight
        third = (p**3 * xxx + 3 * p * p * q * xxy + 3 * p * q * q * xyy + q**3 * yyy) / self._weight
        unbiased = math.sqrt(n * (n - 1)) / (n - 2)
        return third / variance**1.5 * unbiased / math.sqrt(n) if variance > 0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """All sums as plain numbers."""
        return {
            "count": self.count,
            "weight": self._weight,
            "weight_sq": self._weight_sq,
            "mean": list(self._mean),
            "spread": list(self._spread),
            "skew": list(self._skew),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.count, self._weight, self._weight_sq = state["count"], state["weight"], state["weight_sq"]
        self._mean = (state["mean"][0], state["mean"][1])
        xx, xy, yy = state["spread"]
        xxx, xxy, xyy, yyy = state["skew"]
        self._spread, self._skew = (xx, xy, yy), (xxx, xxy, xyy, yyy)


@lru_cache(maxsize=256)
def _student(n: float, coverage: float) -> float:
    """Student's two-sided quantile with n - 1 degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.5 + coverage / 2))


def _hall(t: float, skewness: float) -> float:
    """The t statistic whose transform for skewness, t + k(t²/3 + 1/6) + k²t³/27, is the given one; k is γ/√n."""
    if abs(skewness) < _SYMMETRIC:
        return t
    return 3 / skewness * (math.cbrt(1 + skewness * (t - skewness / 6)) - 1)
