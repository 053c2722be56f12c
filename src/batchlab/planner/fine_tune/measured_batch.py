"""`MeasuredBatch`: one batch that was run, its seconds and its peak of memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_positive, holds
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun

DENSE = 1.0

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MeasuredBatch(JsonNoun):
    """One batch that was run.

    batch: B, queries (examples, sequences) of a step. seconds: of the whole step, None if it was not timed.
    peak_bytes: of memory, None if unknown. sequence_length: L, tokens of a padded query; 1 where a query is one unit.
    sparsity: S, the share of experts at work, 0.25 for the top 2 of 8; None for a model without experts.
    low, high: the interval of the seconds where it is known.
    """

    batch: float
    seconds: float | None = None
    peak_bytes: float | None = None
    sequence_length: float = 1
    sparsity: float | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        check_positive(batch=self.batch, sequence_length=self.sequence_length)
        given = {name: getattr(self, name) for name in ("seconds", "peak_bytes")}
        check_positive(**{name: value for name, value in given.items() if value is not None})
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        for name in ("batch", "seconds", "peak_bytes", "sequence_length", "sparsity", "low", "high"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))

    @classmethod
    def at_speed(cls, batch: float, queries_per_second: float, sparsity: float | None = None) -> MeasuredBatch:
        """A batch whose speed is known: B/Q seconds."""
        check_positive(batch=batch, queries_per_second=queries_per_second)
        return cls(batch, batch / queries_per_second, sparsity=sparsity)

    @property
    def active(self) -> float:
        """S, 1 for a model without experts."""
        return DENSE if self.sparsity is None else self.sparsity

    @property
    def speed(self) -> float:
        """Q = B/seconds; NaN where it was not timed."""
        return math.nan if self.seconds is None else self.batch / self.seconds

    @property
    def estimate(self) -> Estimate:
        """The seconds, with their interval if it is known, else without spread."""
        value = math.nan if self.seconds is None else self.seconds
        low, high = value if self.low is None else self.low, value if self.high is None else self.high
        return Estimate(value, low, high, "measured")


def measured(points: Sequence[MeasuredBatch | Sequence[float]]) -> tuple[MeasuredBatch, ...]:
    """All as `MeasuredBatch`: a tuple is (batch, seconds[, peak_bytes[, sequence_length[, sparsity]]])."""
    if not isinstance(points, Iterable):
        raise InputError(f"points must be a sequence of MeasuredBatch or of tuples, got {points!r:.80}")
    return tuple(_measured(point) for point in points)


def _measured(point: Any) -> MeasuredBatch:
    if isinstance(point, MeasuredBatch):
        return point
    parts = list(point) if isinstance(point, Iterable) and not isinstance(point, str) else []
    if not 2 <= len(parts) <= 5:
        raise InputError(
            "a point must be MeasuredBatch or (batch, seconds[, peak_bytes[, sequence_length[, sparsity]]]), "
            f"got {point!r:.80}"
        )
    return MeasuredBatch(*parts)


def check_sparsity(sparsity: float) -> None:
    """Refuses what is no share of experts: S in (0, 1]."""
    if not holds(lambda value: 0 < value <= 1, sparsity):
        raise InputError(f"sparsity must lie in (0, 1], the share of experts at work, got {sparsity!r}")


def check_fitted(sparsity: float, sparsities: Sequence[float]) -> None:
    """Refuses a sparsity outside of those that were fitted."""
    check_sparsity(sparsity)
    if not min(sparsities) <= sparsity <= max(sparsities):
        raise InputError(
            f"sparsity must lie within the fitted {min(sparsities):g}..{max(sparsities):g}, got {sparsity!r}"
        )


def timed(points: Sequence[MeasuredBatch]) -> tuple[Array, Array, Array]:
    """B, S and Q of points that were all timed at one length; refuses others, and fewer than two batch sizes."""
    if not points or any(point.seconds is None for point in points):
        raise InputError(f"points must be one or more, each with its seconds, got {len(points)}")
    if len({point.batch for point in points}) < 2:
        raise InputError(f"points must hold two batch sizes or more: one, {points[0].batch:g}, fits no law")
    if len({point.sequence_length for point in points}) > 1:
        raise InputError("points must be of one sequence_length: speed is counted in queries of that length")
    columns = np.array([(point.batch, point.active, point.speed) for point in points], dtype=np.float64).T
    return columns[0], columns[1], columns[2]
