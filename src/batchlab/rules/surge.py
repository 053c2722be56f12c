"""The best learning rate of sign-like optimizers from gradient statistics (Li et al. 2024, arXiv 2405.14578).

Coordinate i has true gradient μ_i and per-example standard deviation σ_i, Gaussian and independent of the others; H is
the Hessian, positive semidefinite; the update is θ <- θ - ε·sign(mean gradient of B examples). `rules.learning_rate.
surge` is the law that needs only one tuned learning rate and a noise scale; here is where its constants come from.

Adam's ε, weight decay and clipping are outside the model, and real gradients are not independent between coordinates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError

Array = NDArray[np.float64]


class SurgeConstants(NamedTuple):
    """noise_scale: B_noise in examples, where the learning rate peaks. peak: ε_max, the learning rate there.

    With no cross terms in the Hessian there is no peak: the learning rate rises for ever, and both are infinite.
    """

    noise_scale: float
    peak: float


def sign_learning_rate(batch_size: float, mean: ArrayLike, std: ArrayLike, hessian: ArrayLike) -> float:
    """ε_opt(B) = Σ𝓔_iμ_i / [Σ(1 - 𝓔_i²)H_ii + ΣΣ𝓔_i𝓔_jH_ij], 𝓔_i = erf(√(B/2)·μ_i/σ_i): exact for sign updates."""
    from scipy.special import erf

    check_positive(batch_size=batch_size)
    mu, sigma, h = _checked(mean, std, hessian)
    expected = erf(math.sqrt(batch_size / 2) * mu / sigma)
    curvature = np.sum((1 - expected**2) * np.diag(h)) + expected @ h @ expected
    return float(expected @ mu / curvature)


def surge_constants(mean: ArrayLike, std: ArrayLike, hessian: ArrayLike) -> SurgeConstants:
    """B_noise = πT/(2Q), ε_max = M/(2√(TQ)); M = Σμ_i²/σ_i, T = ΣH_ii, Q = Σ_{i≠j} μ_iμ_jH_ij/(σ_iσ_j).

    Of the law for small batches, B far below πσ_i²/(2μ_i²). Q < 0 has no such law and is refused;
    `sign_learning_rate` still holds.
    """
    mu, sigma, h = _checked(mean, std, hessian)
    ratio = mu / sigma
    off_diagonal = h - np.diag(np.diag(h))
    cross, trace, drop = float(ratio @ off_diagonal @ ratio), float(np.trace(h)), float(np.sum(mu**2 / sigma))
    if cross < 0:
        raise InputError(f"hessian must have cross terms with sum over mu_i*mu_j*H_ij/(s_i*s_j) >= 0, got {cross!r}")
    if cross == 0:
        return SurgeConstants(math.inf, math.inf)
    return SurgeConstants(math.pi * trace / (2 * cross), drop / (2 * math.sqrt(trace * cross)))


def large_batch_learning_rate(mean: ArrayLike, hessian: ArrayLike) -> float:
    """Σ|μ_i| / ΣΣ sign(μ_i)·sign(μ_j)·H_ij: the constant that ε_opt tends to for B -> ∞. All μ_i must differ from 0."""
    mu, _, h = _checked(mean, np.ones_like(np.asarray(mean, dtype=np.float64)), hessian)
    if not np.all(mu != 0):
        raise InputError("mean must be non-zero in every coordinate for the large-batch limit")
    return float(np.abs(mu).sum() / (np.sign(mu) @ h @ np.sign(mu)))


def _checked(mean: ArrayLike, std: ArrayLike, hessian: ArrayLike) -> tuple[Array, Array, Array]:
    mu, sigma, h = (np.asarray(given, dtype=np.float64) for given in (mean, std, hessian))
    if mu.ndim != 1 or sigma.shape != mu.shape or h.shape != (mu.size, mu.size):
        raise InputError(
            f"mean and std must be vectors of one length n and hessian n x n, got {mu.shape}, {sigma.shape}, {h.shape}"
        )
    if not np.all(np.isfinite(mu)):
        raise InputError("mean must be finite in every coordinate")
    if not np.all((sigma > 0) & np.isfinite(sigma)):
        raise InputError("std must be finite and > 0 in every coordinate")
    if not np.allclose(h, h.T):  # NaN fails too
        raise InputError("hessian must be symmetric and finite")
    return mu, sigma, h
