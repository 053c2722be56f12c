"""S(B) = S_min(1 + B_crit/B) from steps to target at several batch sizes (McCandlish et al. 2018, arXiv 1812.06162).

Least squares on ln S = ln S_min + ln(1 + B_crit/B), so that errors count by ratio. For a given B_crit the best
ln S_min is a mean, so the squared error has one free number, c = ln B_crit:

  r(c, a) = r(c) + w (a - a(c))²,    a = ln S_min, w the number of runs.

The interval of each number is its profile: all its values on {r(c, a) <= r_min (1 + t²/(m - 2))}, m the number of
batch sizes, t Student's quantile. As r(c) has finite limits at c = ±∞, data that do not bound B_crit say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from batchlab.core.checks import check_inside
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.curves.run_sets import Array, by_size

FEWEST_SIZES = 3
_BEYOND = 16.0  # e^16 times beyond the grid, the law differs from its limit by 1e-7
_POINTS = 2001


@dataclass(frozen=True)
class Tradeoff(JsonNoun):
    """The fitted law. Steps are updates; s_min: updates; e_min: examples; b_crit = e_min/s_min: examples.

    b_crit may be 0 (steps do not fall with the batch) or infinite (they fall as 1/B), and its interval may reach
    either: then `bracketed` is false and `note` says which batch sizes are missing.
    batch_sizes, residuals: the sizes that were fitted, and ln(measured/fitted) at each.
    censored: runs that did not reach the target. note: what the reader must know; "" for nothing.
    """

    s_min: Estimate
    e_min: Estimate
    b_crit: Estimate
    bracketed: bool
    batch_sizes: tuple[float, ...]
    residuals: tuple[float, ...]
    censored: int = 0
    note: str = ""

    def steps(self, batch_size: float) -> float:
        """S = S_min + E_min/B: updates to the target, by the fitted law."""
        if not batch_size > 0:
            raise InputError(f"batch_size must be > 0, got {batch_size!r}")
        return self.s_min.value + self.e_min.value / batch_size


def fit_tradeoff(batch_sizes: Sequence[float], steps: Sequence[float | None], *, coverage: float = 0.95) -> Tradeoff:
    """Fits S_min, E_min and B_crit to pairs (batch size, steps to target), one a run; several runs a size are welcome.

    batch_sizes: in examples. steps: updates to the target; None or infinity for a run that did not reach it.
    coverage: of the intervals, for errors of ln S that are normal and of one size at all batch sizes. Runs of one
    size share its learning rate, so the errors that count are those of the sizes' means: more runs narrow the
    interval by what they tell of the mean, not by their number.

    A run that did not reach the target took longer than any that did. Where such are fewer than half of a size's
    runs, the median stands for the mean; where they are half or more, the size is left out. Both are noted.

    Raises `InputError` for fewer than 3 batch sizes with a known mean: two numbers cannot be judged by two points.

    >>> fit = fit_tradeoff([16, 64, 256, 1024], [500, 200, 125, 106.25])
    >>> round(fit.b_crit.value, 6), round(fit.s_min.value, 6), fit.bracketed
    (64.0, 100.0, True)
    """
    check_inside(coverage=coverage)
    runs = by_size(batch_sizes, steps)
    sizes, notes = runs.sizes, list(runs.notes)
    if len(sizes) < FEWEST_SIZES:
        raise InputError(
            f"batch_sizes must hold at least {FEWEST_SIZES} different sizes that reached the target, got {len(sizes)}"
        )
    profile = _Profile(np.log(sizes), runs.log_steps, runs.counts)
    best = profile.best()
    bounds = profile.bounds(best, profile.threshold(best, coverage))
    a, b, e = (_estimate(*pair, coverage, len(sizes)) for pair in zip(profile.values(best), bounds, strict=True))
    bracketed = sizes[0] <= b.value <= sizes[-1] and b.low > 0 and math.isfinite(b.high)
    notes += [] if bracketed else [_why_not(b, sizes[0], sizes[-1])]
    residuals = tuple(float(r) for r in profile.residuals(best))
    return Tradeoff(a, e, b, bool(bracketed), tuple(map(float, sizes)), residuals, runs.censored, "; ".join(notes))


class _Profile:
    """r(c) and a(c) of the module's docstring; c in [-inf, inf]."""

    def __init__(self, log_sizes: Array, log_steps: Array, counts: Array) -> None:
        self.log_sizes, self.log_steps, self.counts = log_sizes, log_steps, counts
        self.low, self.high = log_sizes[0] - _BEYOND, log_sizes[-1] + _BEYOND

    def _shape(self, c: Array) -> Array:
        """ln(1 + e^c/B), one row for each c."""
        return np.logaddexp(0.0, np.asarray(c)[..., None] - self.log_sizes)

    def a(self, c: Array | float) -> Array:
        """The best ln S_min for each c."""
        mean: Array = np.average(self.log_steps - self._shape(np.asarray(c)), axis=-1, weights=self.counts)
        return mean

    def residuals(self, c: Array | float) -> Array:
        """ln(measured/fitted) of each size, one row for each c; the limits of the law at ±inf."""
        finite = np.clip(np.asarray(c, dtype=np.float64), self.low, self.high)
        errors: Array = self.log_steps - self._shape(finite) - self.a(finite)[..., None]
        return errors

    def r(self, c: Array | float) -> Array:
        """The least squared error for each c."""
        total: Array = (self.counts * self.residuals(c) ** 2).sum(axis=-1)
        return total

    def best(self) -> float:
        """The c of the least error; ±inf where it keeps falling towards the limit."""
        from scipy.optimize import minimize_scalar

        grid = np.linspace(self.low, self.high, _POINTS)
        at = int(np.argmin(self.r(grid)))
        if at in (0, _POINTS - 1):
            return -math.inf if at == 0 else math.inf
        options = {"xatol": 1e-13}
        found = minimize_scalar(self.r, bounds=(grid[at - 1], grid[at + 1]), method="bounded", options=options)
        return float(found.x)

    def values(self, c: float) -> tuple[float, float, float]:
        """S_min, B_crit, E_min at c."""
        if c == math.inf:
            return 0.0, math.inf, math.exp(float(self.a(self.high)) + self.high)
        if c == -math.inf:
            return math.exp(float(self.a(self.low))), 0.0, 0.0
        a = float(self.a(c))
        return math.exp(a), math.exp(c), math.exp(a + c)

    def threshold(self, best: float, coverage: float) -> float:
        """The squared error up to which (c, a) are believed."""
        from scipy.special import stdtrit

        free = len(self.log_sizes) - 2
        return float(self.r(best)) * (1 + float(stdtrit(free, 0.5 + coverage / 2)) ** 2 / free)

    def bounds(self, best: float, limit: float) -> tuple[tuple[float, float], ...]:
        """The intervals of S_min, B_crit and E_min: the reach of {r(c, a) <= limit} along each."""
        start = min(max(best, self.low), self.high)
        low, high = self._edge(start, self.low, -math.inf, limit), self._edge(start, self.high, math.inf, limit)
        inside = np.linspace(max(low, self.low), min(high, self.high), _POINTS)
        slack = np.sqrt(np.maximum(limit - self.r(inside), 0.0) / self.counts.sum())
        a = self.a(inside)
        s_low = 0.0 if high == math.inf else math.exp(float((a - slack).min()))
        e_low = 0.0 if low == -math.inf else math.exp(float((a + inside - slack).min()))
        s_high, e_high = math.exp(float((a + slack).max())), math.exp(float((a + inside + slack).max()))
        return (s_low, s_high), (math.exp(low), math.exp(high) if high < math.inf else math.inf), (e_low, e_high)

    def _edge(self, start: float, end: float, beyond: float, limit: float) -> float:
        """Where r passes `limit` between start and end, seen from the end; `beyond` where it does not."""
        from scipy.optimize import brentq

        if float(self.r(end)) <= limit:
            return beyond
        grid = np.linspace(end, start, _POINTS)
        believed = self.r(grid) <= limit
        if not believed.any():
            return start
        first = int(np.argmax(believed))
        excess: Callable[[float], float] = lambda c: float(self.r(c)) - limit  # noqa: E731
        return float(brentq(excess, grid[first - 1], grid[first]))


def _estimate(value: float, interval: tuple[float, float], coverage: float, sizes: int) -> Estimate:
    low, high = min(interval[0], value), max(interval[1], value)
    return Estimate(value, low, high, f"least squares on ln S over {sizes} batch sizes, profile interval", coverage)


def _why_not(b_crit: Estimate, smallest: float, largest: float) -> str:
    if b_crit.low == 0 and b_crit.high == math.inf:
        return "the steps do not bound the critical batch size: their scatter hides the law"
    if b_crit.value > largest or b_crit.high == math.inf:
        return f"no plateau is seen up to batch size {largest:g}: add larger ones to bound the critical batch size"
    return f"little is gained from batch size {smallest:g} on: add smaller ones to bound the critical batch size"
