"""The runs that `rules.fit.trajectory` is fitted to, smoothed, and where their curves pass a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_not_negative, check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun

Array = NDArray[np.float64]
_POINTS = 400


@dataclass(frozen=True)
class LossRun(JsonNoun):
    """One training run at one batch size, its learning rate tuned for it. Losses: nats a token, on held-out data.

    params: N, without embeddings or with them, alike in all runs. batch_tokens: B, over all devices. steps: updates at
    which the loss was measured, ascending. losses: one at each; of a fixed held-out set, not of the last batch.
    final_loss: where the loss had flattened, None where it had not. A run may have this alone, and no steps.
    warmup_steps: updates over which the learning rate rose. Leave out what was measured while it decayed.
    """

    params: float
    batch_tokens: float
    steps: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    final_loss: float | None = None
    warmup_steps: float = 0.0

    def __post_init__(self) -> None:
        check_positive(params=self.params, batch_tokens=self.batch_tokens)
        check_not_negative(warmup_steps=self.warmup_steps)
        for name in ("steps", "losses"):
            values = getattr(self, name)
            if not hasattr(values, "__len__") or isinstance(values, str):
                raise InputError(f"{name} must be a sequence of numbers, got {values!r:.80}")
            for value in values:
                check_positive(**{name: value})
            object.__setattr__(self, name, tuple(map(float, values)))
        if len(self.steps) != len(self.losses):
            raise InputError(f"steps and losses must be of one length, got {len(self.steps)} and {len(self.losses)}")
        if any(late <= early for early, late in zip(self.steps, self.steps[1:], strict=False)):
            raise InputError("steps must ascend")
        if self.final_loss is not None:
            check_positive(final_loss=self.final_loss)
            object.__setattr__(self, "final_loss", float(self.final_loss))
        elif not self.steps:
            raise InputError("a run must have steps with their losses, or a final_loss, got neither")
        for name in ("params", "batch_tokens", "warmup_steps"):
            object.__setattr__(self, name, float(getattr(self, name)))


class Curve(NamedTuple):
    """The kept points of one run. place: which of the runs it is. smooth: ln L by the polynomial, at log_steps.

    fine_steps, fine: the curve on a fine grid, ln L made to fall, by its running minimum. Without a polynomial it goes
    through the points, by monotone cubics (Fritsch and Butland 1984).
    """

    place: int
    log_params: float
    log_batch: float
    log_steps: Array
    log_losses: Array
    smooth: Array
    fine_steps: Array
    fine: Array


def curves(runs: Sequence[LossRun], *, degree: int | None, after_warmups: float) -> list[Curve]:
    """Of the runs that have one. Refuses a run with too few points left for the polynomial."""
    found = []
    for place, run in enumerate(runs):
        if not run.steps:
            continue
        steps, losses = np.array(run.steps), np.array(run.losses)
        kept = steps > after_warmups * run.warmup_steps
        least = 2 * (degree + 1) if degree is not None else 2
        if kept.sum() < least:
            rule = f"a polynomial of degree {degree}" if degree is not None else "a curve"
            raise InputError(
                f"runs[{place}] has {int(kept.sum())} points after {after_warmups:g} times its warm-up of "
                f"{run.warmup_steps:g} steps, {rule} needs at least {least}"
            )
        found.append(_curve(place, run, np.log(steps[kept]), np.log(losses[kept]), degree))
    return found


def _curve(place: int, run: LossRun, log_steps: Array, log_losses: Array, degree: int | None) -> Curve:
    from scipy.interpolate import PchipInterpolator

    through = (
        PchipInterpolator(log_steps, log_losses)
        if degree is None
        else np.polynomial.Polynomial.fit(log_steps, log_losses, degree)
    )
    fine_steps = np.linspace(log_steps[0], log_steps[-1], _POINTS)
    size, batch = math.log(run.params), math.log(run.batch_tokens)
    fine = np.minimum.accumulate(through(fine_steps))
    return Curve(place, size, batch, log_steps, log_losses, through(log_steps), fine_steps, fine)


def crossings(curve: Curve, floor: float, levels: Array) -> Array:
    """ln S where the falling curve first passes each level, linear in (ln S, ln(L - floor)); NaN where it does not."""
    excess = np.exp(curve.fine) - floor
    above = excess > 0
    if not above.any():
        return np.full(len(levels), np.nan)
    falling, steps = np.log(excess[above]), curve.fine_steps[above]
    found: Array = np.interp(np.log(levels - floor), falling[::-1], steps[::-1], left=np.nan, right=np.nan)
    return found
