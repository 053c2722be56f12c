"""A good learning rate: Smith's range test (2018, arXiv 1803.09820), then short runs around what it brackets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from batchlab.core.device import pick_device
from batchlab.core.errors import InputError
from batchlab.core.job import Job
from batchlab.core.jsonio import JsonNoun
from batchlab.core.random import derive_seed, preserved_generators, reseed
from batchlab.data.fetch import fetch, to_device
from batchlab.data.stream import SampleStream
from batchlab.measure.training_step import TrainingStep

LOW, HIGH, STEPS = 1e-6, 10.0, 100
SMOOTHING, STOP_FACTOR = 0.05, 4.0
RATIO, MOST_WIDENINGS = 2.0, 6


@dataclass(frozen=True)
class RangeTest(JsonNoun):
    """One ramp of the learning rate. learning_rates, losses: as far as it went; smoothed: what the readings are of.

    steepest: where the smoothed loss falls fastest per factor of the rate, before its minimum. minimum: where it is
    least. divergence: where it passed `stop_factor` times the least, or was not finite; None if it never did.
    The point of divergence is not the stability limit: it depends on the speed of the ramp (a slower one never gives
    a larger stop under noise), and by a factor of several on the noise.
    """

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    steepest: float
    minimum: float
    divergence: float | None

    @property
    def suggestion(self) -> float:
        """Where to start short runs: halfway between the steepest point and the minimum, in the logarithm."""
        return math.sqrt(self.steepest * self.minimum)

    @property
    def reason(self) -> str:
        """What was read, in a sentence."""
        end = "never diverged" if self.divergence is None else f"diverged at {self.divergence:.3g}"
        return f"range test: falls fastest at {self.steepest:.3g}, least at {self.minimum:.3g}, {end}"


def ramp(low: float, high: float, steps: int) -> list[float]:
    """Geometric, both ends included: low·(high/low)^(i/(steps - 1)).

    >>> [round(rate, 6) for rate in ramp(0.001, 1.0, 4)]
    [0.001, 0.01, 0.1, 1.0]
    """
    if not 0 < low < high < math.inf:
        raise InputError(f"low and high must satisfy 0 < low < high, got low={low!r}, high={high!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 4:
        raise InputError(f"steps must be an integer of at least 4, got {steps!r}")
    return [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]


def range_test(
    update: Callable[[float], float],
    *,
    low: float = LOW,
    high: float = HIGH,
    steps: int = STEPS,
    smoothing: float = SMOOTHING,
    stop_factor: float = STOP_FACTOR,
    debias: bool = True,
) -> RangeTest:
    """Ramps the learning rate from `low` to `high` and reads where the loss falls, is least, and diverges.

    update: does one optimizer step at the rate given and returns the loss before it.
    smoothing: weight f of the newest loss in the moving average sₜ = f·lₜ + (1 - f)·sₜ₋₁, in (0, 1]. debias: start it
    at 0 and divide by 1 - (1 - f)^t, so that the first loss does not weigh more than others; False starts it at the
    first loss, as torch-lr-finder does. stop_factor: it ends when s passes so many times its least; Smith's 4 to 5.

    A loss that may be 0 or negative has no such factor: the rise is measured from the least, in units of its size.
    Raises `InputError` if the loss is not finite at the first step.
    """
    if not 0 < smoothing <= 1:
        raise InputError(f"smoothing must lie in (0, 1], got {smoothing!r}")
    if not stop_factor > 1:
        raise InputError(f"stop_factor must be > 1, got {stop_factor!r}")
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    state, best, divergence = 0.0, math.inf, None
    for t, rate in enumerate(ramp(low, high, steps), start=1):
        loss = update(rate)
        if not math.isfinite(loss):
            if t == 1:
                raise InputError(f"the loss is {loss} at the first step of the range test, learning rate {rate:g}")
            divergence = rate
            break
        if debias:
            state = smoothing * loss + (1 - smoothing) * state
            value = state / (1 - (1 - smoothing) ** t)
        else:
            state = value = loss if t == 1 else smoothing * loss + (1 - smoothing) * state
        rates.append(rate)
        losses.append(loss)
        smoothed.append(value)
        best = min(best, value)
        if value > best + (stop_factor - 1) * abs(best):
            divergence = rate
            break
    least = min(range(len(smoothed)), key=smoothed.__getitem__)
    return RangeTest(
        tuple(rates), tuple(losses), tuple(smoothed), rates[_steepest(smoothed, least)], rates[least], divergence
    )


def _steepest(smoothed: Sequence[float], least: int) -> int:
    """Where a geometric ramp's smoothed loss falls most per step, up to its minimum (central differences)."""
    falls = [(smoothed[i + 1] - smoothed[i - 1], i) for i in range(1, least) if i + 1 < len(smoothed)]
    return min(falls)[1] if falls else least


def lr_range(
    job: Job,
    *,
    batch_size: int = 64,
    low: float = LOW,
    high: float = HIGH,
    steps: int = STEPS,
    smoothing: float = SMOOTHING,
    stop_factor: float = STOP_FACTOR,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> RangeTest:
    """`range_test` of a job at `batch_size`, on a fresh model in this process; the caller's generators are kept.

    Read it on training loss only, so that it overstates the largest rate; it holds for this batch size and decay.
    """
    if not 1 <= batch_size <= len(job.train):
        raise InputError(f"batch_size must lie in 1..{len(job.train)}, the training examples, got {batch_size!r}")
    where = pick_device(device)
    with preserved_generators():
        step = TrainingStep(job, device=where, seed=seed)
        step.reset_optimizer()
        stream = SampleStream(len(job.train), derive_seed(seed, "stream"))
        position = 0

        def update(rate: float) -> float:
            nonlocal position
            reseed(derive_seed(seed, "update", position))
            for group in step.optimizer.param_groups:
                group["lr"] = rate
            indices = stream.indices(position, batch_size).tolist()
            position += batch_size
            loss = step.backward_on(to_device(fetch(job.train, indices, job.collate), where))
            step.step()
            return float(loss)

        return range_test(update, low=low, high=high, steps=steps, smoothing=smoothing, stop_factor=stop_factor)


@dataclass(frozen=True)
class Trial:
    """One short run: its learning rate and the loss it ended with; infinite or NaN where it diverged."""

    learning_rate: float
    loss: float


@dataclass(frozen=True)
class Choice:
    """The learning rate chosen among short runs. at_edge: it is the least or largest of those tried. why: how."""

    learning_rate: float
    trials: tuple[Trial, ...]
    at_edge: bool
    why: str


def choose(
    run: Callable[[float], float],
    start: float,
    *,
    ratio: float = RATIO,
    most: int = 3 + MOST_WIDENINGS,
    may_go_on: Callable[[], bool] = lambda: True,
) -> Choice:
    """Short runs at start·ratio^k, widened until the best has a worse one on each side; a parabola through the three.

    run: trains equally many examples at a learning rate and returns the loss; not finite where it diverged.
    start: the middle of the first three. most: the most runs; fewer where `may_go_on()`, asked before each but the
    first, says no.

    The parabola is in the logarithm of the rate, and of the loss where all three are positive; its vertex lies
    within half a ratio of the best. Where the runs end before the best is enclosed, it is taken and `at_edge` set.
    Raises `InputError` if every run diverged.
    """
    if most < 1:
        raise InputError(f"most must be at least 1, got {most!r}")
    if not (0 < start < math.inf and ratio > 1):
        raise InputError(f"start must be > 0 and ratio > 1, got start={start!r}, ratio={ratio!r}")
    losses: dict[int, float] = {}
    for _ in range(most):
        wanted = _next_exponent(losses)
        if wanted is None or (losses and not may_go_on()):
            break
        losses[wanted] = run(start * ratio**wanted)
    trials = tuple(Trial(start * ratio**k, loss) for k, loss in sorted(losses.items()))
    finite = {k: loss for k, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        tried = ", ".join(f"{trial.learning_rate:.3g}" for trial in trials)
        raise InputError(f"the loss is not finite at any learning rate that was tried: {tried}")
    best = min(finite, key=finite.__getitem__)
    if best - 1 in losses and best + 1 in losses:
        shift = _vertex(losses[best - 1], losses[best], losses[best + 1])
        why = f"least loss of {len(trials)} short runs, by a parabola in log rate"
        return Choice(start * ratio ** (best + shift), trials, False, why)
    return Choice(start * ratio**best, trials, True, f"least loss of {len(trials)} short runs, at the edge of them")


def _next_exponent(losses: dict[int, float]) -> int | None:
    """0, then whatever the best still lacks on either side; None when it is enclosed."""
    finite = {k: loss for k, loss in losses.items() if math.isfinite(loss)}
    if not losses:
        return 0
    best = min(finite, key=finite.__getitem__) if finite else min(losses)
    missing = [k for k in (best - 1, best + 1) if k not in losses]
    return missing[0] if missing else None


def _vertex(left: float, middle: float, right: float) -> float:
    """Where the parabola through (-1, left), (0, middle), (1, right) is least, middle being the least of the three."""
    if not (math.isfinite(left) and math.isfinite(right)):
        return 0.0
    if middle > 0:
        left, middle, right = math.log(left), math.log(middle), math.log(right)
    bend = left - 2 * middle + right
    return 0.5 * (left - right) / bend if bend > 0 else 0.0
