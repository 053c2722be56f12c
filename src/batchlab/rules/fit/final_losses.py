"""L(N) of models whose loss has not flattened, from the shape of all curves: where training on was too dear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from batchlab.core.checks import check_not_negative
from batchlab.core.errors import InputError
from batchlab.rules.fit.loss_runs import LossRun, curves
from batchlab.rules.fit.trajectory_joint import Points, constants_of, least_squares, log_losses, points_of
from batchlab.rules.fit.trajectory_stages import FEWEST, STAGES
from batchlab.rules.law_loss import TrajectoryConstants

_SHARES, _SIZE_EXPONENTS, _STEP_EXPONENTS, _GROWTHS = (0.5, 0.8, 0.95), (0.03, 0.1, 0.3), (0.4, 0.8), (3.0, 6.0)


def extrapolated_final_losses(runs: Sequence[LossRun], *, after_warmups: float = 5.0) -> list[LossRun]:
    """The runs, and for each model size without a `final_loss` one more that has its extrapolated L(N).

    L(N) is what the law itself makes of the curves, least squares of ln L over all points from a grid of starts:

      L = (N_c/N)^α_N + [(S_c/S)·(1 + B_*/(B·L^(1/α_B)))]^α_S

    Final losses that were measured count as points. Where the runs end far above L(N), it is badly known, though the
    curves in between may be well predicted: a loss measured where it had flattened is better, and the source has no
    other. Not one L(N) for each size by itself: that takes the misfit of one model for its floor.

    Needs three sizes and three batch sizes. Raises `InputError` where no law meets the curves.
    """
    check_not_negative(after_warmups=after_warmups)
    kept = curves(runs, degree=None, after_warmups=after_warmups)
    for name, values in (("params", {run.params for run in runs}), ("batch sizes", {each.log_batch for each in kept})):
        if len(values) < FEWEST:
            raise InputError(f"{STAGES[0]}: final losses are extrapolated over {FEWEST} {name}, got {len(values)}")
    points = points_of(runs, kept)
    found = _law(points)
    if found is None:
        raise InputError(f"{STAGES[0]}: the curves tell no final losses, for no law with constants > 0 meets them")
    known = {run.params for run in runs if run.final_loss}
    largest = max(run.batch_tokens for run in runs)
    return [*runs] + [
        LossRun(params, largest, final_loss=(found.N_c / params) ** found.alpha_N)
        for params in sorted({run.params for run in runs} - known)
    ]


def _law(points: Points) -> TrajectoryConstants | None:
    """The best of the least squares from a grid of starts."""
    best, least = None, math.inf
    lowest, middle = float(points.log_losses.min()), points.centre[2]
    batch = float(points.log_batch[np.isfinite(points.log_batch)].mean())
    for share, size, step, growth in product(_SHARES, _SIZE_EXPONENTS, _STEP_EXPONENTS, _GROWTHS):
        height = math.log(math.exp(middle) - share * math.exp(lowest))
        start = np.array([lowest + math.log(share), size, height, step, batch, growth])
        q = least_squares(start, points)
        constants = None if q is None else constants_of(q, points.centre)
        if q is None or constants is None:
            continue
        error = float(np.mean((points.log_losses - log_losses(q, points)[0]) ** 2))
        if error < least:
            best, least = constants, error
    return best
