"""Least Huber loss of residuals in logarithms, by L-BFGS from several starts: the usual way to fit a law of losses.

h(r) = ½r² up to |r| = δ, and δ(|r| - ½δ) beyond: a run that is off by more than δ counts by its distance, not by the
square of it.

Such laws have long narrow valleys: the constants of A/N^α move together. With its usual stopping rule, and residuals
averaged, L-BFGS ends in the valley near where it began (Besiroglu et al. 2024, arXiv 2404.10102). So residuals are
summed and counted in δ, and constants in units in which the valley is round: those of the residuals' Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Residuals = Callable[[Array], tuple[Array, Array]]
_RIDGE = 1e-9
_NOWHERE = 1e300


def huber(residuals: Array, delta: float) -> float:
    """Σh(r)."""
    size = np.abs(residuals)
    return float(np.where(size <= delta, 0.5 * residuals**2, delta * (size - 0.5 * delta)).sum())


def sum_of_powers(terms: Array, log_y: Array) -> Residuals:
    """Residuals ln f - ln y of f = Σ_t exp(terms_t @ constants), a sum of powers of whatever the terms hold logs of.

    terms: one design matrix a power (t x n x k). All powers are positive.
    """

    def model(constants: Array) -> tuple[Array, Array]:
        parts = terms @ constants
        top = parts.max(0)
        shares = np.exp(parts - top)
        total = shares.sum(0)
        jacobian: Array = np.einsum("tn,tnk->nk", shares / total, terms)
        return top + np.log(total) - log_y, jacobian

    return model


def least_huber(model: Residuals, starts: Sequence[Array], delta: float) -> list[tuple[float, Array]]:
    """(Σh, constants) from each start, ascending; of several the best is searched once more from where it ended.

    model: residuals (n) and their Jacobian (n x k) at constants (k).
    """
    found = sorted((_search(model, start, delta) for start in starts), key=lambda each: each[0])
    if len(found) == 1:
        return found
    return [min(found[0], _search(model, found[0][1], delta), key=lambda each: each[0]), *found[1:]]


def _search(model: Residuals, start: Array, delta: float) -> tuple[float, Array]:
    from scipy.optimize import minimize

    origin = np.asarray(start, dtype=np.float64)
    unit = _units(model, origin)

    def objective(z: Array) -> tuple[float, Array]:
        with np.errstate(all="ignore"):
            residuals, jacobian = model(origin + unit @ z)
            value = huber(residuals, delta) / delta**2
            slope = (np.clip(residuals, -delta, delta) @ jacobian) @ unit / delta**2
        return (value, slope) if np.isfinite(value) and np.isfinite(slope).all() else (_NOWHERE, np.zeros_like(z))

    options = {"maxiter": 2000, "maxfun": 5000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20}
    done = minimize(objective, np.zeros_like(origin), jac=True, method="L-BFGS-B", options=options)
    return float(done.fun) * delta**2, origin + unit @ np.asarray(done.x, dtype=np.float64)


def _units(model: Residuals, origin: Array) -> Array:
    """R⁻¹ of the Jacobian's QR: along its columns residuals change by as much, each in its own way."""
    with np.errstate(all="ignore"):
        _, jacobian = model(origin)
    identity = np.eye(len(origin))
    if not np.isfinite(jacobian).all():
        return identity
    scale = np.linalg.norm(jacobian, axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    r = np.linalg.qr(np.vstack([jacobian / scale, _RIDGE * identity]), mode="r")
    unit: Array = np.linalg.solve(r, identity) / scale[:, None]
    return unit
