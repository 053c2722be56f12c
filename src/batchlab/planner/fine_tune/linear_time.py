"""Queries a second from a step that lasts a fixed time and a time for each query.

  t(B, S) = t₀ + B·((1 - C) + C·S)·t₁        Q = B/t, at most 1/(((1 - C) + C·S)·t₁)

t₀: what a step takes whatever its batch, such as launching kernels and dequantising weights. t₁: a query's time with
all experts at work. C: the share of it that falls with the share S of experts at work, as C1 does of memory. With
points of one sparsity there is no C, and t₁ is a query's time at that one.

Physically bounded, where `ThroughputModel`'s logarithm is not. On the points of arXiv 2408.04693, root mean square
errors in queries/s, fitted to all points (each left out in turn, where all three can do without it):

                                this law         "code"           "power"
  Mixtral commonsense, A40      0.021 (0.032)    0.055 (0.058)    0.044 (0.061)
  Mixtral math, A40             0.007 (0.029)    0.022 (0.040)    not identified
  BlackMamba commonsense, A40   0.402 (0.448)    1.055 (1.164)    0.399 (0.442)
  BlackMamba math, A40          0.392 (0.593)    0.561 (0.667)    0.280 (0.519)
  Mixtral, A100-40              0.005 (0.035)    0.035 (0.075)    not identified
  Mixtral, A100-80              0.047 (0.058)    0.104 (0.115)    0.066 (0.081)
  Mixtral, H100                 0.168 (0.186)    0.416 (0.455)    0.336 (0.389)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchlab.core.checks import check_inside, check_positive
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, MicroBatchTime
from batchlab.core.jsonio import JsonNoun
from batchlab.measure.speed.step_time_law import StepTimeLaw, fit_step_time
from batchlab.planner.fine_tune.least_squares import LeastSquares, full_rank, least_squares
from batchlab.planner.fine_tune.measured_batch import MeasuredBatch, check_fitted, measured, timed


@dataclass(frozen=True)
class LinearTimeModel(JsonNoun):
    """The fitted line. coefficients: t₀ and t₁ where one sparsity was measured, else t₀, (1 - C)t₁ and C·t₁; seconds.

    single: the law by `fit_step_time` where one sparsity was measured, with the noise of the times in its intervals.
    sparsities, largest_batch: of the points. residuals: measured less fitted, queries/s.
    """

    coefficients: LeastSquares
    single: StepTimeLaw | None
    sparsities: tuple[float, ...]
    largest_batch: float
    residuals: tuple[float, ...]

    @classmethod
    def fit(cls, points: Sequence[MeasuredBatch | Sequence[float]], *, coverage: float = 0.95) -> LinearTimeModel:
        """Least squares on the seconds, each weighted by 1/t as in `fit_step_time`: a variance that grows as t.

        Raises `InputError` for one batch size.

        >>> LinearTimeModel.fit([(1, 1.5), (2, 2.0), (8, 5.0)]).law().half
        Estimate(2 [2, 2], 95 %, least squares, 3 sizes)
        """
        return _fit(measured(points), coverage)

    @property
    def sparse_share(self) -> Estimate | None:
        """C with Fieller's interval; None where one sparsity was measured."""
        return self.coefficients.ratio([0, 0, 1], [0, 1, 1]) if self.single is None else None

    @property
    def rmse(self) -> float:
        """Root mean square of the residuals, queries/s."""
        return math.sqrt(sum(value * value for value in self.residuals) / len(self.residuals))

    def law(self, sparsity: float | None = None) -> StepTimeLaw:
        """t₀ + t₁·B at one sparsity, for `planner.cost`. None takes the only one that was measured."""
        sparsity = self._known(sparsity)
        if self.single is not None:
            return self.single
        fit, each = self.coefficients, [0.0, 1.0, sparsity]
        return StepTimeLaw(fit.estimate([1, 0, 0]), fit.estimate(each), fit.ratio([1, 0, 0], each))

    def predict(self, batch: float, sparsity: float | None = None) -> float:
        """Q in queries/s."""
        return self.estimate(batch, sparsity).value

    def estimate(self, batch: float, sparsity: float | None = None) -> Estimate:
        """Q with the interval of the fitted law, in queries/s; a new measurement scatters about it."""
        check_positive(batch=batch)
        seconds = self.coefficients.estimate(self._contrast(batch, self._known(sparsity)))
        if not seconds.value > 0:
            raise InputError(f"batch must be one for which the law gives a positive time, got {batch!r}")
        high = batch / seconds.low if seconds.low > 0 else math.inf
        return Estimate(batch / seconds.value, batch / seconds.high, high, seconds.method, seconds.coverage)

    def speed(self, batch: float, sparsity: float) -> float:
        """Q by the formula, wherever it is asked."""
        seconds = float(np.dot(self._contrast(batch, sparsity), self.coefficients.values))
        return batch / seconds if seconds else math.nan

    def saturation(self, eps: float = 0.05, sparsity: float | None = None) -> int | None:
        """The smallest batch whose doubling gains less than `eps`: above t₀(1 - ε)/(2ε·t₁), for Q(2B)/Q(B) - 1 is
        t₀/(t₀ + 2t₁B). None where no fitted batch is so large.
        """
        check_inside(eps=eps)
        law = self.law(sparsity)
        if not law.per_example.value > 0:
            return None
        bound = law.fixed.value / law.per_example.value * (1 - eps) / (2 * eps)
        batch = 1 if bound < 1 else math.floor(bound) + 1
        return batch if batch <= self.largest_batch else None

    def _contrast(self, batch: float, sparsity: float) -> list[float]:
        return [1.0, batch] if self.single is not None else [1.0, batch, batch * sparsity]

    def _known(self, sparsity: float | None) -> float:
        if sparsity is None:
            if len(self.sparsities) > 1:
                raise InputError(f"sparsity must be given: the points have {list(self.sparsities)}")
            return self.sparsities[0]
        check_fitted(sparsity, self.sparsities)
        return sparsity


def _fit(points: Sequence[MeasuredBatch], coverage: float) -> LinearTimeModel:
    check_inside(coverage=coverage)
    batch, active, speed = timed(points)
    seconds, sparsities = batch / speed, tuple(sorted(set(active.tolist())))
    columns = [np.ones_like(batch), batch] + ([batch * active] if len(sparsities) > 1 else [])
    design = np.stack(columns, 1)
    if len(points) < design.shape[1] or not full_rank(design):
        raise InputError(
            f"t0, t1 and C are not identified by these {len(points)} points: vary batch and sparsity apart"
        )
    fit = least_squares(design, seconds, weights=1 / seconds, coverage=coverage)
    single = None
    if len(sparsities) == 1:
        single = fit_step_time([_timed_point(point, len(points)) for point in points], coverage=coverage)
    residuals = speed - batch / (design @ fit.values)
    return LinearTimeModel(fit, single, sparsities, float(batch.max()), tuple(residuals.tolist()))


def _timed_point(point: MeasuredBatch, count: int) -> MicroBatchTime:
    """A time without an interval is as good as the residuals say; of two such times nothing is known."""
    seconds = point.estimate
    if point.low is None and count == 2:
        seconds = Estimate(seconds.value, 0.0, math.inf, seconds.method)
    return MicroBatchTime(point.batch, seconds)  # type: ignore[arg-type]
