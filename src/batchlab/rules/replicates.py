"""Tests of a regression on cells that were all run with the same seeds, by what the seeds themselves scatter.

Y is (seeds, cells), one run each. A seed may shift all its cells alike, and cells may scatter unequally: a run at a
high learning rate is noisier. So a question about the regression is put to each seed by itself, as contrasts Z = YQ of
its cells, Q (cells, k) with orthonormal columns, and answered by the scatter of Z over seeds alone:

  F = S·|z̄|²/tr(Σ̂),   Σ̂ the covariance of Z with S - 1,   on kε̃ and kε̃(S - 1) degrees of freedom,

ε̃ the correction of Huynh and Feldt (1976) to ε̂ = tr(Σ̂)²/(k·tr(Σ̂²)) of Greenhouse and Geisser, for contrasts that
scatter unequally. For k = 1 it is Student's t with S - 1. Cells times seeds less the coefficients, the count of a plain
regression, would take one seed's cells for independent runs and the regression's own misfit for noise.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from batchlab.core.facts import Estimate
from batchlab.curves.fieller import fieller

Array = NDArray[np.float64]

_RANK = 1e-9  # of the largest singular value
_ROUNDING = 1e-24  # of a sum of squares


def independent(design: Array) -> Array:
    """An orthonormal basis (cells, rank) of a design's columns."""
    u, s, _ = np.linalg.svd(design, full_matrices=False)
    return u[:, : int((s > _RANK * s[0]).sum())] if s[0] > 0 else u[:, :0]


def beyond(design: Array, reduced: Array) -> Array:
    """The contrasts that `design` has beyond `reduced`, whose columns it contains: an orthonormal basis (cells, k)."""
    base = independent(reduced)
    whole = independent(design)
    rest = whole - base @ (base.T @ whole)
    u, s, _ = np.linalg.svd(rest, full_matrices=False)
    return u[:, : int((s > math.sqrt(_RANK)).sum())]


def p_value(scores: Array, contrasts: Array) -> float:
    """The chance of so large a mean of the contrasts where their true means are 0. scores: Y. contrasts: Q.

    1 where there is nothing to test. 0 where seeds agree exactly on a mean that is not 0. With 3 seeds and cells whose
    deviations differ 20 times, 7 % of tests at the level of 5 % are wrong; with 5 seeds, or equal ones, 5 %.
    """
    from scipy.special import fdtrc

    centred = scores - scores.mean()
    z = centred @ contrasts
    seeds, k = z.shape
    if k == 0:
        return 1.0
    mean, rounding = z.mean(axis=0), _ROUNDING * float((centred**2).sum())
    covariance = np.cov(z, rowvar=False).reshape(k, k)
    spread, size = float(np.trace(covariance)), float(mean @ mean)
    if seeds * size <= rounding:
        return 1.0
    if spread <= rounding:
        return 0.0
    epsilon = _huynh_feldt(spread**2 / (k * float((covariance**2).sum())), k, seeds)
    return float(fdtrc(k * epsilon, k * epsilon * (seeds - 1), seeds * size / spread))


def _huynh_feldt(epsilon: float, k: int, seeds: int) -> float:
    """ε̃ = (S·k·ε̂ - 2)/(k(S - 1 - k·ε̂)), between ε̂ and 1."""
    below = k * (seeds - 1 - k * epsilon)
    if below <= _RANK:
        return epsilon if seeds < 3 else 1.0
    return min(1.0, max(epsilon, (seeds * k * epsilon - 2) / below))


def mean_of(values: Array, coverage: float, method: str) -> Estimate:
    """The mean over seeds with Student's interval. values: (seeds,), at least two."""
    half = student(len(values), coverage) * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return Estimate(mean, mean - half, mean + half, method, coverage)


def ratio_of(x: Array, y: Array, coverage: float, method: str) -> Estimate:
    """E[x]/E[y] from one pair a seed, with Fieller's interval; unbounded where y may be 0, NaN where it is."""
    n = len(x)
    scale, covariance = student(n, coverage) ** 2 / n, np.cov(x, y)
    mean_x, mean_y = float(x.mean()), float(y.mean())
    low, high = fieller(mean_x, mean_y, *(scale * float(covariance[at]) for at in ((0, 0), (0, 1), (1, 1))))
    value = mean_x / mean_y if mean_y else math.nan
    if math.isinf(high):
        return Estimate(value, low, high, f"{method}: not bounded, the denominator may be 0", coverage)
    return Estimate(value, min(low, value), max(high, value), method, coverage)


def student(n: int, coverage: float) -> float:
    """Student's two-sided quantile with n - 1 degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.5 + coverage / 2))
