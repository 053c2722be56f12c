"""Where more batch stops saving steps: perfect scaling, diminishing returns, maximal data parallelism.

Steps to a goal against batch size, beside the line steps(B_0)·B_0/B of perfect scaling (Shallue et al. 2019, arXiv
1811.03600). The source reads the three regimes off a plot; the two tolerances that bound them here are batchlab's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from batchlab.core.checks import check_inside, check_positive, holds
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.core.study import Study
from batchlab.curves.run_sets import Array, RunSets, by_size
from batchlab.measure.runs.steps_to_result import StepsToTarget

Run = float | StepsToTarget | None
Runs = Run | Sequence[Run]
Regime = Literal["perfect scaling", "diminishing returns", "maximal data parallelism"]
_MEDIAN_VARIANCE = math.pi / 2  # of a median over that of a mean, normal errors
_ROUNDING = 1e-12


@dataclass(frozen=True)
class ScalingRegimes(JsonNoun):
    """Steps to a goal at each batch size, ascending, against perfect scaling from `base`.

    steps: geometric means over seeds, in updates, each with its own interval. perfect: steps(B_0)·B_0/B.
    normalised: steps/steps(B_0). slopes: Δlog steps/Δlog B from each size to the next: -1 is perfect, 0 no gain.
    perfect_until: the batch size up to which steps <= (1 + tolerance)·perfect, between two sizes by a straight line in
    logarithms; infinite if the grid does not reach it. flat_from: the smallest size tried from which no slope is below
    -flat; infinite if the last one is. resolutions: the most updates between two evaluations at the goal, 0 if unknown.
    met_at_start: sizes at which the goal was met before any update; they are not fitted. censored: runs that did not
    reach it.
    """

    base: float
    batch_sizes: tuple[float, ...]
    steps: tuple[Estimate, ...]
    perfect: tuple[float, ...]
    normalised: tuple[float, ...]
    slopes: tuple[float, ...]
    perfect_until: Estimate
    flat_from: Estimate
    tolerance: float
    flat: float
    resolutions: tuple[float, ...]
    met_at_start: tuple[float, ...] = ()
    censored: int = 0
    note: str = ""

    def regime(self, batch_size: float) -> Regime:
        """Which of the three a batch size is in, by the point estimates."""
        if batch_size >= self.flat_from.value:
            return "maximal data parallelism"
        return "perfect scaling" if batch_size <= self.perfect_until.value else "diminishing returns"


def perfect_scaling_limit(
    study: Study | Mapping[float, Runs] | Iterable[tuple[float, Runs]],
    *,
    tolerance: float = 0.2,
    flat: float = 0.05,
    base: float | None = None,
    coverage: float = 0.95,
) -> ScalingRegimes:
    """Where perfect scaling ends and where more batch saves no more steps.

    study: a `Study`, of which the runs with fresh seeds count; or batch size -> steps to the goal, as a mapping or as
    pairs, one row a size: a number, a `StepsToTarget`, None for a run that did not reach it, or a sequence of these,
    one a seed. Censored runs are treated as in `fit_tradeoff`. Every size must have been tuned by itself.
    tolerance: by how much steps may exceed the line, 0.2 as in `critical_batch`, whose B* is the same point on a fitted
    law: it uses all sizes and is the steadier of the two. flat: the slope that counts as none. base: B_0, None for the
    smallest size that reached the goal.

    The intervals hold the scatter over seeds (normal errors of ln steps, of one size at all batch sizes; Student's t,
    shared out by Bonferroni where any of several sizes could err, so that they cover more than stated) and the
    resolution of the evaluations. With one seed a size they reach from B_0 to infinity. They do not hold the luck of
    the search for the settings, which a size's seeds share.

    Raises `InputError` for fewer than 2 sizes with a known number of steps, a size given twice, or a base that is not
    among them.

    >>> found = perfect_scaling_limit({16: 1000, 32: 500, 64: 260, 128: 190, 256: 180, 512: 178})
    >>> round(found.perfect_until.value), found.flat_from.value, found.regime(128)
    (83, 256.0, 'diminishing returns')
    """
    check_positive(tolerance=tolerance, flat=flat)
    check_inside(coverage=coverage)
    rows, notes = _rows(study)
    met = tuple(size for size, runs in rows.items() if any(_at_start(run) for run in runs))
    notes += [f"the goal was met before the first update at batch size {size:g}: choose a harder one" for size in met]
    pairs = [(size, run) for size, runs in rows.items() if size not in met for run in runs]
    sets = by_size([size for size, _ in pairs], [_steps_of(run) for _, run in pairs])
    first = _base_index(sets, base)
    resolutions = np.array([max((_resolution_of(run) for run in rows[size]), default=0.0) for size in sets.sizes])
    curve = _Curve(sets, first, resolutions, coverage)
    updates = np.exp(sets.log_steps)
    return ScalingRegimes(
        base=float(sets.sizes[first]),
        batch_sizes=tuple(map(float, sets.sizes)),
        steps=tuple(curve.mean(at) for at in range(len(sets.sizes))),
        perfect=tuple(map(float, updates[first] * sets.sizes[first] / sets.sizes)),
        normalised=tuple(map(float, updates / updates[first])),
        slopes=tuple(map(float, curve.slopes)),
        perfect_until=curve.perfect_until(tolerance),
        flat_from=curve.flat_from(flat),
        tolerance=float(tolerance),
        flat=float(flat),
        resolutions=tuple(map(float, resolutions)),
        met_at_start=met,
        censored=sets.censored,
        note="; ".join([*sets.notes, *notes]),
    )


class _Curve:
    """ln steps at ln B, with the bounds within which seeds and evaluations leave each."""

    def __init__(self, sets: RunSets, first: int, resolutions: Array, coverage: float) -> None:
        self.sets, self.first, self.coverage = sets, first, coverage
        self.log_sizes, self.log_steps = np.log(sets.sizes), sets.log_steps
        self.slopes = np.diff(self.log_steps) / np.diff(self.log_sizes)
        scatter = math.sqrt(sets.square_sum / sets.free) if sets.free else math.inf
        self.errors = scatter * np.sqrt(np.where(sets.by_median, _MEDIAN_VARIANCE, 1.0) / sets.counts)
        share = np.minimum(resolutions / np.exp(self.log_steps), 1.0)
        self.early = np.where(share < 1, -np.log1p(-np.where(share < 1, share, 0.0)), math.inf)
        self.origin = f"{sets.free + len(sets.sizes)} runs" if sets.free else "one run a size, which bounds nothing"

    def _student(self, comparisons: int) -> float:
        from scipy.special import stdtrit

        free = max(self.sets.free, 1)
        return float(stdtrit(free, 1 - (1 - self.coverage) / (2 * comparisons)))

    def mean(self, at: int) -> Estimate:
        """Steps at one size; low reaches back to the evaluation before."""
        value, half = float(self.log_steps[at]), self._student(1) * float(self.errors[at])
        low = math.exp(value - half - float(self.early[at])) if math.isfinite(half) else 0.0
        high = math.exp(min(value + half, 709.0)) if math.isfinite(half) else math.inf
        method = f"geometric mean of {self.sets.counts[at]:g} runs, scatter pooled over sizes"
        return Estimate(math.exp(value), low, high, method, self.coverage)

    def perfect_until(self, tolerance: float) -> Estimate:
        """Where ln(steps/perfect) first exceeds ln(1 + tolerance), from the base on.

        Too late an end takes an error at the one size behind it; too early a one at any of those before.
        """
        excess = self.log_steps + self.log_sizes - math.log1p(tolerance)
        excess = (excess - self.log_steps[self.first] - self.log_sizes[self.first])[self.first :]
        errors, early = self.errors[self.first :], self.early[self.first :]
        error = np.where(np.arange(len(excess)) > 0, np.hypot(errors, errors[0]), 0.0)
        once, every = self._student(1), self._student(max(len(excess) - 1, 1))
        bounds = (excess + once * error + early[0], excess, excess - every * error - early)
        low, value, high = (self._crossing(each) for each in bounds)
        return Estimate(
            value, min(low, value), max(high, value), f"end of perfect scaling, {self.origin}", self.coverage
        )

    def _crossing(self, excess: Array) -> float:
        """The batch size at which `excess` first rises above 0; the base where it begins above."""
        x = self.log_sizes[self.first :]
        over = excess > _ROUNDING
        over[0] = False
        if not over.any():
            return math.inf
        at = int(np.argmax(over))
        left, right = min(float(excess[at - 1]), 0.0), float(excess[at])
        if left == 0 or math.isinf(right):
            return float(self.sets.sizes[self.first + at - 1])
        share = 1.0 if math.isinf(left) else -left / (right - left)
        return math.exp(float(x[at - 1] + share * (x[at] - x[at - 1])))

    def flat_from(self, flat: float) -> Estimate:
        """The size from which all slopes are at least -flat."""
        gaps = np.diff(self.log_sizes)
        half = self._student(len(gaps)) * np.hypot(self.errors[1:], self.errors[:-1])
        bounds = (
            self.slopes + (half + self.early[:-1]) / gaps,
            self.slopes,
            self.slopes - (half + self.early[1:]) / gaps,
        )
        low, value, high = (self._level_from(each >= -flat) for each in bounds)
        return Estimate(value, low, high, f"start of the plateau, {self.origin}", self.coverage)

    def _level_from(self, level: Any) -> float:
        steep = np.flatnonzero(~level)
        after = 0 if len(steep) == 0 else int(steep[-1]) + 1
        return float(self.sets.sizes[after]) if after < len(level) else math.inf


def _rows(study: Any) -> tuple[dict[float, list[Any]], list[str]]:
    """The runs of each size, and what was left out."""
    if isinstance(study, Study):
        return _rows_of_study(study)
    rows: dict[float, list[Any]] = {}
    for size, runs in study.items() if isinstance(study, Mapping) else _pairs(study):
        if not holds(lambda value: 0 < value < math.inf, size):
            raise InputError(f"batch sizes must be finite and > 0, got {size!r}")
        if float(size) in rows:
            raise InputError(f"batch size {size:g} has two rows: give the runs of one size as one sequence")
        rows[float(size)] = list(runs) if isinstance(runs, (Sequence, np.ndarray)) else [runs]
        if not rows[float(size)]:
            raise InputError(f"batch size {size:g} has no run: leave it out, or give None for one that failed")
    return rows, []


def _pairs(study: Any) -> list[tuple[Any, Any]]:
    pairs = list(study) if isinstance(study, Iterable) and not isinstance(study, str) else [study]
    if not all(isinstance(pair, Sequence) and len(pair) == 2 and not isinstance(pair, str) for pair in pairs):
        raise InputError(f"study must be a batchlab.Study, or pairs (batch size, runs), got {study!r:.80}")
    return pairs


def _rows_of_study(study: Study) -> tuple[dict[float, list[Any]], list[str]]:
    rows: dict[float, list[Any]] = {}
    notes = []
    for row in study.rows():
        size, resolution = float(row["batch_size"]), row["resolution"]
        if row["steps"]:
            rows[size] = [_fresh(steps, resolution) for steps in row["steps"]]
        elif row["trials"] and row["learning_rate"] is None:
            rows[size] = [None]
        else:
            notes.append(f"batch size {size:g} has no run with a fresh seed yet")
    return rows, notes


def _fresh(steps: int | None, resolution: int | None) -> StepsToTarget:
    return StepsToTarget(steps, None if steps is None else resolution)


def _at_start(run: Any) -> bool:
    return isinstance(run, StepsToTarget) and run.reached_at_start


def _steps_of(run: Any) -> float | None:
    return run.steps if isinstance(run, StepsToTarget) else run


def _resolution_of(run: Any) -> float:
    return float(run.resolution or 0) if isinstance(run, StepsToTarget) else 0.0


def _base_index(sets: RunSets, base: float | None) -> int:
    if len(sets.sizes) < 2:
        raise InputError(f"study must hold at least 2 batch sizes that reached the goal, got {len(sets.sizes)}")
    if base is None:
        return 0
    at = np.flatnonzero(sets.sizes == float(base))
    if len(at) != 1:
        known = ", ".join(f"{size:g}" for size in sets.sizes)
        raise InputError(f"base must be one of the batch sizes that reached the goal ({known}), got {base!r}")
    return int(at[0])
