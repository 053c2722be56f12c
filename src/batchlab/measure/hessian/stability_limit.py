"""The largest stable learning rate against batch size, by the spike law of batch Hessians (Granziol et al. 2022).

The Hessian of b of N examples is H + ε_b. If ε_b is a symmetric random matrix whose entries have variance σ²/𝔟, with
𝔟 = b/(1 - b/N) for draws without replacement, then with κ² = P·σ² an outlier λ of H shows in the batch's spectrum at

  λ'(𝔟) = λ + κ²/(𝔟λ)   where λ > κ/√𝔟,   else at the edge of the noise, 2κ/√𝔟.

Gradient descent that repeats one batch is stable below 2(1 + μ)/λ', μ its heavy-ball momentum. SGD draws a new batch
each step: along a direction whose curvature has mean λ and variance v its mean square shrinks if

  α < 2(1 + μ)/(λ + (1 + μ)/(1 - μ)·v/λ),

which for μ = 0 is 2/λ' with v = κ²/𝔟. So this is the ceiling here, with that v: linear in 𝔟 for small batches,
2(1 + μ)/λ for large ones, the knee at 𝔟 = κ²/λ²·(1 + μ)/(1 - μ). The 2(1 + μ)/λ' of the source, which leaves the
noise's momentum out, is ten times too high for μ = 0.9 and b = 8 on a small network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_inside
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.curves.spike_law import check_momentum, mean_square_edge
from batchlab.curves.spike_law import effective_batch as effective_batch
from batchlab.curves.spike_law import spike_edge as spike_edge
from batchlab.curves.spike_law import stable_rate as stable_rate

FEWEST_POINTS = 3
_FINEST = 1e-4  # of a mean: no edge is taken as known better than this

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SpikeFit(JsonNoun):
    """The spike law fitted to measured edges. All eigenvalues are of a mean loss.

    eigenvalue: λ₁ of the full Hessian. kappa_sq: κ², in λ²·examples. examples: N.
    variances: of λ₁ and κ, and their covariance, scaled up by the misfit where the law fits worse than the scatter of
    the edges. free: points less the two numbers. misfit: the root mean square error in units of that scatter.
    """

    eigenvalue: Estimate
    kappa_sq: Estimate
    examples: int
    variances: tuple[float, float, float]
    free: int
    misfit: float

    def edge(self, batch_size: float) -> Estimate:
        """λ'₁(b) by the law."""
        effective = effective_batch(batch_size, self.examples)
        value = spike_edge(self.eigenvalue.value, self.kappa_sq.value, effective)
        slopes = _slopes(self.eigenvalue.value, math.sqrt(self.kappa_sq.value), np.array([1 / effective]))[0]
        factor = self._factor(slopes, value)
        return Estimate(value, value / factor, value * factor, "spike law", self._coverage)

    def max_learning_rate(self, batch_size: float, momentum: float = 0.0) -> Estimate:
        """`rate_ceiling` at b, for SGD with heavy-ball momentum μ and no dampening."""
        effective = effective_batch(batch_size, self.examples)
        lam, kappa = self.eigenvalue.value, math.sqrt(self.kappa_sq.value)
        value = rate_ceiling(lam, kappa**2, effective, momentum)
        noise = (1 + momentum) / (1 - momentum) / (effective * lam)
        slopes = np.array([1 - noise * kappa**2 / lam, 2 * noise * kappa])
        factor = self._factor(slopes, 2 * (1 + momentum) / value)
        return Estimate(value, value / factor, value * factor, f"spike law, momentum {momentum:g}", self._coverage)

    def knee(self, momentum: float = 0.0) -> Estimate:
        """The batch size, in examples, at which noise halves the ceiling: 𝔟 = κ²/λ₁²·(1 + μ)/(1 - μ), as b <= N."""
        check_momentum(momentum)
        k, lam, more = self.kappa_sq, self.eigenvalue, (1 + momentum) / (1 - momentum)
        knees = [k.value / lam.value**2, k.low / lam.high**2, k.high / lam.low**2 if lam.low else math.inf]
        value, low, high = (1 / (1 / (more * knee) + 1 / self.examples) if knee else 0.0 for knee in knees)
        return Estimate(value, low, high, "κ²/λ₁² of the spike law", self._coverage)

    @property
    def _coverage(self) -> float:
        return self.kappa_sq.coverage

    def _factor(self, slopes: Array, value: float) -> float:
        """By which `value`, with these slopes in λ₁ and κ, may be off: the delta method on its logarithm."""
        (a, b, c), (x, y) = self.variances, (float(slope) for slope in slopes)
        spread = math.sqrt(max(0.0, x**2 * a + y**2 * b + 2 * x * y * c))
        return math.exp(min(_student(self.free, self._coverage) * spread / value, 700.0))


def rate_ceiling(eigenvalue: float, kappa_sq: float, effective: float, momentum: float = 0.0) -> float:
    """2(1 + μ)/(λ₁ + (1 + μ)/(1 - μ)·κ²/(𝔟λ₁)), the learning rate above which SGD grows along λ₁ in mean square.

    >>> rate_ceiling(2.0, 8.0, 4.0), rate_ceiling(2.0, 8.0, math.inf, 0.5)
    (0.6666666666666666, 1.5)
    """
    return stable_rate(mean_square_edge(eigenvalue, kappa_sq, effective, momentum), momentum)


def fit_spike(
    batch_sizes: Sequence[float],
    edges: Sequence[float],
    variances: Sequence[float],
    examples: int,
    *,
    coverage: float = 0.95,
) -> SpikeFit:
    """Fits λ₁ and κ² to mean largest eigenvalues `edges` of batch Hessians, by least squares with weights 1/variance.

    variances: of the means; none is taken as smaller than (1e-4 of its mean)². A batch size equal to `examples` is the
    full Hessian. The intervals are Student's with points less 2 degrees of freedom, widened where the law misfits.

    The law takes the noise as alike in all directions. Real noise has few directions, those of the large eigenvalues:
    κ² fitted here is what moves λ₁, and is two orders of magnitude above what the noise's norm says.

    >>> sizes, law = [4, 16, 64, 1000], [spike_edge(2.0, 30.0, effective_batch(b, 1000)) for b in (4, 16, 64, 1000)]
    >>> fit = fit_spike(sizes, law, [0.01] * 4, 1000)
    >>> round(fit.eigenvalue.value, 6), round(fit.kappa_sq.value, 6)
    (2.0, 30.0)
    """
    from scipy.optimize import least_squares

    inverse, y, weight = _checked(batch_sizes, edges, variances, examples)
    check_inside(coverage=coverage)
    starts = [(scale * y.min(), k) for scale in (1.0, 0.5) for k in _kappas(inverse, y)]
    scale = np.array([y.min(), max(_kappas(inverse, y)) or y.min()])

    def errors(x: Array) -> Array:
        gap: Array = weight * (_law(x[0] * scale[0], x[1] * scale[1], inverse) - y)
        return gap

    def jacobian(x: Array) -> Array:
        slopes: Array = weight[:, None] * _slopes(x[0] * scale[0], x[1] * scale[1], inverse) * scale
        return slopes

    settings = {"jac": jacobian, "bounds": ([1e-9, 0.0], np.inf), "xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15}
    fits = [least_squares(errors, np.maximum(np.array(start) / scale, 1e-6), **settings) for start in starts]
    best = min(fits, key=lambda fit: float(fit.cost))
    eigenvalue, kappa = (float(part) for part in best.x * scale)
    free = len(y) - 2
    misfit = math.sqrt(2 * float(best.cost) / free)
    J = weight[:, None] * _slopes(eigenvalue, kappa, inverse)
    covariance = np.linalg.pinv(J.T @ J) * max(1.0, misfit**2)
    entries = (float(covariance[0, 0]), float(covariance[1, 1]), float(covariance[0, 1]))
    half = [_student(free, coverage) * math.sqrt(entry) for entry in entries[:2]]
    method = f"spike law, {len(y)} batch sizes"
    lam = Estimate(eigenvalue, max(0.0, eigenvalue - half[0]), eigenvalue + half[0], method, coverage)
    bounds = max(0.0, kappa - half[1]) ** 2, (kappa + half[1]) ** 2
    return SpikeFit(lam, Estimate(kappa**2, *bounds, method, coverage), examples, entries, free, misfit)


def _checked(
    batch_sizes: Sequence[float], edges: Sequence[float], variances: Sequence[float], examples: int
) -> tuple[Array, Array, Array]:
    """1/𝔟, the edges, and 1/deviation."""
    if not len(batch_sizes) == len(edges) == len(variances):
        raise InputError(
            "batch_sizes, edges and variances must be of one length, got "
            f"{len(batch_sizes)}, {len(edges)} and {len(variances)}"
        )
    if len(set(batch_sizes)) < FEWEST_POINTS:
        raise InputError(f"batch_sizes must hold at least {FEWEST_POINTS} different sizes, got {list(batch_sizes)!r}")
    inverse = np.array([1 / effective_batch(b, examples) for b in batch_sizes])
    y, v = np.array(edges, dtype=np.float64), np.array(variances, dtype=np.float64)
    if not (np.isfinite(y).all() and (y > 0).all()):
        raise InputError(f"edges must be finite and > 0, got {list(edges)!r}")
    if not (np.isfinite(v).all() and (v >= 0).all()):
        raise InputError(f"variances must be finite and >= 0, got {list(variances)!r}")
    return inverse, y, 1 / np.sqrt(np.maximum(v, (_FINEST * y) ** 2))


def _law(eigenvalue: float, kappa: float, inverse: Array) -> Array:
    noise = kappa**2 * inverse
    edges: Array = np.where(eigenvalue**2 > noise, eigenvalue + noise / eigenvalue, 2 * np.sqrt(noise))
    return edges


def _slopes(eigenvalue: float, kappa: float, inverse: Array) -> Array:
    """∂λ'/∂λ and ∂λ'/∂κ, (points, 2). Both pass continuously from one branch to the other."""
    noise, seen = kappa**2 * inverse, eigenvalue**2 > kappa**2 * inverse
    by_kappa = np.where(seen, 2 * kappa * inverse / eigenvalue, 2 * np.sqrt(inverse))
    return np.stack([np.where(seen, 1 - noise / eigenvalue**2, 0.0), by_kappa], axis=-1)


def _kappas(inverse: Array, y: Array) -> list[float]:
    """κ by which each point alone would follow from the least edge: where to start the fit."""
    noisy = inverse > 0
    excess = np.maximum(y - y.min(), 1e-3 * y)[noisy]
    return sorted({float(k) for k in np.sqrt(excess * y.min() / inverse[noisy])})


def _student(free: int, coverage: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(free, 0.5 + coverage / 2))
