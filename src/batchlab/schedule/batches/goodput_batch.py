"""The batch of the most progress a second: goodput = throughput x statistical efficiency (Pollux, Qiao et al. 2021).

With t(B) = t₀ + t₁·B seconds an update and the noise scale φ, an update at B does as much as (φ + B₀)/(φ + B)·B/B₀
updates at B₀ (AdaScale's gain, Johnson et al. 2020), so that

    goodput(B) = B/(t₀ + t₁·B) · (φ + B₀)/(φ + B)    examples a second, each worth one at B₀

whose maximum is B = √(φ·t₀/t₁), whatever B₀: the noise-scale batch √(r·φ) at the exchange rate r = t₀/t₁, the size at
which half of the limiting speed is reached. AdaptDL, Pollux's code, fits seven parameters over nodes and replicas and
searches 50 sizes; here the machines stay, and a line has a maximum in closed form. Side by side on two replicas (its
commit 542e123, 300 random settings) its batch is within 11 % of this one, its grid's half step, and its goodput never
above this one's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from batchlab.core.checks import as_count, check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.schedule.batches.controller import ANY_SIZE, BatchController, StepFacts

KEPT, FEWEST, SIZES = 32, 5, 16


class GoodputBatch(BatchController):
    """Moves the batch towards the size of the most goodput on this machine, from what its own updates took.

    batch_size, minimum, maximum, multiple_of: see `BatchController`. Give as maximum what fits in memory (or has been
    timed with accumulation), and what still generalises.
    deadband √2, growth 2, patience 20: as in `NoiseScaleBatch`, and batchlab's. Goodput is flat at its top: at √2 from
    it, at most 3 % are lost.
    explore: the line needs sizes this factor apart, or as far as the bounds let it move; the default is 2.

    Reads `noise_scale` and `seconds`. It times every update at the size it had; the first at another size than before
    is left out (buffers, compilation). The last 32 times of each of the 16 sizes last used are kept, and their medians
    make the line, from 5 times on. Exploration is one move, or few: while the timed sizes are not `explore` apart it
    goes to the next size beyond them, upwards where the noise scale is above the present size; AdaptDL instead takes
    half of the time for fixed. From then on only the rule moves it, and every size it comes to sharpens the line. Where
    the line does not rise, the maximum is wanted; where it has no fixed part, the minimum; both within `growth`, so
    that the next fit can take it back.

    Ranks time differently: give `facts.agreed()`. `seconds` must be of the whole update, with the device idle at its
    ends (`torch.cuda.synchronize`), and without evaluation or checkpoints. The goal is time: on one kind of machine
    paid by the hour, cost too. It depends on the clock, so a run repeats only by chance. The learning rate must move
    with the batch, by `rules.learning_rate.saturating` for AdaScale's gain.

    >>> from batchlab.core.facts import Estimate
    >>> control = GoodputBatch(64, maximum=1024, patience=7)
    >>> noise, size, sizes = Estimate(1000.0, 900.0, 1100.0, "example"), 64, []
    >>> for step in range(40):
    ...     facts = StepFacts(0, size, noise_scale=noise, seconds=0.5 + 0.002 * size)
    ...     size = control.next_batch(step, facts)
    >>> size, round(best_batch(1000.0, fixed=0.5, per_example=0.002))
    (500, 500)
    """

    needs = frozenset({"noise_scale", "seconds"})

    def __init__(
        self,
        batch_size: int,
        *,
        maximum: int,
        minimum: int = 1,
        multiple_of: int = 1,
        deadband: float = math.sqrt(2.0),
        growth: float = 2.0,
        patience: int = 20,
        explore: float = 2.0,
    ) -> None:
        limits = {"growth": growth, "deadband": deadband}
        super().__init__(
            batch_size, minimum=minimum, maximum=maximum, multiple_of=multiple_of, patience=patience, **limits
        )
        check_count(FEWEST + 1, patience=patience)
        check_positive(explore=explore)
        if not explore > deadband:
            raise InputError(f"explore must be above deadband {deadband:g}, or it never moves, got {explore!r}")
        self.explore = explore
        self._times: dict[int, list[float]] = {}  # the size last used is the last
        self._before: int | None = None

    def note(self, step: int, facts: StepFacts) -> None:
        """Keeps the time of an update whose size is that of the one before."""
        if facts.seconds is None or not 0 < facts.seconds < math.inf:
            return
        size = int(facts.batch)
        settled, self._before = size == self._before, size
        if settled:
            self._times[size] = [*self._times.pop(size, []), float(facts.seconds)][-KEPT:]
            while len(self._times) > SIZES:
                del self._times[next(iter(self._times))]

    def wanted(self, step: int, facts: StepFacts) -> float | None:
        """The size of the most goodput, or one to be timed; None while the noise scale or a time is not known."""
        if facts.noise_scale is None or not 0 < facts.noise_scale.value < math.inf:
            return None
        timed = sorted(self.times())
        if not timed:
            return None
        low, high, noise = timed[0], timed[-1], facts.noise_scale.value
        if high / low < self.explore:
            up, down = high * self.deadband <= self.maximum, low / self.deadband >= self._lowest
            if up and (noise >= self.batch_size or not down):
                return min(max(high * self.explore, high + self.multiple_of), self.maximum)
            if down:
                return low / self.explore
        if low == high:
            return None
        fixed, per_example = self.line()
        if per_example <= 0:
            return ANY_SIZE
        return self._lowest if fixed <= 0 else best_batch(noise, fixed=fixed, per_example=per_example)

    def times(self) -> dict[int, float]:
        """The median seconds of an update at each size that was timed often enough."""
        return {size: median(times) for size, times in self._times.items() if len(times) >= FEWEST}

    def line(self) -> tuple[float, float]:
        """t₀, seconds, and t₁, seconds an example, of the timed sizes; NaN with fewer than two."""
        return step_time_line(self.times())

    def rule_state(self) -> dict[str, Any]:
        """The times of each size, in the order of use."""
        return {"times": [[size, list(times)] for size, times in self._times.items()], "before": self._before}

    def load_rule_state(self, state: dict[str, Any]) -> None:
        """Takes over the times. On another machine, or other ranks, they no longer hold: `forget` them."""
        if not {"times", "before"} <= set(state):
            raise InputError(f"the state must hold times and before, got {sorted(state)}")
        before = state["before"]
        try:
            found = {as_count(times=size): [float(t) for t in times] for size, times in state["times"]}
            check_positive(times=1.0, **{f"times[{size}]": t for size, times in found.items() for t in times})
            self._before = None if before is None else as_count(before=before)
        except (TypeError, ValueError) as error:  # InputError is one
            raise InputError(f"times must be pairs of a size and its seconds, before a size: {error}") from error
        self._times = found

    def forget(self) -> None:
        """Drops all times, and so explores anew: after a move to other machines or a change of what an update does."""
        self._times, self._before = {}, None


def step_time_line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """(t₀, t₁) by least squares with weights 1/t: the point estimates of `fit_step_time`, in plain floats.

    >>> step_time_line({1: 3.0, 2: 5.0, 4: 9.0})
    (1.0, 2.0)
    """
    if len(seconds) < 2:
        return math.nan, math.nan
    total = math.fsum(1 / t for t in seconds.values())
    mean = math.fsum(size / t for size, t in seconds.items()) / total
    level = len(seconds) / total  # Σ t·(1/t) of Σ 1/t
    squares = math.fsum((size - mean) ** 2 / t for size, t in seconds.items())
    slope = math.fsum((size - mean) * (t - level) / t for size, t in seconds.items()) / squares
    return level - slope * mean, slope


def best_batch(noise_scale: float, *, fixed: float, per_example: float) -> float:
    """√(φ·t₀/t₁), in the unit of the noise scale. fixed: t₀, seconds. per_example: t₁, seconds an example."""
    check_positive(noise_scale=noise_scale, fixed=fixed, per_example=per_example)
    return math.sqrt(noise_scale * (fixed / per_example))


def goodput(
    batch: float, *, noise_scale: float, fixed: float, per_example: float, base_batch: float | None = None
) -> float:
    """B/(t₀ + t₁·B)·(φ + B₀)/(φ + B): examples a second, each counted by what it is worth at B₀.

    base_batch: B₀; None for the limit of small batches, where an example is worth most, B₀ = 0.

    >>> round(goodput(500, noise_scale=1000, fixed=0.5, per_example=0.002), 2)
    222.22
    """
    check_positive(batch=batch, noise_scale=noise_scale, fixed=fixed, per_example=per_example)
    worth = 1 / (1 + batch / noise_scale)
    if base_batch is not None:
        check_positive(base_batch=base_batch)
        worth *= 1 + base_batch / noise_scale
    return batch / (fixed + per_example * batch) * worth
