"""Updates to the target at any batch size, from the reference runs and the noise scale.

A new run differs from the prediction by the noise scale's error, which grows with the distance from the base batch,
and by its seed's luck, which does not. ln S of the k reference runs taken as normal, with deviation s, a new one lies
within t·s·√(1 + π/2k) of their median, t Student's quantile with k - 1 degrees of freedom and π/2 what a median varies
more than a mean; the two errors are independent, so their widths in ln S add up as squares. With fewer than three runs
s is taken as 0.15, with the normal's quantile: what it was for the digits job over batch sizes from 8 to 1024
(`benchmarks/verify.py`), and said to be an assumption.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, Facts
from batchlab.rules.tradeoff import steps_ratio

FEWEST_SEEDS = 3
LAW = "trade-off law from the reference; the interval carries the noise scale's own"
ASSUMED_DEVIATION = 0.15
SPREAD, ASSUMED = (
    "and the spread of {} seeds",
    "and an assumed spread between seeds of 15 %, for too few met the target",
)


@dataclass(frozen=True)
class Prediction:
    """S(B) = S(B₀)·(1 + B_crit/B)/(1 + B_crit/B₀), at least 1. Sizes in examples.

    b_crit: the noise scale; infinite where that is undefined or not positive (`noise_known` is False then).
    b_crit_low, b_crit_high: its interval; 0 and infinity where the data do not bound it.
    base_steps: S(B₀) at `base_batch_size`; base_steps_low: one more than the last evaluation that missed the target.
    spread: the factor by which a new seed's steps may differ at `coverage`. seeds: whose steps tell.
    reached: whether the reference met the target. If not, its length stands in for S(B₀), a lower bound.
    """

    base_batch_size: int
    base_steps: float
    base_steps_low: float
    b_crit: float
    b_crit_low: float
    b_crit_high: float
    coverage: float
    spread: float
    seeds: int
    noise_known: bool
    reached: bool

    @classmethod
    def of(cls, facts: Facts) -> Prediction:
        """What `facts` say of steps against batch size."""
        noise, run = facts.noise_scale, facts.reference
        noise_known = noise.defined and noise.value > 0
        b_crit = noise.value if noise_known else math.inf
        steps = run.steps if run.steps_to_target is None else run.steps_to_target
        if steps < 1:
            raise InputError("the target is met before any training: choose a harder target")
        missed = max((step for step, _ in run.evaluations if step < steps), default=0)
        seeds = [count for count in run.steps_by_seed if count]
        to_base = steps_ratio(facts.base_batch_size, run.batch_size, b_crit=b_crit)
        return cls(
            base_batch_size=facts.base_batch_size,
            base_steps=steps * to_base,
            base_steps_low=(missed + 1) * to_base,
            b_crit=b_crit,
            b_crit_low=noise.low if noise.low > 0 else 0.0,
            b_crit_high=noise.high if noise.high > 0 else math.inf,
            coverage=noise.coverage,
            spread=_spread(seeds, noise.coverage),
            seeds=len(seeds),
            noise_known=noise_known,
            reached=run.steps_to_target is not None,
        )

    def steps(self, batch_size: float) -> float:
        """S(B), the point prediction."""
        return max(1.0, self.base_steps * steps_ratio(batch_size, self.base_batch_size, b_crit=self.b_crit))

    def estimate(self, batch_size: float) -> Estimate:
        """S(B) with the interval that a run with a new seed falls into. S is monotone in B_crit: its ends give ends."""
        ends = [
            steps_ratio(batch_size, self.base_batch_size, b_crit=end) for end in (self.b_crit_low, self.b_crit_high)
        ]
        value = self.steps(batch_size)
        low, high = min(value, self.base_steps_low * min(ends)), max(value, self.base_steps * max(ends))
        luck = SPREAD.format(self.seeds) if self.seeds >= FEWEST_SEEDS else ASSUMED
        down, up = _both(value / low, self.spread), _both(high / value, self.spread)
        return Estimate(value, min(value, max(1.0, value / down)), value * up, f"{LAW}, {luck}", self.coverage)


def _spread(steps: Sequence[int], coverage: float) -> float:
    """exp(t·s·√(1 + π/2k)) of k runs' steps; s and t as assumed for fewer than three."""
    from scipy.special import ndtri, stdtrit

    k, place = max(1, len(steps)), 0.5 + coverage / 2
    deviation, quantile = ASSUMED_DEVIATION, float(ndtri(place))
    if k >= FEWEST_SEEDS:
        deviation, quantile = statistics.stdev(map(math.log, steps)), float(stdtrit(k - 1, place))
    return math.exp(quantile * deviation * math.sqrt(1 + math.pi / 2 / k))


def _both(first: float, second: float) -> float:
    """Two factors of independent errors as one."""
    return math.exp(math.hypot(math.log(first), math.log(second)))
