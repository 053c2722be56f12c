"""Forms of a law over model sizes N and replicas M, held against each other at the largest size (Charles et al. 2025).

Each is fitted to all sizes but the largest by least Huber loss of ln y, by L-BFGS from random starts, as in arXiv
2503.09799, and judged by the mean |ln(measured/predicted)| at the largest. The source keeps the start that is best
there, which has seen what it is judged by; `blind`, of the start that fits the smaller sizes best, has not. The source
does not state its δ: 10⁻³ is the usual one.

Its errors, 0.0044, 0.0035, 0.0025 and 0.0043 from "power" to "sum" below, do not come back from the losses it prints:
least Huber loss gives 0.0112, 0.0046, 0.0073 and 0.0054. With L-BFGS at its usual stopping rule 256 starts end in many
places of a flat valley, and the best of them at the largest size are at 0.0026 to 0.0029, whatever the form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.rules.fit.huber import least_huber, sum_of_powers
from batchlab.rules.fit.power_laws import Values, checked

Array = NDArray[np.float64]
STARTS = 32
DELTA = 1e-3
FEWEST_SIZES = 4
_PREFACTORS = ("A", "B", "C")


@dataclass(frozen=True)
class ParametricLaw(JsonNoun):
    """One form and its constants, by the letters of its formula; N is a plain count, and with βM beside α it must be.

    held_out: the mean |ln(measured/predicted)| at the largest size, which the start was chosen by. blind: the same of
    the start that fits the smaller sizes best. starts: how many were tried.
    """

    form: str
    formula: str
    constants: Mapping[str, float]
    held_out: float
    blind: float
    starts: int

    def value(self, *, params: float, replicas: float) -> float:
        """y by the form."""
        check_positive(params=params, replicas=replicas)
        terms = FORMS[self.form].terms(np.array([math.log(params)]), np.array([float(replicas)]))
        searched = [math.log(c) if name in _PREFACTORS else c for name, c in self.constants.items()]
        return float(np.exp(terms @ np.array(searched)).sum())


@dataclass(frozen=True)
class Form:
    """names: the constants. terms: design matrices (t x n x k) at ln N and M. formula: for the reader."""

    names: tuple[str, ...]
    formula: str
    terms: Callable[[Array, Array], Array]


def _stack(n: Array, *terms: list[Array | float]) -> Array:
    columns = [[np.broadcast_to(np.asarray(each, dtype=np.float64), n.shape) for each in term] for term in terms]
    return np.stack([np.stack(term, 1) for term in columns])


FORMS: Mapping[str, Form] = {
    "power": Form(("A", "alpha", "beta"), "A·N^α·M^β", lambda n, m: _stack(n, [1, n, np.log(m)])),
    "power_floor": Form(
        ("A", "alpha", "beta", "C"), "A·N^α·M^β + C", lambda n, m: _stack(n, [1, n, np.log(m), 0], [0, 0, 0, 1])
    ),
    "tilted": Form(
        ("A", "alpha", "beta", "C"), "A·N^(α + βM) + C", lambda n, m: _stack(n, [1, n, n * m, 0], [0, 0, 0, 1])
    ),
    "sum": Form(
        ("A", "alpha", "B", "beta", "C"),
        "A·N^α + B·M^β + C",
        lambda n, m: _stack(n, [1, n, 0, 0, 0], [0, 0, 1, np.log(m), 0], [0, 0, 0, 0, 1]),
    ),
}


def parametric_laws(
    params: Values,
    replicas: Values,
    y: Values,
    *,
    delta: float = DELTA,
    starts: int = STARTS,
    seed: int = 0,
    y_name: str = "y",
) -> tuple[ParametricLaw, ...]:
    """All four forms, the least held-out error first, from one (N, M, y) a point.

    params: N, at least four sizes; the largest is held out. replicas: M. starts: random ones, drawn by `seed`:
    exponents of N in [-1, 0], of M in ±0.2, and the share of y that each term has; 32 by default, 256 in the source.
    Constants A, B and C come out > 0.
    """
    check_positive(delta=delta)
    check_count(starts=starts)
    check_count(0, seed=seed)
    sizes, values = map(np.array, checked(params, y, "params", y_name))
    counts = np.array(checked(params, replicas, "params", "replicas")[1])
    if len(np.unique(sizes)) < FEWEST_SIZES:
        raise InputError(f"params must hold at least {FEWEST_SIZES} sizes, got {len(np.unique(sizes))}")
    if len(np.unique(counts[sizes < sizes.max()])) < 2:
        raise InputError("replicas must hold at least two different values below the largest size")
    found = [
        _fit(name, _Points(np.log(sizes), counts, np.log(values)), delta, np.random.default_rng([seed, place]), starts)
        for place, name in enumerate(FORMS)
    ]
    return tuple(sorted(found, key=lambda law: law.held_out))


@dataclass(frozen=True)
class _Points:
    n: Array
    m: Array
    log_y: Array


def _fit(name: str, points: _Points, delta: float, generator: np.random.Generator, starts: int) -> ParametricLaw:
    form, left = FORMS[name], points.n == points.n.max()
    terms, log_y = form.terms(points.n, points.m), points.log_y
    model = sum_of_powers(terms[:, ~left], log_y[~left])
    ends = [constants for _, constants in least_huber(model, _starts(name, points, generator, starts), delta)]
    errors = [_error(terms[:, left], log_y[left], constants) for constants in ends]
    best = int(np.argmin(errors))
    constants = {
        each: float(math.exp(value) if each in _PREFACTORS else value)
        for each, value in zip(form.names, ends[best], strict=True)
    }
    return ParametricLaw(name, form.formula, constants, errors[best], errors[0], starts)


def _starts(form: str, points: _Points, generator: np.random.Generator, starts: int) -> list[Array]:
    """Random constants at which the terms add to about the mean y at the mean size."""
    found, n, level = [], float(points.n.mean()), float(points.log_y.mean())
    scale = n * float(points.m.max()) if form == "tilted" else 1.0
    for _ in range(starts):
        shares = dict(zip(_PREFACTORS, np.maximum(generator.dirichlet(np.ones(3)), 1e-3), strict=True))
        drawn = {"alpha": generator.uniform(-1.0, 0.0), "beta": generator.uniform(-0.2, 0.2) / scale}
        drawn |= {name: level + math.log(share) for name, share in shares.items()}
        drawn["A"] -= drawn["alpha"] * n
        found.append(np.array([drawn[name] for name in FORMS[form].names]))
    return found


def _error(terms: Array, log_y: Array, constants: Array) -> float:
    with np.errstate(all="ignore"):
        residuals, _ = sum_of_powers(terms, log_y)(constants)
    return float(np.abs(residuals).mean()) if np.isfinite(residuals).all() else math.inf
