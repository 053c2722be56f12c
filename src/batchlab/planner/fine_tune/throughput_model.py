"""Queries a second against batch and sparsity: the logarithm of arXiv 2408.04693, equation 2.

  "code"    Q = a + b·ln(B)/(S·C3), as in the authors' code
  "shift"   Q = a + b·ln(B/(S·C3)), as equation 2 prints it; the text's "a is the speed at batch one" fails for it
  "power"   Q = a + b·ln(B)/S^g, 0 <= g <= 1: ours, in which the effect of sparsity is fitted; g = 1 is "code"

Least squares on Q. **C3 cannot be fitted**: only b/C3 enters "code" and only a - b·ln C3 enters "shift", so any C3
gives one curve. The authors set 1.8 for Mixtral and 2.5 for BlackMamba by hand. g needs two sparsities, each with a
batch above 1: at B = 1 the sparsity enters no form but "shift".

The logarithm falls below 0 for small batches and has no upper bound: it is not asked below batch 1, beyond twice the
largest fitted batch, or at a sparsity outside of the fitted ones. `LinearTimeModel` fits better on all seven of the
authors' sets of points, for one number more than "code".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from batchlab.core.checks import check_inside, check_positive
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.planner.fine_tune.least_squares import Array, LeastSquares
from batchlab.planner.fine_tune.measured_batch import MeasuredBatch, check_fitted, measured

Form = Literal["code", "shift", "power"]
FORMS: tuple[Form, ...] = get_args(Form)
REACH = 2.0


@dataclass(frozen=True)
class ThroughputModel(JsonNoun):
    """The fitted logarithm. coefficients: a, b, and g in the form "power". exponent: g with its profile interval.

    sparsities, largest_batch: of the points. residuals: measured less fitted, queries/s. rmse: their root mean square.
    """

    form: str
    c3: float
    coefficients: LeastSquares
    exponent: Estimate | None
    sparsities: tuple[float, ...]
    largest_batch: float
    residuals: tuple[float, ...]

    @classmethod
    def fit(
        cls,
        points: Sequence[MeasuredBatch | Sequence[float]],
        *,
        form: str = "code",
        c3: float | None = 1.0,
        coverage: float = 0.95,
    ) -> ThroughputModel:
        """The law that fits `points` best. c3: held at this value, to compare with the paper's; it changes no speed.

        Intervals are Student's for errors of one size in Q; those of "power" are of the linearised law, and g's is its
        profile: all g with RSS(g) <= RSS·(1 + t²/(n - 3)), within [0, 1].
        Raises `InputError` where one batch size, or for "power" one sparsity, leaves a number open, and for c3=None.

        >>> ThroughputModel.fit([(1, 2.0), (2, 2.5), (4, 3.6)]).predict(2)
        0.8037037037037037
        """
        from batchlab.planner.fine_tune.throughput_fit import fit_throughput

        return fit_throughput(measured(points), form, c3, coverage)

    @property
    def a(self) -> Estimate:
        """In queries/s."""
        return self.coefficients.estimate(_unit(0, len(self.coefficients.values)))

    @property
    def b(self) -> Estimate:
        """In queries/s for a factor e of batch."""
        return self.coefficients.estimate(_unit(1, len(self.coefficients.values)))

    @property
    def rmse(self) -> float:
        """Root mean square of the residuals, queries/s: over all points, as the authors' is."""
        return math.sqrt(sum(value * value for value in self.residuals) / len(self.residuals))

    def predict(self, batch: float, sparsity: float = 1.0) -> float:
        """Q in queries/s."""
        return self.estimate(batch, sparsity).value

    def estimate(self, batch: float, sparsity: float = 1.0) -> Estimate:
        """Q with the interval of the fitted law, in queries/s; a new measurement scatters about it."""
        check_positive(batch=batch)
        check_fitted(sparsity, self.sparsities)
        most = REACH * self.largest_batch
        if not 1 <= batch <= most:
            raise InputError(f"batch must lie in 1..{most:g}, up to twice the largest fitted one, got {batch!r}")
        return self.coefficients.estimate(self._slopes(batch, sparsity), offset=self._offset(batch, sparsity))

    def speed(self, batch: float, sparsity: float) -> float:
        """Q by the formula, wherever it is asked: may be negative, and holds for nothing out there."""
        a, b = self.coefficients.values[:2]
        return float(a + b * regressor(self.form, self.c3, self._g, np.array(batch), np.array(sparsity)))

    def saturation(self, eps: float = 0.05, sparsity: float = 1.0) -> int | None:
        """The smallest batch whose doubling gains less than `eps`; None where no fitted batch is so large.

        Q(2B)/Q(B) - 1 = β·ln 2/Q(B), with β the slope of Q in ln B.
        """
        check_inside(eps=eps)
        check_fitted(sparsity, self.sparsities)
        at_one = self.speed(1.0, sparsity)
        slope = self.speed(math.e, sparsity) - at_one
        if slope <= 0:
            return 1
        log_batch = (slope * math.log(2) / eps - at_one) / slope
        if log_batch >= math.log(self.largest_batch):
            return None
        return 1 if log_batch < 0 else math.floor(math.exp(log_batch)) + 1

    @property
    def _g(self) -> float:
        return self.coefficients.values[2] if self.form == "power" else 1.0

    def _slopes(self, batch: float, sparsity: float) -> list[float]:
        x = float(regressor(self.form, self.c3, self._g, np.array(batch), np.array(sparsity)))
        return [1.0, x] if self.form != "power" else [1.0, x, -self.coefficients.values[1] * x * math.log(sparsity)]

    def _offset(self, batch: float, sparsity: float) -> float:
        """What makes the linearised "power" law the law itself at its estimate."""
        return -self._g * self._slopes(batch, sparsity)[2] if self.form == "power" else 0.0


def regressor(form: str, c3: float, g: float, batch: Array, active: Array) -> Array:
    """What b multiplies."""
    if form == "shift":
        return np.log(batch / (active * c3))
    return np.log(batch) / (active * c3 if form == "code" else active**g)


def _unit(place: int, length: int) -> list[float]:
    return [float(place == other) for other in range(length)]
