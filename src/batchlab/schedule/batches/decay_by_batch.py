"""A batch that grows where the learning rate would have been decayed (Smith, Kindermans, Ying and Le 2018).

arXiv 1711.00489: what a decay of the rate does is to lower the noise of the updates, η/B for SGD, and a larger batch
does that too, in fewer updates of the same examples. With a schedule's share f(n) of the peak rate after n examples,

    B(n) = B₀·f(n)^-p       p = 1 holds η/B as the decay would have it (SGD), p = 2 holds η/√B (Adam's)

and the rate that the decay leaves, η·f(n), times (B/B₀)^(1/p) stays at the peak. A linear decay to 0 becomes half as
many updates with p = 1, a third with p = 2. The paper multiplies at milestones, up to a fixed size; here B stays below
`headroom` times the measured noise scale 𝓑, beyond which examples are lost, and where that holds it the rate decays.
With headroom None nothing is measured, and it is the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError
from batchlab.schedule.batches.controller import ANY_SIZE, BatchController, StepFacts


class DecayByBatch(BatchController):
    """Grows the batch in place of a decay of the learning rate, as far as the noise scale allows; it never shrinks.

    batch_size: B₀, of the run's start. share: f, the schedule's share of the peak after so many examples, warm-up left
    out; `lr_factor` of `schedule.by_examples`, say. exponent: p, 1 for SGD, 2 for Adam-like optimizers. headroom: B is
    at most so many noise scales; 1 by default, at which an example is worth half of one in a small batch. None: up to
    `maximum`, which must then be chosen with a noise scale in mind.
    maximum, multiple_of, growth, deadband, patience: see `BatchController`; a change needs 10 % and 5 updates.

    The learning rate must move with the batch by the rule that goes with p, linear or square root, and keep its own
    schedule: together they make it constant while the batch grows. Reads `noise_scale`, unless headroom is None; until
    that is known nothing grows. Not for a schedule that does not fall, nor where the batch begins near the noise scale.

    >>> from batchlab.core.facts import Estimate
    >>> control = DecayByBatch(64, share=lambda seen: 1 - seen / 10_000, exponent=1.0, maximum=1024, patience=1)
    >>> noise = Estimate(300.0, 250.0, 350.0, "example")
    >>> [control.next_batch(1, StepFacts(seen, 64, noise_scale=noise)) for seen in (0, 5_000, 9_000)]
    [64, 128, 256]
    """

    def __init__(
        self,
        batch_size: int,
        *,
        share: Callable[[float], float],
        exponent: float,
        maximum: int,
        headroom: float | None = 1.0,
        deadband: float = 1.1,
        growth: float = 2.0,
        patience: int = 5,
        **limits: Any,
    ) -> None:
        super().__init__(batch_size, maximum=maximum, deadband=deadband, growth=growth, patience=patience, **limits)
        check_positive(exponent=exponent)
        if not callable(share):
            raise InputError(f"share must be a function of the examples seen, got {share!r}")
        if headroom is not None:
            check_positive(headroom=headroom)
        self.needs = frozenset() if headroom is None else frozenset({"noise_scale"})
        self.base, self.share, self.exponent, self.headroom = self.batch_size, share, exponent, headroom

    def wanted(self, step: int, facts: StepFacts) -> float | None:
        """B₀·f^-p or what the noise scale allows, and no less than the present size."""
        share = self.share(facts.seen)
        decayed = share**self.exponent if share > 0 else share
        size = ANY_SIZE if decayed <= 0 else min(self.base / decayed, ANY_SIZE)
        if self.headroom is not None:
            noise = facts.noise_scale
            if noise is None or not 0 < noise.value < math.inf:
                return None
            size = min(size, self.headroom * noise.value)
        return max(size, float(self.batch_size))
