"""L(N) of models whose loss has not flattened, by the shape of their curves: where training on was too dear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError
from batchlab.rules.fit.loss_runs import Array, Curve, LossRun, curves
from batchlab.rules.fit.trajectory_joint import least_squares, log_losses, points_of
from batchlab.rules.fit.trajectory_stages import FEWEST

_SHARES = (0.5, 0.8, 0.95)
_EXPONENTS = (0.4, 0.8)
_GROWTHS = (3.0, 6.0)


def extrapolated_final_losses(runs: Sequence[LossRun], *, after_warmups: float = 5.0) -> list[LossRun]:
    """The runs, and for each model size without a `final_loss` one more that has its extrapolated L(N).

    All curves at once, by least squares of ln L, with one L(N) for each size and S_c, α_S, B_*, α_B alike for all:

      L = L(N) + [(S_c/S)·(1 + B_*/(B·L^(1/α_B)))]^α_S

    So L(N) is what the law itself would have it. Where a run ends far above it, it is badly known: a loss measured
    where it had flattened is better, and the source has no other. Needs three batch sizes. Raises `InputError` where
    the curves do not tell.
    """
    check_positive(after_warmups=after_warmups)
    kept = curves(runs, degree=None, after_warmups=after_warmups)
    batches = len({curve.log_batch for curve in kept})
    if batches < FEWEST:
        raise InputError(f"stage 1 (model size): the curves tell final losses over {FEWEST} batch sizes, got {batches}")
    sizes = sorted({curve.log_params for curve in kept})
    found = _floors(kept, sizes)
    if found is None:
        raise InputError("stage 1 (model size): the curves tell no final losses, for no law meets them")
    largest = max(run.batch_tokens for run in runs)
    known = {math.log(run.params) for run in runs if run.final_loss}
    added = [
        LossRun(math.exp(size), largest, final_loss=math.exp(floor))
        for size, floor in zip(sizes, found, strict=True)
        if size not in known
    ]
    return [*runs, *added]


def _floors(kept: Sequence[Curve], sizes: Sequence[float]) -> Array | None:
    """ln L(N) of each size: the best of the least squares from a grid of starts."""
    points = points_of([], kept)
    of_run = {curve.place: sizes.index(curve.log_params) for curve in kept}
    points = points._replace(floor=np.eye(len(sizes))[[of_run[int(run)] for run in points.run]])
    least = [min(float(curve.log_losses.min()) for curve in kept if curve.log_params == size) for size in sizes]
    best, error = None, math.inf
    for share, exponent, growth in product(_SHARES, _EXPONENTS, _GROWTHS):
        floors = np.array(least) + math.log(share)
        height = math.log(math.exp(points.centre[2]) - share * math.exp(min(least)))
        start = np.array([*floors, height, exponent, float(points.log_batch.mean()), growth])
        found = least_squares(start, points)
        if found is None or not (found[[-3, -1]] > 0).all():
            continue
        missed = float(np.mean((points.log_losses - log_losses(found, points)[0]) ** 2))
        if missed < error:
            best, error = found[:-4], missed
    return best
