"""Comparing means of a few independent runs whose spreads differ (Welch 1938, 1951): tests, sizes, intervals, power.

x̄_i, s_i², n_i: mean, variance with n_i - 1, and number of runs of group i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_inside
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate

Array = NDArray[np.float64]


class WelchTest(NamedTuple):
    """statistic: t, or F of the analysis of variance. p: two-sided for t; NaN where the data have no spread."""

    statistic: float
    p: float


def welch_t(x: Sequence[float], y: Sequence[float]) -> WelchTest:
    """t = (x̄ - ȳ)/√(s_x²/n_x + s_y²/n_y), its degrees of freedom by Satterthwaite.

    >>> test = welch_t([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
    >>> round(test.statistic, 4), round(test.p, 4)
    (-3.0984, 0.0548)
    """
    from scipy.special import stdtr

    a, b = _samples([x, y])
    error = math.hypot(_error(a), _error(b))
    if error == 0:
        return WelchTest(math.nan, math.nan)
    t = float(a.mean() - b.mean()) / error
    return WelchTest(t, 2 * float(stdtr(_satterthwaite(_error(a), len(a), _error(b), len(b)), -abs(t))))


def welch_anova(groups: Sequence[Sequence[float]]) -> WelchTest:
    """Whether any of k >= 2 means differs, whatever their variances (Welch 1951).

    w_i = n_i/s_i², x̄ = Σw_i·x̄_i/Σw, λ = Σ(1 - w_i/Σw)²/(n_i - 1),
    F = Σw_i(x̄_i - x̄)²/(k - 1) / (1 + 2λ(k - 2)/(k² - 1)) on k - 1 and (k² - 1)/(3λ) degrees of freedom.
    NaN where a group has no spread at all.

    >>> test = welch_anova([[1.0, 2.0, 3.0], [4.0, 6.0, 8.0]])
    >>> round(test.statistic, 4), round(test.p, 4)
    (9.6, 0.0548)
    """
    from scipy.special import fdtrc

    samples = _samples(groups)
    k, n = len(samples), np.array([len(each) for each in samples])
    if k < 2:
        raise InputError(f"groups must be at least 2, got {k}")
    errors = np.array([_error(each) for each in samples])
    if not errors.all():
        return WelchTest(math.nan, math.nan)
    w, means = errors**-2.0, np.array([each.mean() for each in samples])
    lam = float(((1 - w / w.sum()) ** 2 / (n - 1)).sum())
    between = float((w * (means - np.average(means, weights=w)) ** 2).sum()) / (k - 1)
    f = between / (1 + 2 * lam * (k - 2) / (k**2 - 1))
    return WelchTest(f, float(fdtrc(k - 1, (k**2 - 1) / (3 * lam), f)))


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): each at most α leaves the chance of any false one at most α.

    NaN counts as a test that was made and stays NaN.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p)), key=lambda i: math.inf if math.isnan(p[i]) else p[i])
    adjusted, highest = [math.nan] * len(p), 0.0
    for rank, i in enumerate(order):
        if not math.isnan(p[i]):
            highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
            adjusted[i] = highest
    return adjusted


def hedges_g(x: Sequence[float], y: Sequence[float]) -> float:
    """(x̄ - ȳ)/s, s² the pooled variance on ν degrees of freedom, times Γ(ν/2)/(√(ν/2)·Γ((ν - 1)/2)): no bias.

    In units of the runs' own spread: it grows with a quiet machine and tells nothing of joules. NaN without spread.
    """
    a, b = _samples([x, y])
    nu = len(a) + len(b) - 2
    s = math.sqrt(((len(a) - 1) * _variance(a) + (len(b) - 1) * _variance(b)) / nu)
    unbiased = math.exp(math.lgamma(nu / 2) - math.lgamma((nu - 1) / 2)) / math.sqrt(nu / 2)
    return float(a.mean() - b.mean()) / s * unbiased if s else math.nan


def ratio_of_means(x: Sequence[float], y: Sequence[float], *, coverage: float = 0.95) -> Estimate:
    """E[x]/E[y] of two independent groups: the hull of all ρ >= 0 for which Welch's t does not reject x̄ = ρ·ȳ.

    (Fieller's construction with Satterthwaite's degrees of freedom at each ρ.) The interval holds 1 where the p-value
    of `welch_t` is at least 1 - coverage, and where it is not, only if it is unbounded: two or three noisy runs may
    reject 1 and neither 0 nor infinity. One pair's interval: not widened for the number of pairs. NaN where a mean is
    not positive, as that of net joules may be.

    >>> ratio_of_means([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
    Estimate(0.3333 [0, 1.129], 95 %, ratio of means of 3 and 3 runs)
    """
    from scipy.optimize import brentq
    from scipy.special import expit, stdtrit

    check_inside(coverage=coverage)
    a, b = _samples([x, y])
    if not (a.mean() > 0 and b.mean() > 0):
        return Estimate(math.nan, -math.inf, math.inf, "undefined: a mean is not positive", coverage)
    (mean_a, error_a), (mean_b, error_b) = ((float(each.mean()), _error(each)) for each in (a, b))

    def inside(log_rho: float) -> float:
        """|x̄ - ρȳ| beyond what t allows, over 1 + ρ: positive where ρ is rejected, with limits at ρ = 0 and ∞."""
        share, rest = float(expit(-log_rho)), float(expit(log_rho))
        nu = _satterthwaite(share * error_a, len(a), rest * error_b, len(b))
        limit = float(stdtrit(nu, 0.5 + coverage / 2)) if nu else 0.0
        return abs(share * mean_a - rest * mean_b) - limit * math.hypot(share * error_a, rest * error_b)

    method = f"ratio of means of {len(a)} and {len(b)} runs"
    ratio, low, high = mean_a / mean_b, 0.0, math.inf
    if error_a == 0 == error_b:
        return Estimate(ratio, low, high, f"{method} without any spread: nothing bounds it", coverage)
    centre = math.log(ratio)
    if inside(-math.inf) > 0:
        low = min(ratio, math.exp(brentq(inside, _beyond(inside, centre, -0.1), centre, xtol=1e-13)))
    if inside(math.inf) > 0:
        high = max(ratio, math.exp(brentq(inside, centre, _beyond(inside, centre, 0.1), xtol=1e-13)))
    return Estimate(ratio, low, high, method, coverage)


def _beyond(inside: Callable[[float], float], centre: float, step: float) -> float:
    """A rejected point, by doubling steps from the centre."""
    while inside(centre + step) <= 0:
        step *= 2
    return centre + step


def detectable_difference(
    groups: Sequence[Sequence[float]], *, alpha: float = 0.05, power: float = 0.8, comparisons: int = 1
) -> float:
    """The smallest difference of two means, as a share of the mean of all, that these repeats would find.

    With probability `power`, by a two-sided t-test at alpha/comparisons, for groups of the average spread and the
    average number of runs: from the non-central t distribution. NaN where there is no spread.
    """
    from scipy.optimize import brentq
    from scipy.special import stdtrit
    from scipy.stats import nct

    check_inside(alpha=alpha, power=power)
    samples = _samples(groups)
    n = float(np.mean([len(each) for each in samples]))
    nu = 2 * (n - 1)
    variance = float(np.mean([_variance(each) for each in samples]))
    grand = float(np.mean([each.mean() for each in samples]))
    if variance == 0 or grand == 0:
        return math.nan
    limit = float(stdtrit(nu, 1 - alpha / comparisons / 2))
    missed = lambda delta: power - float(nct.sf(limit, nu, delta))  # noqa: E731
    delta = float(brentq(missed, 0.0, limit * 2 + 20))
    return delta * math.sqrt(2 * variance / n) / abs(grand)


def _samples(groups: Sequence[Sequence[float]]) -> list[Array]:
    samples = [np.asarray(group, dtype=np.float64) for group in groups]
    for each in samples:
        if each.ndim != 1 or len(each) < 2 or not np.isfinite(each).all():
            raise InputError(f"a group must be at least 2 finite numbers, got {each.tolist()!r:.80}")
    return samples


def _variance(sample: Array) -> float:
    """s²; exactly 0 for equal numbers, whose mean rounding may move."""
    return 0.0 if (sample == sample[0]).all() else float(sample.var(ddof=1))


def _error(sample: Array) -> float:
    """The standard error of the mean."""
    return math.sqrt(_variance(sample) / len(sample))


def _satterthwaite(error_a: float, n_a: int, error_b: float, n_b: int) -> float:
    """(e_a² + e_b²)²/(e_a⁴/(n_a - 1) + e_b⁴/(n_b - 1)) of two standard errors; 0 where both are 0."""
    largest = max(error_a, error_b)
    if largest == 0:
        return 0.0
    a, b = (error_a / largest) ** 2, (error_b / largest) ** 2
    return (a + b) ** 2 / (a**2 / (n_a - 1) + b**2 / (n_b - 1))
