"""Updates to the target at any batch size, from one reference run and the noise scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, Facts
from batchlab.rules.tradeoff import steps_ratio

METHOD = (
    "trade-off law from one reference run; the interval carries the noise scale's own and the spacing of the "
    "reference's evaluations, not the spread between seeds"
)


@dataclass(frozen=True)
class Prediction:
    """S(B) = S(B₀)·(1 + B_crit/B)/(1 + B_crit/B₀), at least 1. Sizes in examples.

    b_crit: the noise scale; infinite where that is undefined or not positive (`noise_known` is False then).
    b_crit_low, b_crit_high: its interval; 0 and infinity where the data do not bound it.
    base_steps: S(B₀) at `base_batch_size`; base_steps_low: one more than the last evaluation that missed the target.
    reached: whether the reference met the target. If not, its length stands in for S(B₀), a lower bound.
    """

    base_batch_size: int
    base_steps: float
    base_steps_low: float
    b_crit: float
    b_crit_low: float
    b_crit_high: float
    coverage: float
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
        to_base = steps_ratio(facts.base_batch_size, run.batch_size, b_crit=b_crit)
        return cls(
            base_batch_size=facts.base_batch_size,
            base_steps=steps * to_base,
            base_steps_low=(missed + 1) * to_base,
            b_crit=b_crit,
            b_crit_low=noise.low if noise.low > 0 else 0.0,
            b_crit_high=noise.high if noise.high > 0 else math.inf,
            coverage=noise.coverage,
            noise_known=noise_known,
            reached=run.steps_to_target is not None,
        )

    def steps(self, batch_size: int) -> float:
        """S(B), the point prediction."""
        return max(1.0, self.base_steps * steps_ratio(batch_size, self.base_batch_size, b_crit=self.b_crit))

    def estimate(self, batch_size: int) -> Estimate:
        """S(B) with its interval: S is monotone in B_crit, so the interval's ends give its ends."""
        ends = [
            steps_ratio(batch_size, self.base_batch_size, b_crit=end) for end in (self.b_crit_low, self.b_crit_high)
        ]
        value = self.steps(batch_size)
        low = min(value, max(1.0, self.base_steps_low * min(ends)))
        return Estimate(value, low, max(value, self.base_steps * max(ends)), METHOD, self.coverage)
