"""The loss-trajectory law as fitted to runs: its constants, their intervals, and what it says of other runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.rules import loss as laws_of_loss
from batchlab.rules.law_loss import LossCurve, TrajectoryConstants
from batchlab.rules.token_batch import TokenBatch

NAMES = tuple(field.name for field in fields(TrajectoryConstants))


@dataclass(frozen=True)
class CriticalLevel(JsonNoun):
    """What stage 2 found at one loss of one model."""

    params: float
    loss: float
    critical_batch_tokens: float


@dataclass(frozen=True)
class TrajectoryLaw(JsonNoun):
    """The law fitted to your runs. N_c: parameters. S_c: updates. B_star: tokens. Losses: nats a token.

    stages: the constants before the joint fit. levels: stage 2's points. params, batch_tokens, losses: the least and
    most that were fitted. deviation: root mean square of ln(measured/fitted) over all points. held_out_params,
    leave_one_out: the largest model, and the mean of |predicted/measured - 1| over its curves by the law fitted
    without it; None where three others had no final loss. draws: the constants of drawn runs, in the order of the
    fields. widening: of each constant, and of a prediction, how many of the draws' deviations half an interval is.
    note: what the reader must know; "" for nothing.
    """

    alpha_N: Estimate
    N_c: Estimate
    alpha_S: Estimate
    S_c: Estimate
    alpha_B: Estimate
    B_star: Estimate
    stages: TrajectoryConstants
    levels: tuple[CriticalLevel, ...]
    params: tuple[float, float]
    batch_tokens: tuple[float, float]
    losses: tuple[float, float]
    deviation: float
    held_out_params: float | None
    leave_one_out: float | None
    draws: tuple[tuple[float, ...], ...]
    widening: tuple[float, ...]
    note: str = ""

    @property
    def constants(self) -> TrajectoryConstants:
        """The point estimates, as `rules.loss` takes them for all its questions."""
        return TrajectoryConstants(*(getattr(self, name).value for name in NAMES))

    def loss(self, *, params: float, steps: float, batch_tokens: float) -> Estimate:
        """The loss of N parameters after S updates of B tokens: the law's, without one more run's own scatter."""

        def of(constants: TrajectoryConstants) -> float:
            return laws_of_loss.kaplan(params=params, steps=steps, batch_tokens=batch_tokens, constants=constants).nats

        outside = self._outside(params=params, batch_tokens=batch_tokens, losses=of(self.constants))
        return self._predicted(of, outside)

    def curve(self, *, params: float, steps: ArrayLike, batch_tokens: float) -> LossCurve:
        """The losses at many steps, without intervals; `outside` says what lies beyond the runs."""
        found = laws_of_loss.trajectory(params=params, steps=steps, batch_tokens=batch_tokens, constants=self.constants)
        low, high = min(found.losses), max(found.losses)
        beyond = high if high > self.losses[1] else low
        outside = self._outside(params=params, batch_tokens=batch_tokens, losses=beyond)
        return LossCurve(found.steps, found.losses, "", outside)

    def critical_batch(self, *, loss: float) -> TokenBatch:
        """B_crit = B_*/L^(1/α_B), as `rules.loss.batch_adjusted` takes it."""
        found = laws_of_loss.critical_batch(loss=loss, constants=self.constants)
        return TokenBatch(found.tokens, "", self._outside(losses=loss))

    def critical_batch_tokens(self, *, loss: float) -> Estimate:
        """The same in tokens, with its interval."""

        def of(constants: TrajectoryConstants) -> float:
            return laws_of_loss.critical_batch(loss=loss, constants=constants).tokens

        return self._predicted(of, self._outside(losses=loss))

    def _predicted(self, of: Callable[[TrajectoryConstants], float], outside: str) -> Estimate:
        said = f"{self.alpha_N.method}; {outside}" if outside else self.alpha_N.method
        drawn = []
        for draw in self.draws:
            try:
                drawn.append(of(TrajectoryConstants(*draw)))
            except InputError:  # beyond what a float holds
                drawn.append(math.inf)
        return log_estimate(of(self.constants), drawn, self.widening[-1], said, self.alpha_N.coverage)

    def _outside(self, **given: float) -> str:
        said = []
        for name, value in given.items():
            low, high = getattr(self, name)
            if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                said.append(f"{name} of {value:.4g} lie beyond {low:.4g} to {high:.4g}, which the law was fitted over")
        return "; ".join(said)


def log_estimate(value: float, drawn: Sequence[float], widening: float, method: str, coverage: float) -> Estimate:
    """`value` with `widening` deviations of the drawn values on either side, in the logarithm."""
    logs = np.log(drawn)
    spread = float(logs.std(ddof=1)) if len(logs) > 1 and np.isfinite(logs).all() else math.inf
    half = widening * spread
    if not half < 700:
        return Estimate(value, 0.0, math.inf, method, coverage)
    return Estimate(value, value * math.exp(-half), value * math.exp(half), method, coverage)
