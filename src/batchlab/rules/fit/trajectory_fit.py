"""The six constants of the loss-trajectory law from small runs (Su et al. 2024, arXiv 2403.06563).

  L = (N_c/N)^α_N + [(S_c/S)·(1 + B_*/(B·L^(1/α_B)))]^α_S

N parameters, S updates of B tokens, L nats a token: `rules.loss.kaplan` solves it, here are the constants for your own
model family, tokenizer and data. Three stages in order (`rules.fit.trajectory_stages`), then least squares over all
points at once (`rules.fit.trajectory_joint`), which starts from them. The paper stops at the stages and takes models of
1e6 to 6e7; the sizes and batches that you give should span what you can afford, and bracket the critical batch.

Not for runs whose data repeat, or whose losses were measured while the learning rate decayed; nor where one learning
rate was used for all batches: that is read as a critical batch. Elsewhere the critical batch is found to follow tokens,
not the loss (`rules.batch.power_lines_crit`): compare both before a large run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from batchlab.core.checks import check_count, check_inside, check_not_negative, is_count
from batchlab.core.errors import InputError
from batchlab.rules.fit.bootstrap import MOST_FAILED, Rows, bootstrap
from batchlab.rules.fit.final_losses import extrapolated_final_losses
from batchlab.rules.fit.loss_runs import Array, Curve, LossRun, curves
from batchlab.rules.fit.trajectory_joint import (
    FREE,
    OneStep,
    constants_of,
    least_squares,
    log_losses,
    points_of,
    start_at,
)
from batchlab.rules.fit.trajectory_law import NAMES, CriticalLevel, TrajectoryLaw, log_estimate
from batchlab.rules.fit.trajectory_stages import FEWEST, Level, Line, batch_line, levels_of, size_line, step_line
from batchlab.rules.law_loss import TrajectoryConstants


def trajectory(
    runs: Sequence[LossRun],
    *,
    joint: bool = True,
    extrapolate: bool = False,
    degree: int | None = 6,
    after_warmups: float = 5.0,
    levels: int = 12,
    margin: float = 0.02,
    draws: int = 200,
    seed: int = 0,
    coverage: float = 0.95,
) -> TrajectoryLaw:
    """The law, its intervals, and what it misses of the largest model when fitted without it.

    runs: of at least three model sizes with a `final_loss`, and at least three batch sizes of one model; six or more
    are better. joint: ends with least squares over all points, which predicts several times better than the stages.
    extrapolate: takes the final losses that are missing from the shape of the curves
    (`rules.fit.extrapolated_final_losses`), as a start for the joint fit, which then stands on what was measured alone.
    degree: of the polynomial that smooths ln L in ln S for the stages; 3 biases B_*, None takes the points as they are,
    for data without noise. after_warmups: points up to so many times a run's warm-up are dropped: half of a warm-up is
    lost, which at 5 is a tenth of the updates (the sources drop 1). levels: losses for each model in stage 2. margin:
    losses less than so much above L(N) tell nothing of the updates, and are left out of stages 2 and 3; one further
    below L(N) is refused. 5.0, 12 and 0.02 are batchlab's choice. draws, seed: of the intervals.

    Intervals: whole runs are drawn with replacement, those with a final loss and those without apart; the constants of
    each draw are one step from the fit (`joint`) or fitted anew, and half an interval is Student's quantile, with the
    runs less the constants free, times their deviation in logarithms. They cover what differs from run to run about
    the law; not a law that is wrong beyond the sizes fitted, nor a tuning that errs alike in all runs. At 90 % they
    held the truth in 87 to 100 % of simulated studies of 16 to 40 runs: near 90 where runs are many, wider than they
    need be where they are few or the stages stand alone.

    Raises `InputError` that names the stage: fewer than three sizes or batch sizes, losses below L(N), batch sizes that
    do not bracket the critical batch or reach no common loss, an exponent of the wrong sign.

    >>> from itertools import product
    >>> from batchlab.rules import loss
    >>> steps, runs = [300 * 1.5**k for k in range(17)], []
    >>> for params, batch_tokens in product((1e6, 1e7, 6e7), (2**15, 2**18, 2**21)):
    ...     given = {"params": params, "batch_tokens": batch_tokens}
    ...     known = loss.trajectory(**given, steps=steps, constants="trajectory_loss")
    ...     runs.append(LossRun(**given, steps=known.steps, losses=known.losses))
    >>> law = trajectory(runs, extrapolate=True)
    >>> round(law.alpha_N.value, 6), round(law.S_c.value, 3), round(law.critical_batch(loss=3.5).tokens, 3)
    (0.076, 2600.0, 377101.675)
    """
    check_count(2, draws=draws)
    check_count(0, seed=seed)
    check_count(FEWEST, levels=levels)
    check_inside(coverage=coverage, margin=margin)
    _check(runs, joint, extrapolate, degree, after_warmups)
    settings = _Settings(joint, extrapolate, degree, after_warmups, levels, margin)
    found = _Fit(runs, settings)
    logs, failed = found.drawn(draws, seed)
    widening = found.widening(coverage) if failed <= MOST_FAILED * draws else (math.inf,) * (FREE + 1)
    drawn = [tuple(map(float, np.exp(row))) for row in logs]
    method = f"{'joint least squares' if joint else 'three lines'} over {len(runs)} runs, drawn by run"
    estimates: dict[str, Any] = {
        name: log_estimate(getattr(found.constants, name), [each[at] for each in drawn], widening[at], method, coverage)
        for at, name in enumerate(NAMES)
    }
    size, missed, why = _held_out(runs, found, settings)
    notes = [why] if why else []
    if failed > MOST_FAILED * draws:
        notes.append(f"no intervals: {failed} of {draws} drawn tables could not be fitted")
    elif not math.isfinite(widening[-1]):
        notes.append(f"no intervals: {len(runs)} runs are too few for them")
    return TrajectoryLaw(
        **estimates,
        stages=found.stages,
        levels=tuple(CriticalLevel(*map(math.exp, level[:3])) for level in found.levels),
        **_ranges(found.curves),
        deviation=found.deviation(),
        held_out_params=size,
        leave_one_out=missed,
        draws=tuple(drawn),
        widening=widening,
        note="; ".join(notes),
    )


class _Settings(NamedTuple):
    joint: bool
    extrapolate: bool
    degree: int | None
    after_warmups: float
    levels: int
    margin: float


class _Fit:
    """The stages, and the joint fit where it is asked for."""

    def __init__(self, runs: Sequence[LossRun], settings: _Settings) -> None:
        self.runs, self.settings = runs, settings
        self.curves = curves(runs, degree=settings.degree, after_warmups=settings.after_warmups)
        self.ended = runs
        if settings.extrapolate:
            self.ended = extrapolated_final_losses(runs, after_warmups=settings.after_warmups)
        sizes, self.levels, batches, steps = self._lines(np.ones(len(self.ended)), FEWEST)
        self.points = points_of(runs, self.curves)
        start = start_at(sizes, batches, steps, self.points.centre)
        _, self.stages = self._checked(start, "stages 1 to 3 leave")
        last = least_squares(start, self.points) if settings.joint else start
        self.q, self.constants = self._checked(last, "joint fit: joint=False may give a law, the joint fit leaves")

    def _lines(self, weights: Array, fewest: int) -> tuple[Line, list[Level], Line, Line]:
        sizes = size_line(self.ended, weights, fewest=fewest)
        levels = levels_of(self.curves, sizes, weights, self.settings.levels, self.settings.margin)
        batches = batch_line(levels)
        return sizes, levels, batches, step_line(self.runs, self.curves, sizes, batches, weights, self.settings.margin)

    def _checked(self, q: Array | None, what: str) -> tuple[Array, TrajectoryConstants]:
        constants = None if q is None else constants_of(q, self.points.centre)
        if q is None or constants is None:
            raise InputError(f"{what} no constants that are finite and > 0")
        return q, constants

    def drawn(self, draws: int, seed: int) -> tuple[Array, int]:
        """ln of the constants, one row a drawn table that could be fitted; and how many could not."""
        one_step = OneStep(self.q, self.points, len(self.runs))

        def statistic(rows: Rows) -> Sequence[float]:
            weights = np.bincount(rows, minlength=len(self.runs)).astype(np.float64)
            if self.settings.joint:
                q = one_step(weights)
            else:
                sizes, _, batches, steps = self._lines(weights, 2)
                q = start_at(sizes, batches, steps, self.points.centre)
            _, constants = self._checked(q, "a drawn table leaves")
            return [math.log(getattr(constants, name)) for name in NAMES]

        kinds = [(run.final_loss is None, not run.steps) for run in self.runs]
        values = bootstrap(statistic, range(len(self.runs)), within=kinds, draws=draws, seed=seed).values
        known = values[~np.isnan(values).any(axis=1)]
        return known, draws - len(known)

    def widening(self, coverage: float) -> tuple[float, ...]:
        """√(n/f)·t_f for each constant in turn and for a prediction, f = n - parameters; infinite without freedom."""
        if self.settings.joint:
            return (_student(len(self.runs), FREE, coverage),) * (FREE + 1)
        by_size = _student(sum(run.final_loss is not None for run in self.runs), 2, coverage)
        by_curve = _student(len(self.curves), 4, coverage)
        return by_size, by_size, by_curve, by_curve, by_curve, by_curve, max(by_size, by_curve)

    def deviation(self) -> float:
        fitted, _ = log_losses(self.q, self.points)
        return float(np.sqrt(np.mean((self.points.log_losses - fitted) ** 2)))


def _held_out(runs: Sequence[LossRun], found: _Fit, settings: _Settings) -> tuple[float | None, float | None, str]:
    """The largest model, how far its curves are predicted by the law without it, and why not."""
    largest = max(run.params for run in runs if run.steps)
    try:
        law = _Fit([run for run in runs if run.params < largest], settings)
    except InputError as error:
        return None, None, f"no model could be held out: {error}"
    mine = [curve for curve in found.curves if curve.log_params == math.log(largest)]
    points = points_of([], mine, law.points.centre)
    predicted, _ = log_losses(law.q, points)
    return largest, float(np.mean(np.abs(np.expm1(predicted - points.log_losses)))), ""


def _student(count: int, used: int, coverage: float) -> float:
    from scipy.special import stdtrit

    free = count - used
    return math.inf if free < 1 else math.sqrt(count / free) * float(stdtrit(free, 0.5 + coverage / 2))


def _ranges(kept: Sequence[Curve]) -> dict[str, Any]:
    def spanned(logs: Sequence[float]) -> tuple[float, float]:
        return math.exp(min(logs)), math.exp(max(logs))

    return {
        "params": spanned([curve.log_params for curve in kept]),
        "batch_tokens": spanned([curve.log_batch for curve in kept]),
        "losses": spanned([float(end) for curve in kept for end in (curve.smooth.min(), curve.smooth.max())]),
    }


def _check(runs: Sequence[LossRun], joint: bool, extrapolate: bool, degree: int | None, after_warmups: float) -> None:
    if not isinstance(runs, Sequence) or not all(isinstance(run, LossRun) for run in runs):
        raise InputError(f"runs must be a sequence of LossRun, got {runs!r:.80}")
    if extrapolate and not joint:
        raise InputError("extrapolate=True needs joint=True: the stages take final losses as measured")
    if degree is not None and not is_count(degree, 2):
        raise InputError(f"degree must be an integer of at least 2, or None, got {degree!r}")
    check_not_negative(after_warmups=after_warmups)
