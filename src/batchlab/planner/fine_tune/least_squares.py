"""Weighted least squares with Student's t for its coefficients, their sums, and their ratios (Fieller)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_inside
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.curves.fieller import fieller

Array = NDArray[np.float64]
_RANK = 1e-9


@dataclass(frozen=True)
class LeastSquares(JsonNoun):
    """values: the coefficients β. covariance: theirs, from the residuals. freedom: points less coefficients.

    With no freedom nothing is known of the errors, and all intervals are infinite.
    """

    values: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    freedom: int
    method: str
    coverage: float

    def estimate(self, contrast: Sequence[float], *, offset: float = 0.0) -> Estimate:
        """offset + c·β ± t·√(c·V·c): for normal errors of the assumed weights it covers at its rate."""
        c = np.asarray(contrast, dtype=np.float64)
        value = offset + float(c @ self.values)
        reach = (
            self._quantile() * math.sqrt(max(float(c @ np.array(self.covariance) @ c), 0.0))
            if self.freedom
            else math.inf
        )
        return Estimate(value, value - reach, value + reach, self.method, self.coverage)

    def ratio(self, over: Sequence[float], under: Sequence[float]) -> Estimate:
        """(p·β)/(q·β) with Fieller's interval, unbounded where the denominator may be zero."""
        both = np.array([over, under], dtype=np.float64)
        x, y = (float(value) for value in both @ self.values)
        if y == 0:
            return Estimate(math.nan, -math.inf, math.inf, f"undefined: a ratio to zero; {self.method}", self.coverage)
        if not self.freedom:
            return Estimate(x / y, -math.inf, math.inf, self.method, self.coverage)
        v = self._quantile() ** 2 * (both @ np.array(self.covariance) @ both.T)
        low, high = fieller(x, y, float(v[0, 0]), float(v[0, 1]), float(v[1, 1]))
        return Estimate(x / y, min(low, x / y), max(high, x / y), self.method, self.coverage)

    def _quantile(self) -> float:
        from scipy.special import stdtrit

        return float(stdtrit(self.freedom, 0.5 + self.coverage / 2))


def least_squares(
    design: Any, values: Any, *, weights: Any = None, coverage: float = 0.95, method: str = "least squares"
) -> LeastSquares:
    """β of least Σ w(y - Xβ)². weights: inverse variances up to a factor; None for equal ones. X of full rank.

    >>> least_squares([[1, 1], [1, 2], [1, 4]], [3.1, 4.9, 9.0]).estimate([0, 1])
    Estimate(1.979 [1.193, 2.765], 95 %, least squares, 3 points)
    """
    check_inside(coverage=coverage)
    x, y = np.asarray(design, dtype=np.float64), np.asarray(values, dtype=np.float64)
    root = np.ones(len(y)) if weights is None else np.sqrt(np.asarray(weights, dtype=np.float64))
    scale = np.linalg.norm(root[:, None] * x, axis=0)
    q, r = np.linalg.qr(root[:, None] * x / scale)
    inverse = np.linalg.inv(r)
    beta = inverse @ (q.T @ (root * y)) / scale
    freedom = len(y) - x.shape[1]
    variance = float(np.square(root * (y - x @ beta)).sum() / freedom) if freedom else math.inf
    covariance = (inverse @ inverse.T) / np.outer(scale, scale)
    spread = variance * covariance if freedom else np.full_like(covariance, math.inf)
    label = f"{method}, {len(y)} points" + ("" if freedom else ": as many as unknowns, their errors are not known")
    return LeastSquares(tuple(beta.tolist()), tuple(map(tuple, spread.tolist())), freedom, label, coverage)


def full_rank(design: Any) -> bool:
    """Whether the columns can be told apart, each brought to one length."""
    x = np.asarray(design, dtype=np.float64)
    scale = np.linalg.norm(x, axis=0)
    return bool((scale > 0).all()) and int(np.linalg.matrix_rank(x / scale, tol=_RANK)) == x.shape[1]
