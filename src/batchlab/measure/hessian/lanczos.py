"""The spectrum of a symmetric operator from products with it: Lanczos extremes, trace, spectral density.

After m steps A·Q = Q·T + β_m·q_{m+1}·e_mᵀ with orthonormal q_1..q_m and T tridiagonal (α on the diagonal, β beside
it): for T·s = θ·s the pair (θ, Q·s) is A's up to a residual of β_m·|s_m|. Every new vector is orthogonalised against
all before it, twice: without that Lanczos finds copies of eigenvalues that A has once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun

_EXHAUSTED = 1e-10
_ASYMMETRY = 1e-2
CONVERGED = 1e-3  # of the largest |θ|


@dataclass(frozen=True)
class Eigenvalue(JsonNoun):
    """value: θ. residual: |Aq - θq| for its unit vector q: some eigenvalue of A lies so near, at most.

    converged: whether that is at most a thousandth of A's largest |θ|.
    """

    value: float
    residual: float
    converged: bool


@dataclass(frozen=True)
class Density(JsonNoun):
    """The spectral density p(λ) on a grid, with area 1. Empty where the spectrum is a single value."""

    grid: tuple[float, ...]
    values: tuple[float, ...]


class Krylov(NamedTuple):
    """What a Lanczos run leaves: eigenvalues (ascending) and eigenvectors of T, float64 on the CPU; Q's rows q_i; β_m.

    values (m,), vectors (m, m), basis (m, P).
    """

    values: Tensor
    vectors: Tensor
    basis: Tensor
    beta: float

    @property
    def trace(self) -> float:
        """tr(QᵀAQ) = tr(T)."""
        return float(self.values.sum())

    def residual(self, i: int) -> float:
        """β_m·|s_m|: |Aq - θq| of the i-th pair, up to rounding."""
        return self.beta * abs(float(self.vectors[-1, i]))

    def first_product(self) -> Tensor:
        """A·q_1, out of Q and T: the run must have two steps at least, or have exhausted the space."""
        inside: Tensor = self.vectors @ (self.values * self.vectors[0])
        return self.basis.T @ inside.to(self.basis)

    @property
    def scale(self) -> float:
        """The largest |θ|."""
        return float(self.values.abs().max())


def lanczos(operator: Any, steps: int, generator: torch.Generator, start: Tensor | None = None) -> Krylov:
    """At most `steps` steps, one product with `operator` each; P of them end the space.

    operator: `operator @ vector`, (P,) -> (P,), with `shape`, `device` and `dtype`. start: by default Gaussian. Where
    the space is exhausted (β below 1e-10 of the largest entry, or what the dtype resolves), a fresh vector orthogonal
    to it goes on with β = 0, so that repeated eigenvalues show as often as they fit. Memory: `steps` vectors of P.

    Raises `InputError` where a product is not finite, or where the operator is seen not to be symmetric.
    """
    size, m = operator.shape[0], min(steps, operator.shape[0])
    basis = torch.zeros(m, size, dtype=operator.dtype, device=operator.device)
    basis[0] = _unit(operator, basis[:0], generator) if start is None else start / torch.linalg.vector_norm(start)
    T = torch.zeros(m, m, dtype=torch.float64, device="cpu")
    floor = max(_EXHAUSTED, 10 * torch.finfo(operator.dtype).eps)
    for k in range(m):
        w = operator @ basis[k]
        seen = basis[: k + 1] @ w
        row = seen.to("cpu", torch.float64)
        _check(row, T, k)
        T[k, k] = row[k]
        for _ in range(2):
            w = w - basis[: k + 1].T @ seen
            seen = basis[: k + 1] @ w
        beta = _norm(w)
        if k + 1 == m:
            break
        if beta <= floor * max(float(T.abs().max()), beta):
            basis[k + 1] = _unit(operator, basis[: k + 1], generator)
        else:
            basis[k + 1] = w / beta
            T[k, k + 1] = T[k + 1, k] = beta
    values, vectors = torch.linalg.eigh(T)
    return Krylov(values, vectors, basis, beta if m < size else 0.0)


def extremes(operator: Any, run: Krylov, top: int) -> tuple[tuple[Eigenvalue, ...], tuple[Eigenvalue, ...]]:
    """The `top` largest eigenvalues, largest first, and the `top` smallest, most negative first, with residuals.

    One product each, so that the residual is what it says in the operator's own precision. A Ritz value never lies
    above the largest eigenvalue nor below the smallest one.
    """
    m = len(run.values)
    pairs = [_eigenvalue(operator, run, i) for i in [*range(m)[::-1][:top], *range(m)[:top]]]
    half = min(top, m)
    return tuple(pairs[:half]), tuple(pairs[half:])


def _eigenvalue(operator: Any, run: Krylov, i: int) -> Eigenvalue:
    s = run.vectors[:, i].to(run.basis)
    q = run.basis.T @ s
    q = q / torch.linalg.vector_norm(q)
    theta = float(run.values[i])
    residual = float(torch.linalg.vector_norm(operator @ q - theta * q))
    return Eigenvalue(theta, residual, residual <= CONVERGED * run.scale)


def trace(operator: Any, run: Krylov, probes: int, generator: torch.Generator, coverage: float) -> Estimate:
    """tr(A) = tr(QᵀAQ) + tr(PAP), P = I - QQᵀ: the first exactly from the run, the second from `probes` products.

    Hutchinson (1989): E vᵀPAPv = tr(PAP) for entries ±1 of v. As in Hutch++ (Meyer et al. 2021) the large eigenvalues,
    which make that estimate vary, are in the exact part; here the run's Krylov space takes the sketch's place, at no
    cost. The interval is Student's, of the probes.
    """
    rest = operator.shape[0] - len(run.values)
    if not rest:
        return Estimate(run.trace, run.trace, run.trace, "exact: the whole spectrum", coverage)
    samples: list[float] = []
    for _ in range(probes):
        v = rademacher(operator, generator)
        v = v - run.basis.T @ (run.basis @ v)
        samples.append(float(torch.dot(v, operator @ v)))
    method = f"Hutchinson, {probes} probes beside {len(run.values)} exact directions"
    return mean_interval([run.trace + sample for sample in samples], coverage, method)


def density(runs: list[Krylov], points: int) -> Density:
    """Stochastic Lanczos quadrature: the mean over runs of Σ_i s_i1²·δ(λ - θ_i), each δ a Gaussian (Papyan 2020).

    The runs must have started from independent vectors with entries ±1. Width of the Gaussian and margin of the grid
    are curvlinops' defaults: it blurs by about a hundredth of the spectrum's width at 30 steps, finer with more. The
    share of single outliers is as uncertain as few probes make it.
    """
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum_from_iter

    low = min(float(run.values[0]) for run in runs)
    high = max(float(run.values[-1]) for run in runs)
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        return Density((), ())
    settings = {"num_points": points, "kappa": 3.0, "margin": 0.05}
    pairs = [lanczos_approximate_spectrum_from_iter((r.values, r.vectors), (low, high), **settings) for r in runs]
    values = torch.stack([values for _, values in pairs]).mean(0)
    return Density(tuple(pairs[0][0].tolist()), tuple(values.tolist()))


def rademacher(operator: Any, generator: torch.Generator) -> Tensor:
    """Independent entries ±1, drawn on the CPU so that all devices and ranks get the same."""
    signs = torch.randint(0, 2, (operator.shape[0],), generator=generator, device="cpu")
    return (2 * signs - 1).to(operator.device, operator.dtype)


def mean_interval(samples: list[float], coverage: float, method: str) -> Estimate:
    """Their mean with Student's interval; unbounded for a single one.

    >>> mean_interval([1.0, 2.0, 3.0], 0.95, "three")
    Estimate(2 [-0.4841, 4.484], 95 %, three)
    """
    from scipy.special import stdtrit

    n, mean = len(samples), math.fsum(samples) / len(samples)
    if n == 1:
        return Estimate(mean, -math.inf, math.inf, method, coverage)
    variance = math.fsum((sample - mean) ** 2 for sample in samples) / (n - 1)
    half = float(stdtrit(n - 1, 0.5 + coverage / 2)) * math.sqrt(variance / n)
    return Estimate(mean, mean - half, mean + half, method, coverage)


def _norm(w: Tensor) -> float:
    """|w|; the largest entry is taken out first, as the square of a small one is nothing in float32."""
    peak = float(w.abs().max())
    return peak * float(torch.linalg.vector_norm(w / peak)) if peak else 0.0


def _unit(operator: Any, basis: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to the rows of `basis`."""
    w = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64, device="cpu")
    w = w.to(operator.dtype).to(operator.device)
    for _ in range(2):
        w = w - basis.T @ (basis @ w)
        w = w / torch.linalg.vector_norm(w)
    return w


def _check(row: Tensor, T: Tensor, k: int) -> None:
    """row holds q_iᵀAq_k for i <= k: in exact arithmetic 0, .., 0, β, α."""
    if not row.isfinite().all():
        raise InputError("the Hessian at these weights is not finite: the loss or its derivatives overflow")
    if k and float((row[:k] - T[:k, k]).abs().max()) > _ASYMMETRY * max(float(T.abs().max()), float(row.abs().max())):
        raise InputError(
            "the products with the Hessian are not symmetric: the loss is not one fixed function, or an operation in "
            "it has a wrong second derivative"
        )
