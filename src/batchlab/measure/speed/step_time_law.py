"""The law of a step's time, t(b) = t₀ + t₁·b, fitted to measured sizes, and what it says of a batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_inside
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, MicroBatchTime
from batchlab.core.jsonio import JsonNoun
from batchlab.curves.fieller import fieller

TOLERANCE = 0.05
OVERHEAD, COMMUNICATION, DATA = 0.5, 0.3, 0.3
_FEWEST = 2

Array = NDArray[np.float64]


@dataclass(frozen=True)
class StepTimeLaw(JsonNoun):
    """t(b) = fixed + per_example·b seconds. half: fixed/per_example, the size at which half the speed is reached.

    At b examples the speed is b/(b + half) of the limit 1/per_example. `fixed` can come out negative, where time grows
    faster than size (a cache that overflows): the law does not hold then, and nothing is clamped.
    """

    fixed: Estimate
    per_example: Estimate
    half: Estimate

    def size_for(self, share: float = 1 - TOLERANCE) -> float:
        """Examples at which `share` of the limiting speed is reached: half·share/(1 - share)."""
        check_inside(share=share)
        return self.half.value * share / (1 - share)

    def seconds(self, examples: float) -> float:
        """t₀ + t₁·b."""
        return self.fixed.value + self.per_example.value * examples

    def overhead(self, examples: float) -> float:
        """The share of the fixed time in the step, t₀/(t₀ + t₁·b)."""
        return self.fixed.value / self.seconds(examples)


def fit_step_time(points: Sequence[MicroBatchTime], *, coverage: float = 0.95) -> StepTimeLaw:
    """Least squares on the sizes' times, each weighted by 1/t, which suits a spread that grows as √t.

    Each interval is the wider of two: from the residuals about the line, by Student's t with n - 2 degrees of freedom,
    which knows where the law bends; and from the intervals of the times themselves, which knows their noise. That of
    t₀/t₁ is Fieller's with either. Two sizes have no residuals: then the noise alone counts, and whether the law
    holds is not known. One size fits nothing.

    >>> exact = [MicroBatchTime(b, Estimate(5 + b, 5 + b, 5 + b, "given")) for b in (1, 2, 4, 8)]
    >>> fit_step_time(exact).half
    Estimate(5 [5, 5], 95 %, least squares, 4 sizes)
    """
    check_inside(coverage=coverage)
    if len({point.examples for point in points}) < _FEWEST:
        return _undefined(f"undefined: {len(points)} sizes, a line needs {_FEWEST}", coverage)
    b = np.array([point.examples for point in points], dtype=np.float64)
    t = np.array([point.seconds.value for point in points])
    if not (np.isfinite(t).all() and (t > 0).all()):
        raise InputError(f"seconds must be finite and > 0, got {t.tolist()!r:.80}")
    design, weights = np.stack([np.ones_like(b), b], 1), 1 / t
    inverse = np.asarray(np.linalg.inv(design.T @ (weights[:, None] * design)), dtype=np.float64)
    solve = inverse @ (design.T * weights)
    beta = solve @ t
    covariances = _covariances(points, t - design @ beta, weights, inverse, solve, coverage)
    method = f"least squares, {len(b)} sizes" + ("" if len(b) > _FEWEST else ": whether the law holds is not known")
    bounds = [max(math.sqrt(max(c[i, i], 0.0)) for c in covariances) for i in (0, 1)]
    fixed, each = (Estimate(float(v), float(v - r), float(v + r), method, coverage) for v, r in zip(beta, bounds))
    return StepTimeLaw(fixed, each, _half(beta, covariances, method, coverage))


def _covariances(
    points: Sequence[MicroBatchTime], residuals: Array, weights: Array, inverse: Array, solve: Array, coverage: float
) -> list[Array]:
    """Of (t₀, t₁), times the square of the quantile: by the points' own intervals, and by the residuals."""
    from scipy.special import ndtri, stdtrit

    z = float(ndtri(0.5 + coverage / 2))
    reach = np.array([_reach(point.seconds, z) for point in points])
    bounded = bool(np.isfinite(reach).all())
    found = [np.asarray((solve * reach**2) @ solve.T) if bounded else np.full((2, 2), math.inf)]
    if (free := len(points) - _FEWEST) > 0:
        quantile = float(stdtrit(free, 0.5 + coverage / 2))
        found.append(quantile**2 * float(weights @ residuals**2) / free * inverse)
    return found


def _reach(seconds: Estimate, z: float) -> float:
    """The half-width of a time's interval at the wanted coverage; infinite where one side is not bounded."""
    from scipy.special import ndtri

    half = max(seconds.high - seconds.value, seconds.value - seconds.low)
    return half * z / float(ndtri(0.5 + seconds.coverage / 2))


def _half(beta: Array, covariances: Sequence[Array], method: str, coverage: float) -> Estimate:
    """Fieller: all h with (t₀ - h·t₁)² <= v₀₀ - 2h·v₀₁ + h²·v₁₁, the widest of the covariances' sets."""
    value = float(beta[0] / beta[1]) if beta[1] > 0 else math.nan
    if not beta[1] > 0:
        return Estimate(math.nan, -math.inf, math.inf, f"undefined: time does not grow with size; {method}", coverage)
    low, high = value, value
    for v in covariances:
        ends = fieller(float(beta[0]), float(beta[1]), float(v[0, 0]), float(v[0, 1]), float(v[1, 1]))
        if ends[1] == math.inf:
            return Estimate(value, *ends, f"unbounded: the slope may be zero; {method}", coverage)
        low, high = min(low, ends[0]), max(high, ends[1])
    return Estimate(value, low, high, method, coverage)


def _undefined(reason: str, coverage: float) -> StepTimeLaw:
    nothing = Estimate(math.nan, -math.inf, math.inf, reason, coverage)
    return StepTimeLaw(nothing, nothing, nothing)


def saturation(points: Sequence[MicroBatchTime], tolerance: float = TOLERANCE) -> int:
    """The smallest size with at least 1 - tolerance of the best examples per second."""
    best = max(point.examples / point.seconds.value for point in points)
    return min(p.examples for p in points if p.examples / p.seconds.value >= (1 - tolerance) * best)


def saturation_interval(points: Sequence[MicroBatchTime], tolerance: float = TOLERANCE) -> Estimate:
    """`saturation`, with the smallest size that may be it and the smallest that surely is, by the times' intervals.

    A size may be it if its fastest time gives 1 - tolerance of the best speed that is sure; it surely is if its
    slowest time gives 1 - tolerance of the best speed that may be. Infinite where no measured size surely is: the
    noise hides it. A sweep need not be monotone: the largest size may be slower than a smaller one.
    """
    rates = [
        (p.examples, p.examples / p.seconds.high, p.examples / p.seconds.low if p.seconds.low > 0 else math.inf)
        for p in points
    ]
    sure, may = max(low for _, low, _ in rates), max(high for _, _, high in rates)
    value = saturation(points, tolerance)
    first = min([size for size, _, high in rates if high >= (1 - tolerance) * sure] + [value])
    surely = min([size for size, low, _ in rates if low >= (1 - tolerance) * may], default=math.inf)
    method = f"{1 - tolerance:.0%} of the best of {len(points)} sizes"
    coverage = min(point.seconds.coverage for point in points)
    return Estimate(float(value), float(first), float(max(surely, value)), method, coverage)


def bottleneck(
    *, overhead: float, communication: float | None = None, loading: float = 0.0, memory: bool = False
) -> str:
    """What holds a step back, in a word: the first of these that applies, else "compute".

    "launch/overhead": the fixed time is over half of the step. "communication", "data": over 0.3 of it. "memory
    capacity": the next size does not fit, though speed was still growing. Shares are of the whole step, 0 to 1;
    None or NaN where one is not known.

    >>> bottleneck(overhead=0.1, loading=0.4), bottleneck(overhead=0.6, loading=0.4), bottleneck(overhead=0.1)
    ('data', 'launch/overhead', 'compute')
    """
    if overhead > OVERHEAD:
        return "launch/overhead"
    if communication is not None and communication > COMMUNICATION:
        return "communication"
    if loading > DATA:
        return "data"
    return "memory capacity" if memory else "compute"
