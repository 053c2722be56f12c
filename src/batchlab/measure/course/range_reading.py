"""What a range test read, and the cycle that it suggests (Smith 2018, arXiv 1803.09820)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from batchlab.core.checks import check_count
from batchlab.core.jsonio import JsonNoun

ONE_CYCLE, MANY_CYCLES = 10.0, 4.0
_NOT_ABOVE_NOISE = "the loss did not fall above its noise: take more steps, a larger batch, or validation examples"

Spacing = Literal["geometric", "linear"]


@dataclass(frozen=True)
class Cycle(JsonNoun):
    """The ends of a cyclical learning rate, as a range test suggests them, and why.

    bracketed: whether the test saw the loss fall and turn up, so that `max_lr` is not merely an end of the ramp.
    """

    min_lr: float
    max_lr: float
    bracketed: bool
    reason: str


@dataclass(frozen=True)
class RangeTest(JsonNoun):
    """One ramp of the learning rate. learning_rates, losses: as far as it went; smoothed: what the readings are of.

    steepest: where the smoothed loss falls fastest per factor of the rate, before its minimum. minimum: where it is
    least. divergence: where it passed `stop_factor` times the least, or was not finite; None if it never did.
    validation: the validation loss after each update, where one was given; the readings are then of that. momenta:
    the momentum (or β₁) at each rate, where it was cycled. spacing: of the rates. read_from: the first step that is
    read, at which the average holds so many losses that one batch's luck is no reading. fell: whether the average fell
    from there to its least by more than three standard errors of its noise, that of the losses up to there.

    The point of divergence is not the stability limit: it depends on the speed of the ramp (a slower one never gives
    a larger stop under noise), and by a factor of several on the noise. `max_stable_lr` finds that limit.
    """

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    steepest: float
    minimum: float
    divergence: float | None
    validation: tuple[float, ...] = ()
    momenta: tuple[float, ...] = ()
    spacing: Spacing = "geometric"
    read_from: int = 0
    fell: bool = True

    @property
    def suggestion(self) -> float:
        """Where to start short runs: halfway between the steepest point and the minimum, in the logarithm.

        Where `fell` is false it is only where noise happened to be least.
        """
        return math.sqrt(self.steepest * self.minimum)

    @property
    def reason(self) -> str:
        """What was read, in a sentence."""
        end = "never diverged" if self.divergence is None else f"diverged at {self.divergence:.3g}"
        noise = "" if self.fell else f"; but {_NOT_ABOVE_NOISE}"
        return f"range test: falls fastest at {self.steepest:.3g}, least at {self.minimum:.3g}, {end}{noise}"

    def cycle(self, cycles: int = 1) -> Cycle:
        """The ends for `cycles` cycles of the learning rate, by Smith's rules.

        max_lr: the largest rate before the (validation) loss turns up, which is where it is least. min_lr: a tenth of
        that for one cycle (he uses a tenth or a twentieth), a quarter for several (a third or a quarter). It holds
        for the batch size and the weight decay of the test. A test of 100 updates at a high momentum understates
        max_lr on small networks; one that reads the training loss alone overstates it.
        """
        check_count(cycles=cycles)
        part = ONE_CYCLE if cycles == 1 else MANY_CYCLES
        what = "validation loss" if self.validation else "training loss"
        ended = self.divergence is None and self.minimum == self.learning_rates[-1]
        bracketed = self.fell and not ended and self.minimum > self.learning_rates[self.read_from]
        turn = f"the smoothed {what} turns up after {self.minimum:.3g}"
        if ended:
            turn = f"the smoothed {what} still fell at {self.minimum:.3g}, where the ramp ended: test higher rates"
        elif self.minimum == self.learning_rates[self.read_from]:
            turn = f"the smoothed {what} only rose from {self.minimum:.3g}, where the ramp began: test lower rates"
        elif not self.fell:
            turn = _NOT_ABOVE_NOISE
        overstated = "" if self.validation else "; read from training loss alone it is overstated"
        few = "one cycle" if cycles == 1 else f"{cycles} cycles"
        reason = f"max: {turn}{overstated}; min: 1/{part:g} of it, for {few}"
        return Cycle(self.minimum / part, self.minimum, bracketed, reason)
