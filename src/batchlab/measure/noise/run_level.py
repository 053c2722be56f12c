"""The critical batch size of a whole run from the noise along it (McCandlish et al. 2018, section 2.3 and D.1).

With s the noise-free steps, a run takes S = ∫(1 + 𝓑/B) ds updates and E = ∫(𝓑 + B) ds examples, so that
B_crit = E_min/S_min = ∫𝓑 ds/∫ds. An update at batch B is ds = 1/(1 + 𝓑/B) = |G|²/E|g_B|² of a step, and with
𝓑 = tr(Σ)/|G|² the integrals are sums over the updates t of a run:

    B_crit = Σ tr(Σ)_t/q_t / Σ |G|²_t/q_t,    q_t = E|g_B|² at update t.

No division by an estimate of |G|², which may be negative: q is positive, and smoothed over neighbouring updates.
"""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.measure.noise.noise_pair import NoisePair
from batchlab.measure.ratio import RatioOfMeans

REACH = 6


def run_level(
    runs: Sequence[Sequence[NoisePair]], batch_size: int, *, reach: int = REACH, coverage: float = 0.95
) -> Estimate:
    """B_crit in examples from the pairs of each update of one or more runs at `batch_size`, with its interval.

    runs: the pairs in order, without gaps, of runs of the same job from different seeds; they are pooled. reach: q_t is
    the mean of |G|² + tr(Σ)/batch_size over the updates t - reach .. t + reach but t itself, whose own noise would
    bias the sums; the default 6 is batchlab's. A run of one update says nothing.

    The interval is Fieller's over updates taken as independent. It holds the sampling noise of the gradients, not the
    difference between seeds, learning rates, or B_simple and the noise scale with the Hessian in it.

    >>> run_level([[NoisePair(1.0, 64.0) for t in range(40)]], 32).value
    64.0
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size!r}")
    if reach < 1:
        raise InputError(f"reach must be at least 1, got {reach!r}")
    ratio = RatioOfMeans(coverage=coverage)
    for pairs in runs:
        powers = [pair.grad_sq + pair.trace / batch_size for pair in pairs]
        for t, pair in enumerate(pairs):
            near = powers[max(0, t - reach) : t] + powers[t + 1 : t + reach + 1]
            if near and (power := sum(near) / len(near)) > 0:
                ratio.update(pair.trace / power, pair.grad_sq / power)
    estimate = ratio.ratio(lowest=0.0)
    method = f"run-level noise scale of {len(runs)} runs at batch {batch_size}: ∫ 𝓑 ds / ∫ ds, {estimate.method}"
    return Estimate(estimate.value, estimate.low, estimate.high, method, coverage)
