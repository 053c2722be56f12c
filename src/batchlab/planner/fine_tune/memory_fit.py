"""The memory law from peaks at several batches, or from the largest batches that fit; see `BatchMemoryModel`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from batchlab.core.checks import check_inside, check_not_negative, check_share
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.planner.fine_tune.least_squares import Array, LeastSquares, full_rank, least_squares
from batchlab.planner.fine_tune.measured_batch import MeasuredBatch
from batchlab.planner.fine_tune.memory_model import BatchMemoryModel, given

METHOD = "least squares on ln B"
_LARGEST = 700.0  # e^709 is the largest float


def known_share(points: Sequence[MeasuredBatch], sparse_share: float | None) -> float | None:
    """C1 if it need not be fitted: as given, or 0 where no point has a sparsity."""
    if sparse_share is not None:
        check_share(sparse_share=sparse_share)
        return float(sparse_share)
    return 0.0 if all(point.sparsity is None for point in points) else None


def check_points(points: Sequence[MeasuredBatch], model_bytes: float | None, share: float | None) -> None:
    """Refuses points that cannot tell the unknowns apart, by the name of the first that they cannot tell."""
    if not points or any(point.peak_bytes is None for point in points):
        raise InputError(f"points must be one or more, each with peak_bytes, got {len(points)}")
    if model_bytes is not None:
        check_not_negative(model_bytes=model_bytes)
        if model_bytes >= min(point.peak_bytes or 0.0 for point in points):
            raise InputError(f"model_bytes must be less than every point's peak_bytes, got {model_bytes!r}")
    if share is None and len({point.active for point in points}) < 2:
        raise InputError(
            f"C1 is not identified: all points have the sparsity {points[0].active:g}; measure a second one, or give "
            "sparse_share (0 to predict at this sparsity only)"
        )
    if model_bytes is None and len({point.peak_bytes for point in points}) < 2:
        raise InputError(
            f"M_model is not identified: all points have one memory, {points[0].peak_bytes:g} bytes; measure a second "
            "one, or give model_bytes"
        )


def fit_bytes(
    points: Sequence[MeasuredBatch], model_bytes: float | None, sparse_share: float | None, coverage: float
) -> BatchMemoryModel:
    """See `BatchMemoryModel.fit`."""
    check_inside(coverage=coverage)
    share = known_share(points, sparse_share)
    check_points(points, model_bytes, share)
    tokens, active, peak = _columns(points)
    grown = [tokens, tokens * active] if share is None else [tokens * (1 - share * (1 - active))]
    fitted = [np.ones_like(tokens)] if model_bytes is None else []
    design = np.stack([*fitted, *grown], 1)
    if len(points) < design.shape[1] or not full_rank(design):
        raise InputError(
            f"M_model, C0 and C1 are not identified by these {len(points)} points: vary batch x length"
            + (" at each sparsity" if share is None else "")
        )
    fit = least_squares(design, peak - (model_bytes or 0.0), coverage=coverage)
    base = [0.0] * len(fitted)
    whole = fit.estimate([*base, *([1.0] * len(grown))])
    if not whole.value > 0:
        raise InputError(f"peak_bytes must grow with batch x length, got {whole.value:.3g} bytes a token")
    predicted = design @ fit.values + (model_bytes or 0.0)
    return BatchMemoryModel(
        bytes_per_token=whole,
        sparse_share=fit.ratio([*base, 0.0, 1.0], [*base, 1.0, 1.0]) if share is None else given(share),
        model_bytes=fit.estimate([1.0] + [0.0] * len(grown)) if model_bytes is None else given(model_bytes),
        residuals=tuple((peak / predicted - 1).tolist()),
        largest_batch=max(point.batch for point in points),
        sequence_lengths=tuple(sorted({point.sequence_length for point in points})),
    )


def _columns(points: Sequence[MeasuredBatch]) -> tuple[Array, Array, Array]:
    """B·L, S and bytes."""
    rows = [(point.batch * point.sequence_length, point.active, point.peak_bytes or math.nan) for point in points]
    tokens, active, peak = np.array(rows, dtype=np.float64).T
    return tokens, active, peak


def fit_limits(
    points: Sequence[MeasuredBatch], model_bytes: float | None, sparse_share: float | None, coverage: float
) -> BatchMemoryModel:
    """ln B = -ln κ + ln(M - M_model) - ln L - ln(1 - C1(1 - S)), by Gauss-Newton steps from bounded starts.

    Unknowns, in this order: u = ln κ, m = M_model/min(M) < 1, c = C1 < 1/(1 - min S); m or c may be known.
    """
    from scipy.optimize import least_squares as solve

    check_inside(coverage=coverage)
    share = known_share(points, sparse_share)
    check_points(points, model_bytes, share)
    memory = np.array([point.peak_bytes for point in points], dtype=np.float64)
    batch, length, active = (
        np.array([getattr(point, name) for point in points], dtype=np.float64)
        for name in ("batch", "sequence_length", "active")
    )
    least = float(memory.min())
    known = [None, None if model_bytes is None else model_bytes / least, share]
    free = [place for place, value in enumerate(known) if value is None]

    def whole(unknown: Array) -> tuple[float, float, float]:
        values = [0.0 if value is None else float(value) for value in known]
        for place, value in zip(free, unknown, strict=True):
            values[place] = float(value)
        return values[0], values[1], values[2]

    def residual(unknown: Array) -> Array:
        u, m, c = whole(unknown)
        return np.asarray(np.log(memory - m * least) - u - np.log(length * (1 - c * (1 - active))) - np.log(batch))

    def slopes(unknown: Array) -> Array:
        _, m, c = whole(unknown)
        columns = [-np.ones_like(memory), -least / (memory - m * least), (1 - active) / (1 - c * (1 - active))]
        return np.stack([columns[place] for place in free], 1)

    top = math.inf if active.min() == 1 else 1 / (1 - float(active.min()))
    low = np.array([-math.inf, 0.0, -1.0])[free]
    high = np.array([math.inf, 1 - 1e-9, top - 1e-9])[free]
    first = float(np.mean(np.log(memory) - np.log(length * batch)))
    start = np.array([first, 0.5, 0.5])[free]
    if len(points) < len(free) or not full_rank(slopes(start)):
        raise InputError(f"M_model, C0 and C1 are not identified by these {len(points)} points: vary card and sparsity")
    found = solve(residual, start, jac=slopes, bounds=(low, high), x_scale="jac", xtol=1e-14, ftol=1e-14, gtol=1e-14)
    fit = _linearised(found.x, slopes(found.x), found.fun, coverage)
    return _model(points, fit, free, whole(found.x), least, residual(found.x))


def _linearised(values: Array, slopes: Array, residuals: Array, coverage: float) -> LeastSquares:
    freedom = len(residuals) - len(values)
    variance = float(residuals @ residuals) / freedom if freedom else math.inf
    spread = np.linalg.inv(slopes.T @ slopes)
    covariance = variance * spread if freedom else np.full_like(spread, math.inf)
    label = f"{METHOD}, {len(residuals)} points"
    return LeastSquares(tuple(values.tolist()), tuple(map(tuple, covariance.tolist())), freedom, label, coverage)


def _model(
    points: Sequence[MeasuredBatch],
    fit: LeastSquares,
    free: Sequence[int],
    values: tuple[float, float, float],
    least: float,
    residuals: Array,
) -> BatchMemoryModel:
    def of(place: int) -> Estimate:
        return fit.estimate([float(place == other) for other in free]) if place in free else given(values[place])

    u, m, c = (of(place) for place in range(3))
    high = math.exp(u.high) if u.high < _LARGEST else math.inf
    return BatchMemoryModel(
        bytes_per_token=Estimate(math.exp(u.value), math.exp(u.low), high, u.method, u.coverage),
        sparse_share=c,
        model_bytes=Estimate(least * m.value, least * m.low, least * m.high, m.method, m.coverage),
        residuals=tuple(np.expm1(-residuals).tolist()),
        largest_batch=max(point.batch for point in points),
        sequence_lengths=tuple(sorted({point.sequence_length for point in points})),
    )
