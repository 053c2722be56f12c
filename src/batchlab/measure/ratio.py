"""A ratio of two means with Fieller's interval, from weighted pairs, in constant memory."""

from __future__ import annotations

import math
from typing import Any

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate

_FEWEST = 3.0


class RatioOfMeans:
    """E[x]/E[y] from pairs (x, y), later pairs weighing more if `ema` is given.

    ema: the factor by which older pairs lose weight at each new one, in [0, 1); None weighs all alike.
    coverage: of the interval, in (0, 1).

    The interval is Fieller's (1954): all r for which mean(x - r·y) does not differ from 0 by Student's t with
    n_eff - 1 degrees of freedom, n_eff = (Σw)²/Σw². It is exact for Gaussian pairs, and unbounded where the
    denominator may be zero. It takes the pairs as independent and of one distribution: a mean that drifts widens it.

    >>> ratio = RatioOfMeans()
    >>> for x, y in [(4.0, 2.1), (4.2, 1.9), (3.9, 2.0), (4.1, 2.0)]:
    ...     ratio.update(x, y)
    >>> ratio.ratio()
    Estimate(2.025 [1.825, 2.251], 95 %, 4 steps)
    """

    def __init__(self, *, ema: float | None = None, coverage: float = 0.95) -> None:
        if ema is not None and not 0 <= ema < 1:
            raise InputError(f"ema must lie in [0, 1) or be None, got {ema!r}")
        if not 0 < coverage < 1:
            raise InputError(f"coverage must lie in (0, 1), got {coverage!r}")
        self.ema, self.coverage, self.count = ema, coverage, 0
        self._weight = self._weight_sq = 0.0
        self._mean = (0.0, 0.0)
        self._spread = (0.0, 0.0, 0.0)

    def update(self, x: float, y: float) -> None:
        """Adds one pair (Welford's update: sums of squares about the running mean lose no digits)."""
        if not (math.isfinite(x) and math.isfinite(y)):
            raise InputError(f"a pair must be finite, got ({x!r}, {y!r})")
        keep = 1.0 if self.ema is None else self.ema
        self._weight = keep * self._weight + 1.0
        self._weight_sq = keep**2 * self._weight_sq + 1.0
        dx, dy = x - self._mean[0], y - self._mean[1]
        self._mean = (self._mean[0] + dx / self._weight, self._mean[1] + dy / self._weight)
        left = 1.0 - 1.0 / self._weight
        xx, xy, yy = self._spread
        self._spread = (keep * xx + left * dx * dx, keep * xy + left * dx * dy, keep * yy + left * dy * dy)
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
        low, high = self._fieller(n, lowest)
        value = x / y if y > 0 else math.nan
        if not y > 0:
            method = f"undefined: the mean of the denominator is {y:.3g}; {method}"
        elif high == math.inf:
            method = f"unbounded above: the denominator may be zero; {method}"
        return Estimate(value, low, high, method, self.coverage)

    def _fieller(self, n: float, lowest: float) -> tuple[float, float]:
        """The hull of all r >= lowest with (x - r·y)² <= t²·(v_xx - 2r·v_xy + r²·v_yy): a·r² - 2b·r + c <= 0.

        v is the covariance of the means.
        """
        from scipy.special import stdtrit

        t_sq = float(stdtrit(n - 1, 0.5 + self.coverage / 2)) ** 2
        x, y = self._mean
        v_xx, v_xy, v_yy = (moment / self._weight / (n - 1) for moment in self._spread)
        a, b, c = y * y - t_sq * v_yy, x * y - t_sq * v_xy, x * x - t_sq * v_xx
        root = math.sqrt(max(b * b - a * c, 0.0))
        if a > 0:
            low, high = (b - root) / a, (b + root) / a
            return (max(low, lowest), high) if y > 0 and high >= lowest else (lowest, math.inf)
        if a < 0 < root and (b + root) / a < lowest:  # two rays, of which one is known to be wrong
            return max((b - root) / a, lowest), math.inf
        return lowest, math.inf

    def state_dict(self) -> dict[str, Any]:
        """All sums as plain numbers."""
        return {
            "count": self.count,
            "weight": self._weight,
            "weight_sq": self._weight_sq,
            "mean": list(self._mean),
            "spread": list(self._spread),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.count, self._weight, self._weight_sq = state["count"], state["weight"], state["weight_sq"]
        self._mean = (state["mean"][0], state["mean"][1])
        self._spread = (state["spread"][0], state["spread"][1], state["spread"][2])
