"""A batch that grows at the start of a run by equal increments, as Megatron-LM's `rampup_batch_size` has it.

With K = (end - start)/increment increments over R examples or tokens, after n of them

    B(n) = start + ⌊K·(n/R)^p⌋·increment,    p = 1: linear, the increments at equal distances; and `end` from R on.
"""

from __future__ import annotations

import math

from batchlab.core.checks import as_count, check_positive
from batchlab.core.errors import InputError
from batchlab.schedule.batches.scheduled_batch import LrRule, ScheduledBatch


class BatchRamp(ScheduledBatch):
    """From `start` to `end` over the first `over` examples or tokens.

    start, end, increment: sizes of an update; `end` is reached in whole increments. increment: `multiple_of` if None.
    over: what is seen until `end` holds, in the unit of `StepFacts.seen`.
    power: p > 0; 1 is linear in what was seen. 0.5 rises fast at first and makes the size linear in updates, more or
        less; 2 starts slowly.
    multiple_of: sizes are rounded down to a multiple of it (micro-batch x ranks); start and end must be such.
        `asked(seen)` is the size before that.
    lr_rule, lr_batch: see `ScheduledBatch`; the default lr_batch is `end`, for which a run's rate is usually stated.

    The noise scale is small at the start of training, so that a small batch loses few updates there and saves data
    (McCandlish et al. 2018). Megatron counts samples and has no rate rule.

    >>> ramp = BatchRamp(256, 1024, over=6_000_000, increment=128)
    >>> [ramp.at(seen) for seen in (0, 999_999, 1_000_000, 5_999_999, 6_000_000)]
    [256, 256, 384, 896, 1024]
    """

    def __init__(
        self,
        start: int,
        end: int,
        *,
        over: int,
        increment: int | None = None,
        power: float = 1.0,
        multiple_of: int = 1,
        lr_rule: LrRule = "none",
        lr_batch: int | None = None,
    ) -> None:
        start, over, multiple_of = as_count(start=start), as_count(over=over), as_count(multiple_of=multiple_of)
        end = as_count(start, end=end)
        self.increment = multiple_of if increment is None else as_count(increment=increment)
        check_positive(power=power)
        if (end - start) % self.increment:
            raise InputError(f"increment must divide end - start = {end - start}, got {self.increment}")
        self.start, self.end, self.over, self.power = start, end, over, power
        chosen = end if lr_batch is None else lr_batch
        super().__init__(start, sizes=[start, end], multiple_of=multiple_of, lr_rule=lr_rule, lr_batch=chosen)

    def asked(self, seen: int) -> int:
        """The size before it is rounded down to a multiple of `multiple_of`."""
        seen = as_count(0, seen=seen)
        if seen >= self.over:
            return self.end
        turns = (self.end - self.start) // self.increment
        if self.power == 1:
            return self.start + turns * seen // self.over * self.increment
        return self.start + math.floor(turns * math.pow(seen / self.over, self.power)) * self.increment

    def at(self, seen: int) -> int:
        """The size of the next update after `seen`."""
        return self.asked(seen) // self.multiple_of * self.multiple_of

    def changes(self) -> list[tuple[int, int]]:
        """Every (seen, size) at which the size becomes another, the start at 0 among them."""
        found = [(0, self.start)]
        turns = (self.end - self.start) // self.increment
        for turn in range(1, turns + 1):
            seen = self._first(turn, turns)
            if (size := self.at(seen)) != found[-1][1]:
                found.append((seen, size))
        return found

    def _first(self, turn: int, turns: int) -> int:
        """The least `seen` at which so many increments are made."""
        if self.power == 1 or turn == turns:
            return -(-turn * self.over // turns)
        near = math.ceil(self.over * math.pow(turn / turns, 1 / self.power))
        wanted = self.start + turn * self.increment
        while near > 0 and self.asked(near - 1) >= wanted:
            near -= 1
        while self.asked(near) < wanted:
            near += 1
        return near


def falcon_mamba_ramp(*, increment: int = 128, multiple_of: int = 1) -> BatchRamp:
    """128 to 2048 sequences over the first 50e9 tokens, and the rate as √B (Falcon-Mamba-7B's model card).

    The card states 6.4e-4 for 2048 and "batch scaling": η/√B is constant along the ramp, so that the factor is 1/4 at
    its start. Thresholds count tokens. The card does not give the increment; 128 is batchlab's.

    >>> ramp = falcon_mamba_ramp()
    >>> ramp.at(0), ramp.lr_factor(128), ramp.at(50 * 10**9), ramp.lr_factor(2048)
    (128, 0.25, 2048, 1.0)
    """
    return BatchRamp(128, 2048, over=50 * 10**9, increment=increment, multiple_of=multiple_of, lr_rule="sqrt")
