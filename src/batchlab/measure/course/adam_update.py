"""The distribution of Adam's normalised update u = m̂/(√v̂ + ε), in closed form and from sums (arXiv 2304.09871).

m ← β1·m + (1 - β1)·g, v ← β2·v + (1 - β2)·g², m̂ = m/(1 - β1ᵗ), v̂ = v/(1 - β2ᵗ), θ ← θ - η·u. Decoupled weight decay
and the learning rate are not in u.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError


def adam_update(m: Tensor, v: Tensor, betas: tuple[float, float], eps: float, t: float) -> tuple[Tensor, Tensor]:
    """u and √v̂, from m and v after update t >= 1; 0 where there was never a gradient, whatever ε is."""
    root = (v / (1 - betas[1] ** t)).sqrt()
    u = m / (1 - betas[0] ** t) / (root + eps)
    return (u if eps > 0 else u.masked_fill((m == 0) & (v == 0), 0.0)), root


def white_variance(beta1: float) -> float:
    """var u = (1 - β1)/(1 + β1): gradients independent in time with mean zero, β2 near 1.

    >>> round(white_variance(0.9), 4)
    0.0526
    """
    _check_betas(beta1, 0.0)
    return (1 - beta1) / (1 + beta1)


def autocorrelated_variance(beta1: float, lag1: float) -> float:
    """var u = (1 - β1)/(1 + β1)·(1 + β1·r)/(1 - β1·r), r = lag1: gradients that are an AR(1) process, β2 near 1.

    For |r| well below β2: where the gradient keeps its sign longer than 1/(1 - β2) steps, v̂ follows it and var u stays
    near 1.

    >>> round(autocorrelated_variance(0.9, 0.5), 4)
    0.1388
    """
    if not -1 <= lag1 <= 1:
        raise InputError(f"lag1 must lie in [-1, 1], got {lag1!r}")
    return white_variance(beta1) * (1 + beta1 * lag1) / (1 - beta1 * lag1)


def expected_variance(batch_size: float, noise_scale: float, betas: tuple[float, float] = (0.9, 0.999)) -> float:
    """E u² at a batch size: r + (1 - r)(1 - β1)/(1 + β1) with r = B/(B + B_simple), the share of g² that stays.

    batch_size, noise_scale: B and B_simple = tr(Σ)/|G|² of the same parameters, both in examples. r is also the lag-1
    correlation of the gradient, ½ at B = B_simple. For a gradient whose mean G moves slowly against 1/(1 - β1) steps
    and whose noise is alike in all coordinates relative to G; where it is not, E u² lies below.

    >>> round(expected_variance(400, 400), 4), round(expected_variance(1, 400), 4)
    (0.5263, 0.055)
    """
    _check_betas(*betas)
    check_positive(batch_size=batch_size)
    if not noise_scale >= 0:
        raise InputError(f"noise_scale must be >= 0, got {noise_scale!r}")
    r = 1 / (1 + noise_scale / batch_size)
    return r + (1 - r) * white_variance(betas[0])


def update_bound(betas: tuple[float, float], t: float) -> float:
    """The largest |u_i| that any gradients can make at update t, by Cauchy and Schwarz; RMS(u) cannot exceed it.

    |m_t| <= (1 - β1)·√(Σ(β1²/β2)^k)·√(Σβ2^k·g²_{t-k}), k = 0..t-1, and both bias corrections. It is reached by
    gradients that grow by β2/β1 a step.

    >>> update_bound((0.9, 0.999), 1), round(update_bound((0.9, 0.999), 1e5), 2)
    (1.0, 7.27)
    """
    beta1, beta2 = betas
    _check_betas(beta1, beta2)
    if not t >= 1:
        raise InputError(f"t must be at least 1, got {t!r}")
    if beta2 == 0:
        return 1.0 if beta1 == 0 else math.inf
    rho = beta1**2 / beta2
    terms = t if rho == 1 else _power_sum(rho, t)
    return float((1 - beta1) / (1 - beta1**t) * math.sqrt((1 - beta2**t) / (1 - beta2) * terms))


def _power_sum(rho: float, t: float) -> float:
    """Σρ^k, k = 0..t-1; infinite where it is too large for a float."""
    exponent = t * math.log(rho) if rho > 0 else -math.inf
    return math.expm1(exponent) / (rho - 1) if exponent < 700 else math.inf


def _check_betas(beta1: float, beta2: float) -> None:
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise InputError(f"{name} must lie in [0, 1), got {beta!r}")


def update_density(
    u: Tensor, beta1: float, *, bins: int = 60, limit: float = 1.5
) -> tuple[list[float], list[float], list[tuple[float, float]]]:
    """A layer's updates as a histogram beside N(0, (1 - β1)/(1 + β1)): edges, densities, and points of the Gaussian.

    u: of any shape. limit: bins lie evenly in [-limit, limit]; what lies outside counts in the area, which is then
    below 1. For `batchlab.viz.stability.update_histogram`.
    """
    if bins < 1 or not 0 < limit < math.inf:
        raise InputError(f"bins must be at least 1 and limit finite and > 0, got {bins!r} and {limit!r}")
    flat, width, variance = u.detach().double().cpu().flatten(), 2 * limit / bins, white_variance(beta1)
    if not len(flat) or not bool(flat.isfinite().all()):
        raise InputError(f"u must be one or more finite numbers, got {len(flat)}")
    edges = [limit * (2 * i / bins - 1) for i in range(bins + 1)]
    density = (torch.histc(flat, bins, -limit, limit) / (len(flat) * width)).tolist()
    grid = [limit * (i / 100 - 1) for i in range(201)]
    peak = 1 / math.sqrt(2 * math.pi * variance)
    return edges, density, [(x, peak * math.exp(-(x**2) / (2 * variance))) for x in grid]


HIGH = 0.8
NO_SPREAD = 1e-6  # var u over mean u²: below it, the fourth moment is lost in rounding


class UpdateSums(NamedTuple):
    """Sums over coordinates, from which every statistic follows: those of parts are added, on one rank or over many.

    n: coordinates that have a gradient. u1..u4: Σu, Σu², Σu³, Σu⁴ over them. high: how many have |u| > 0.8.
    below: how many have √v̂ < ε. log_root: Σln(√v̂/ε) where v̂ > 0, and positive how many those are.
    ug, gg: Σu·g, Σg². gp, pp: Σg·p, Σp² with p the gradient one step before.
    """

    n: float = 0.0
    u1: float = 0.0
    u2: float = 0.0
    u3: float = 0.0
    u4: float = 0.0
    high: float = 0.0
    below: float = 0.0
    log_root: float = 0.0
    positive: float = 0.0
    ug: float = 0.0
    gg: float = 0.0
    gp: float = 0.0
    pp: float = 0.0

    def plus(self, other: Sequence[float]) -> UpdateSums:
        """The sums over both parts."""
        return UpdateSums(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def variance(self) -> float:
        """Of u over coordinates, around its mean."""
        if not self.n:
            return math.nan
        mean = self.u1 / self.n
        return max(0.0, self.u2 / self.n - mean**2)

    @property
    def kurtosis(self) -> float:
        """Fourth central moment over the squared variance: 3 for a Gaussian, 1 for two points; NaN without spread."""
        if not self.variance > NO_SPREAD * self.rms**2:
            return math.nan
        mean = self.u1 / self.n
        fourth = (self.u4 - 4 * mean * self.u3 + 6 * mean**2 * self.u2) / self.n - 3 * mean**4
        return fourth / self.variance**2

    @property
    def skewness(self) -> float:
        """Third central moment over the variance to the power 3/2; NaN without spread."""
        if not self.variance > NO_SPREAD * self.rms**2:
            return math.nan
        mean = self.u1 / self.n
        third = self.u3 / self.n - 3 * mean * self.u2 / self.n + 2 * mean**3
        return float(third / self.variance**1.5)

    @property
    def sarle(self) -> float:
        """Sarle's coefficient (skewness² + 1)/kurtosis: 1/3 Gaussian, 5/9 uniform, 1 for two points and only there.

        Two points need not be alike: a few coordinates far from all others come near 1 as well.
        """
        kurtosis = self.kurtosis
        return (self.skewness**2 + 1) / kurtosis if kurtosis > 0 else math.nan

    @property
    def rms(self) -> float:
        """√mean(u²)."""
        return math.sqrt(self.u2 / self.n) if self.n and self.u2 >= 0 else math.nan

    @property
    def cosine(self) -> float:
        """Of u with g."""
        return _correlation(self.ug, self.u2, self.gg)

    @property
    def lag1(self) -> float:
        """Σg·p/√(Σg²·Σp²) of two successive steps, around zero."""
        return _correlation(self.gp, self.gg, self.pp)


def _correlation(product: float, square: float, other: float) -> float:
    if not (math.isfinite(product) and 0 < square < math.inf and 0 < other < math.inf):
        return math.nan
    return product / (math.sqrt(square) * math.sqrt(other))


@torch.no_grad()
def update_sums(
    u: Tensor, root: Tensor, g: Tensor, p: Tensor, active: Tensor, eps: float, lengths: Sequence[int]
) -> Tensor:
    """`UpdateSums` of each of several tensors that lie one after another, a row each, summed in float64.

    u, root, g, p: flat, u being 0 elsewhere than at active: where there is a gradient. lengths: of the tensors.
    """
    wide = torch.float32 if u.device.type == "mps" else torch.float64
    seen = active & (root > 0)
    logs = torch.where(seen, root / eps if eps > 0 else torch.inf, 1.0).log()
    marks = [active, u.abs() > HIGH, active & (root < eps), seen]
    u, g, p = (each.to(wide) for each in (u, g, p))
    square = u * u
    pairs = [(u, u), (square, u), (square, square), (u, g), (g, g), (g, p), (p, p)]
    if len(lengths) == 1:  # a dot product reads its factors once; a table of small tensors saves calls
        counts, sums = [torch.count_nonzero(mark).to(wide) for mark in marks], [torch.dot(a, b) for a, b in pairs]
        n, high, below, positive, u1, log_root = [*counts, u.sum(), logs.sum(dtype=wide)]
        u2, u3, u4, ug, gg, gp, pp = sums
        return torch.stack([n, u1, u2, u3, u4, high, below, log_root, positive, ug, gg, gp, pp])[None]
    n, high, below, positive = marks
    u2, u3, u4, ug, gg, gp, pp = (a * b for a, b in pairs)
    columns = [n, u, u2, u3, u4, high, below, logs, positive, ug, gg, gp, pp]
    table = torch.stack([column.to(wide) for column in columns])
    return torch.stack([part.sum(1) for part in torch.split(table, list(lengths), dim=1)])
