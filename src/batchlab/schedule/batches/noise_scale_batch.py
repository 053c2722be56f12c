"""The batch that follows the noise scale: B(s) = √(r·𝓑(s)) (McCandlish et al. 2018, appendix D), with hysteresis."""

from __future__ import annotations

import math

from batchlab.core.checks import check_positive
from batchlab.rules.tradeoff import adaptive_batch_size
from batchlab.schedule.batches.controller import BatchController, StepFacts


class NoiseScaleBatch(BatchController):
    """Moves the batch size towards √(r·𝓑) when the measured noise scale 𝓑 has clearly left it.

    batch_size: where it starts, in examples. exchange_rate: r, examples worth paying to save one update;
    r = B₀²/𝓑₀ keeps the planned batch B₀ while 𝓑 is at its planned 𝓑₀ (`rules.tradeoff.exchange_rate`).
    minimum, maximum, multiple_of: see `BatchController`.
    deadband: nothing changes while the wanted size is within this factor of the present one (default √2).
    growth: the most one change multiplies or divides by (default 2).
    patience: updates between two changes, so that the noise average can follow (default 20). The three are batchlab's.

    Reads `noise_scale`. An undefined, non-finite or non-positive estimate changes nothing. √(r·𝓑) costs the least
    S + E/r over a run of S updates and E examples, if the learning rate moves with the batch. The gain over the best
    constant batch is small: where 𝓑 grows as √s, 4 % of (S/S_min - 1)(E/E_min - 1), which is 1 % of S + E/r. A deadband
    of √2 gives that 1 % away again, one of 1.1 keeps nine tenths of it but follows the estimate's own noise. What it
    buys is that 𝓑 need not be known in advance. Not where 𝓑 cannot be measured (one piece an update), nor with a data
    set not much larger than 𝓑.

    >>> from batchlab.core.facts import Estimate
    >>> control = NoiseScaleBatch(64, exchange_rate=64.0, minimum=8, maximum=512, patience=1)
    >>> control.next_batch(1, StepFacts(64, 64, noise_scale=Estimate(1024.0, 900.0, 1100.0, "example")))
    128
    >>> control.next_batch(2, StepFacts(192, 128))
    128
    """

    needs = frozenset({"noise_scale"})

    def __init__(
        self,
        batch_size: int,
        *,
        exchange_rate: float,
        maximum: int,
        minimum: int = 1,
        multiple_of: int = 1,
        deadband: float = math.sqrt(2.0),
        growth: float = 2.0,
        patience: int = 20,
    ) -> None:
        limits = {"growth": growth, "deadband": deadband}
        super().__init__(
            batch_size, minimum=minimum, maximum=maximum, multiple_of=multiple_of, patience=patience, **limits
        )
        check_positive(exchange_rate=exchange_rate)
        self.exchange_rate = exchange_rate

    def wanted(self, step: int, facts: StepFacts) -> float | None:
        """√(r·𝓑), in examples."""
        if facts.noise_scale is None or not 0 < facts.noise_scale.value < math.inf:
            return None
        return adaptive_batch_size(facts.noise_scale.value, exchange_rate=self.exchange_rate)
