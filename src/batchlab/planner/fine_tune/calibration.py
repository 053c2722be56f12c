"""From a few measured batches to speed and memory at any: two laws of speed with their errors, and one of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, Facts, MicroBatchTime
from batchlab.core.jsonio import JsonNoun
from batchlab.measure.speed.step_time import Throughput
from batchlab.planner.fine_tune.linear_time import LinearTimeModel
from batchlab.planner.fine_tune.measured_batch import MeasuredBatch, measured
from batchlab.planner.fine_tune.memory_model import BatchMemoryModel
from batchlab.planner.fine_tune.throughput_fit import exponent_identified
from batchlab.planner.fine_tune.throughput_model import FORMS, ThroughputModel
from batchlab.planner.text_table import text_table

LINEAR = "linear time"


class Speed(Protocol):
    """What both laws of speed have."""

    def speed(self, batch: float, sparsity: float) -> float:
        """Queries/s, unguarded."""


Fit = Callable[[Sequence[MeasuredBatch]], Speed]


@dataclass(frozen=True)
class FormError(JsonNoun):
    """How far a law is off, in queries/s: root mean squares. rmse: of the points it was fitted to.

    left_out: of each point by the law fitted to the others; relative: the same as shares of the measured speeds.
    predicted: points that were left out: those without which every law is still identified. NaN where there are none.
    """

    rmse: float
    left_out: float
    relative: float
    predicted: int


@dataclass(frozen=True)
class Calibration(JsonNoun):
    """What the points say. points: those that were timed, of one sequence length.

    linear_time: t₀ + t₁·B. logarithm: the law of arXiv 2408.04693, in the form that was asked for.
    memory: None where no peaks were measured. errors: of each law by name: "linear time", "code", and where there are
    several sparsities "shift", and "power" if it is identified.
    """

    points: tuple[MeasuredBatch, ...]
    linear_time: LinearTimeModel
    logarithm: ThroughputModel
    memory: BatchMemoryModel | None
    errors: Mapping[str, FormError]
    notes: tuple[str, ...] = ()

    @property
    def sequence_length(self) -> float:
        """L of the points: the speeds are of queries of that length."""
        return self.points[0].sequence_length

    @property
    def best(self) -> LinearTimeModel | ThroughputModel:
        """The one of the two laws that predicts points left out better; of equals the line, which is bounded."""
        line, logarithm = (self.errors[name] for name in (LINEAR, self.logarithm.form))
        known = [error.left_out for error in (line, logarithm) if not math.isnan(error.left_out)]
        return self.logarithm if len(known) == 2 and known[1] < known[0] else self.linear_time

    def table(self) -> str:
        """Plain text: each law's errors, its numbers with intervals, and every point's speed, measured and by both."""
        rows = [
            (name, f"{error.rmse:.4g}", f"{error.left_out:.4g}", f"{100 * error.relative:.3g} %")
            for name, error in self.errors.items()
        ]
        text = text_table(("law", "rmse q/s", "left out q/s", "left out"), rows)
        text += "".join(f"\n{name}: {value}" for name, value in self._numbers())
        head = ("batch", "sparsity", "measured q/s", f"{LINEAR} q/s", f"{self.logarithm.form} q/s")
        residuals = zip(self.points, self.linear_time.residuals, self.logarithm.residuals, strict=True)
        lines = [
            (f"{p.batch:g}", f"{p.active:g}", f"{p.speed:.4g}", f"{p.speed - a:.4g}", f"{p.speed - b:.4g}")
            for p, a, b in residuals
        ]
        return f"{text}\n{text_table(head, lines)}" + "".join(f"\nnote: {note}" for note in self.notes)

    def _numbers(self) -> list[tuple[str, Estimate]]:
        found = [("a, q/s", self.logarithm.a), ("b, q/s", self.logarithm.b)]
        if self.logarithm.exponent is not None:
            found.append(("g", self.logarithm.exponent))
        if self.linear_time.sparse_share is not None:
            found.append(("C of time", self.linear_time.sparse_share))
        for sparsity in self.linear_time.sparsities:
            law = self.linear_time.law(sparsity)
            at = f" at sparsity {sparsity:g}" if len(self.linear_time.sparsities) > 1 else ""
            found += [(f"t0{at}, s", law.fixed), (f"t1{at}, s", law.per_example), (f"t0/t1{at}, queries", law.half)]
        if self.memory is not None:
            found += [("M_model, bytes", self.memory.model_bytes), ("C1 of memory", self.memory.sparse_share)]
            found.append(("bytes a token", self.memory.bytes_per_token))
        return found


def calibrate(
    points: Sequence[MeasuredBatch | Sequence[float]] | Facts | Throughput,
    *,
    form: str = "code",
    c3: float = 1.0,
    sequence_length: float | None = None,
    model_bytes: float | None = None,
    sparse_share: float | None = None,
    coverage: float = 0.95,
) -> Calibration:
    """Both laws of speed and the law of memory from `points`, with intervals, residuals and errors on points left out.

    points: `MeasuredBatch`, or tuples (batch, seconds[, peak_bytes[, sequence_length[, sparsity]]]); or what
    `measure.throughput` or `probe` found: then a step is a pass and an update, a batch is a micro-batch, and the law is
    what `planner.cost` takes as step_time.
    form, c3: of the logarithm; see `ThroughputModel`. sequence_length: at which speed is fitted, where points have
    several; memory takes all. model_bytes, sparse_share: of the memory, where known; see `BatchMemoryModel.fit`.
    coverage: of the intervals, for normal errors: of the line with a variance that grows as t, of the others constant.

    Raises `InputError` where the points do not identify a law: one batch size; one sparsity for C1 or g; one memory
    for M_model. The memory of a probe that gives no law is a note: a process's growth on a CPU need not follow one.

    >>> calibrate([(1, 1.5), (2, 2.1), (4, 2.9), (8, 5.1)]).linear_time.law().half
    Estimate(2.01 [1.106, 3.327], 95 %, least squares, 4 sizes)
    """
    every, notes = _points(points)
    chosen = _of_length([point for point in every if point.seconds is not None], sequence_length)
    logarithm = ThroughputModel.fit(chosen, form=form, c3=c3, coverage=coverage)
    linear_time = LinearTimeModel.fit(chosen, coverage=coverage)
    fits: dict[str, Fit] = {LINEAR: LinearTimeModel.fit}
    for name in FORMS:
        if name == form or (len(logarithm.sparsities) > 1 and (name != "power" or exponent_identified(chosen))):
            fits[name] = lambda some, name=name: ThroughputModel.fit(some, form=name, c3=c3)  # type: ignore[misc]
    memory = None
    try:
        memory = _memory(every, model_bytes, sparse_share, coverage)
    except InputError as error:
        if not isinstance(points, Facts | Throughput):
            raise
        notes = (*notes, f"no law of memory: {error}")
    return Calibration(tuple(chosen), linear_time, logarithm, memory, _errors(chosen, fits), notes)


def _memory(
    points: Sequence[MeasuredBatch], model_bytes: float | None, sparse_share: float | None, coverage: float
) -> BatchMemoryModel | None:
    peaks = [point for point in points if point.peak_bytes is not None]
    if peaks:
        return BatchMemoryModel.fit(peaks, model_bytes=model_bytes, sparse_share=sparse_share, coverage=coverage)
    if model_bytes is not None or sparse_share is not None:
        raise InputError("model_bytes and sparse_share are of the memory, but no point has peak_bytes")
    return None


def _errors(points: Sequence[MeasuredBatch], fits: Mapping[str, Fit]) -> dict[str, FormError]:
    """Of each law, on the points themselves, and on those that every law can tell from the others."""
    seen = {name: _misses(fit(points), points) for name, fit in fits.items()}
    left_out: dict[str, list[float]] = {name: [] for name in fits}
    speeds = []
    for place, point in enumerate(points):
        others = [*points[:place], *points[place + 1 :]]
        try:
            misses = {name: _misses(fit(others), [point])[0] for name, fit in fits.items()}
        except InputError:
            continue
        speeds.append(point.speed)
        for name, miss in misses.items():
            left_out[name].append(miss)
    return {
        name: FormError(
            _rms(seen[name]),
            _rms(misses),
            _rms([miss / speed for miss, speed in zip(misses, speeds, strict=True)]),
            len(misses),
        )
        for name, misses in left_out.items()
    }


def _misses(law: Speed, points: Sequence[MeasuredBatch]) -> list[float]:
    return [law.speed(point.batch, point.active) - point.speed for point in points]


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values)) if values else math.nan


def _of_length(points: Sequence[MeasuredBatch], sequence_length: float | None) -> list[MeasuredBatch]:
    lengths = sorted({point.sequence_length for point in points})
    if sequence_length is None:
        if len(lengths) > 1:
            raise InputError(f"sequence_length must be given, for speed is counted at one: seconds are of {lengths}")
        return list(points)
    if sequence_length not in lengths:
        raise InputError(f"sequence_length must be one of {lengths}, got {sequence_length!r}")
    return [point for point in points if point.sequence_length == sequence_length]


def _points(
    points: Sequence[MeasuredBatch | Sequence[float]] | Facts | Throughput,
) -> tuple[list[MeasuredBatch], tuple[str, ...]]:
    if isinstance(points, Facts):
        return _steps(points.micro_batches, points.update_seconds)
    if isinstance(points, Throughput):
        return _steps(points.micro_batches, points.update)
    return list(measured(points)), ()


def _steps(passes: Sequence[MicroBatchTime], update: Estimate) -> tuple[list[MeasuredBatch], tuple[str, ...]]:
    """A pass and an update as a step, ends added to ends; memory only where every size has it."""
    known = all(point.memory_bytes for point in passes)
    notes = () if known else ("memory was not measured at every size: no law of memory",)
    found = [
        MeasuredBatch(
            point.examples,
            point.seconds.value + update.value,
            point.memory_bytes if known else None,
            low=point.seconds.low + update.low,
            high=point.seconds.high + update.high,
        )
        for point in passes
    ]
    return found, notes
