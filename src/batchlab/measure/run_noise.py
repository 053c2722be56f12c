"""The noise scale of a whole run, the one that predicts its critical batch size (McCandlish et al. 2018, appendix D).

At noise-free steps s a run at batch B takes S = ∫(1 + 𝓑/B)ds updates, so that B_crit = ∫𝓑ds / ∫ds. An update is
ds = dS/(1 + 𝓑/B) of a noise-free step, and 1/(1 + 𝓑/B) = |G|²/E|g_B|². With E|g_B|² = q(S) along the run,

    B_crit = Σ tr(Σ)/q  /  Σ |G|²/q   over updates,

a ratio of sums of what each update measures without bias: no update's own ratio, and no window's, is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.measure.noise import NoisePair
from batchlab.measure.ratio import RatioOfMeans

HALF_WINDOW = 6
SKIPPED = 2


def run_noise_scale(
    runs: Sequence[Sequence[NoisePair]], batch_size: int, *, coverage: float = 0.95, half_window: int = HALF_WINDOW
) -> Estimate:
    """B_crit in examples, pooled over runs of one job at one batch size and learning rate.

    runs: of each run the pairs of its updates, in order, up to where it met its target; the first two updates, of
    which little can be averaged, are left out. q is the mean of |G|² + tr(Σ)/B over `half_window` updates on either
    side, fewer at the ends. The interval is Fieller's over updates taken as independent: it carries the scatter of
    the measurement, not what another learning rate or seed would change.

    >>> still = [NoisePair(grad_sq=1.0, trace=50.0)] * 10
    >>> run_noise_scale([still], 64).value
    50.0
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size!r}")
    ratio = RatioOfMeans(coverage=coverage)
    for run in runs:
        pairs = run[SKIPPED:]
        squares = [pair.grad_sq + pair.trace / batch_size for pair in pairs]
        for t, pair in enumerate(pairs):
            around = squares[max(0, t - half_window) : t + half_window + 1]
            q = sum(around) / len(around)
            if q > 0:
                ratio.update(pair.trace / q, pair.grad_sq / q)
    estimate = ratio.ratio(lowest=0.0)
    runs_used = f"{len(runs)} runs" if len(runs) > 1 else "1 run"
    return dataclasses.replace(estimate, method=f"run-level tr(Σ)/|G|² over {runs_used}, {estimate.method}")
