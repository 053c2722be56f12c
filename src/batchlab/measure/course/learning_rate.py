"""Smith's range test (2018, arXiv 1803.09820): the learning rate rises during one short run, and its loss is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from batchlab.core.checks import check_count, holds, is_count
from batchlab.core.device import pick_device
from batchlab.core.errors import InputError
from batchlab.core.job import Job
from batchlab.core.random import derive_seed, preserved_generators, reseed
from batchlab.data.stream import SampleStream
from batchlab.measure.course.range_reading import ONE_CYCLE as ONE_CYCLE
from batchlab.measure.course.range_reading import Cycle as Cycle
from batchlab.measure.course.range_reading import RangeTest as RangeTest
from batchlab.measure.course.range_reading import Spacing as Spacing
from batchlab.measure.course.rate_search import RATIO as RATIO
from batchlab.measure.course.rate_search import Choice as Choice
from batchlab.measure.course.rate_search import Trial as Trial
from batchlab.measure.course.rate_search import choose as choose
from batchlab.measure.course.short_runs import loss_on, spread_evenly, train_on
from batchlab.measure.training_step import TrainingStep

LOW, HIGH, STEPS = 1e-6, 10.0, 100
SMOOTHING, STOP_FACTOR = 0.05, 4.0
_ABOVE = 3.0


def ramp(low: float, high: float, steps: int, spacing: Spacing = "geometric") -> list[float]:
    """Both ends included: low·(high/low)^(i/(steps - 1)), or low + (high - low)·i/(steps - 1) if "linear".

    >>> [round(rate, 6) for rate in ramp(0.001, 1.0, 4)]
    [0.001, 0.01, 0.1, 1.0]
    >>> ramp(1.0, 4.0, 4, "linear")
    [1.0, 2.0, 3.0, 4.0]
    """
    if not 0 < low < high < math.inf:
        raise InputError(f"low and high must satisfy 0 < low < high, got low={low!r}, high={high!r}")
    check_count(4, steps=steps)
    if spacing not in ("geometric", "linear"):
        raise InputError(f'spacing must be "geometric" or "linear", got {spacing!r}')
    shares = [i / (steps - 1) for i in range(steps)]
    if spacing == "linear":
        return [low + (high - low) * share for share in shares]
    return [low * (high / low) ** share for share in shares]


def range_test(
    update: Callable[[float], float],
    *,
    low: float = LOW,
    high: float = HIGH,
    steps: int = STEPS,
    smoothing: float = SMOOTHING,
    stop_factor: float = STOP_FACTOR,
    debias: bool = True,
    spacing: Spacing = "geometric",
    validate: Callable[[], float] | None = None,
) -> RangeTest:
    """Ramps the learning rate from `low` to `high` and reads where the loss falls, is least, and diverges.

    update: does one optimizer step at the rate given and returns the loss before it.
    smoothing: weight f of the newest loss in the moving average sₜ = f·lₜ + (1 - f)·sₜ₋₁, in (0, 1]. debias: start it
    at 0 and divide by 1 - (1 - f)^t, so that the first loss does not weigh more than others; False starts it at the
    first loss, as torch-lr-finder does. stop_factor: it ends when s passes so many times its least; Smith's 4 to 5.
    validate: returns the loss on validation data that stay the same, asked after each update; all readings are then
    of that loss. The average lags behind by some 1/f steps, and each reading with it; the first 1/f are not read,
    unless it ends before three more.

    A loss that may be 0 or negative has no such factor: the rise is measured from the least, in units of its size.
    What it does to a model is the caller's to undo: `restored` does. Raises `InputError` if the loss is not finite at
    the first step.
    """
    if not 0 < smoothing <= 1:
        raise InputError(f"smoothing must lie in (0, 1], got {smoothing!r}")
    if not stop_factor > 1:
        raise InputError(f"stop_factor must be > 1, got {stop_factor!r}")
    rates: list[float] = []
    losses: list[float] = []
    validation: list[float] = []
    smoothed: list[float] = []
    state, best, divergence = 0.0, math.inf, None
    for t, rate in enumerate(ramp(low, high, steps, spacing), start=1):
        loss = update(rate)
        read = validate() if validate is not None and math.isfinite(loss) else loss
        if not math.isfinite(read):
            if t == 1:
                raise InputError(f"the loss is {read} at the first step of the range test, learning rate {rate:g}")
            divergence = rate
            break
        if debias:
            state = smoothing * read + (1 - smoothing) * state
            value = state / (1 - (1 - smoothing) ** t)
        else:
            state = value = read if t == 1 else smoothing * read + (1 - smoothing) * state
        rates.append(rate)
        losses.append(loss)
        smoothed.append(value)
        if validate is not None:
            validation.append(read)
        best = min(best, value)
        if value > best + (stop_factor - 1) * abs(best):
            divergence = rate
            break
    first = math.ceil(1 / smoothing) - 1
    first = first if len(smoothed) >= first + 3 else 0
    least = min(range(first, len(smoothed)), key=smoothed.__getitem__)
    steepest = rates[_steepest(rates, smoothed, first, least, smoothing)]
    fall, noise = smoothed[first] - smoothed[least], _noise((validation or losses)[: first + 1], smoothing)
    return RangeTest(
        tuple(rates),
        tuple(losses),
        tuple(smoothed),
        steepest,
        rates[least],
        divergence,
        validation=tuple(validation),
        spacing=spacing,
        read_from=first,
        fell=fall > _ABOVE * noise,
    )


def _noise(losses: Sequence[float], smoothing: float) -> float:
    """Of the difference of two averages far apart, from losses whose differences from step to step are noise."""
    if len(losses) < 3:
        return 0.0
    variance = math.fsum((b - a) ** 2 for a, b in pairwise(losses)) / (2 * (len(losses) - 1))
    return math.sqrt(2 * variance * smoothing / (2 - smoothing))


def _steepest(rates: Sequence[float], smoothed: Sequence[float], first: int, least: int, smoothing: float) -> int:
    """Where the smoothed loss falls most per factor of the rate, from `first` to its minimum.

    By central differences over 1/f steps, as many as the average itself holds: over two, noise would be the steepest.
    """
    reach = min(max(1, round(0.5 / smoothing)), max(1, (least - first) // 2))
    falls = []
    for i in range(first + reach, least - reach + 1):
        factor = math.log(rates[i + reach] / rates[i - reach])
        falls.append(((smoothed[i + reach] - smoothed[i - reach]) / factor, i))
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
    spacing: Spacing = "geometric",
    momentum: tuple[float, float] | None = None,
    validation: int = 0,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> RangeTest:
    """`range_test` of a job at `batch_size`, on a fresh model in this process; the caller's generators are kept.

    momentum: (high, low) in [0, 1), cycled against the rate: it falls linearly over the steps from the first to the
    second; Adam's β₁ where the optimizer has betas. Smith's is (0.95, 0.85). None leaves the job's own.
    validation: so many validation examples, spread evenly over the data and the same at each step, are what is read;
    0 reads the training loss, which overstates the largest rate. The result holds for this batch size and decay.
    """
    if not (is_count(batch_size) and batch_size <= len(job.train)):
        raise InputError(f"batch_size must lie in 1..{len(job.train)}, the training examples, got {batch_size!r}")
    if not (is_count(validation, 0) and validation <= len(job.valid)):
        raise InputError(f"validation must lie in 0..{len(job.valid)}, the validation examples, got {validation!r}")
    momenta = [] if momentum is None else _falling(momentum, len(ramp(low, high, steps, spacing)))
    where = pick_device(device)
    with preserved_generators():
        step = TrainingStep(job, device=where, seed=seed)
        step.reset_optimizer()
        stream = SampleStream(len(job.train), derive_seed(seed, "stream"))
        done = 0

        def update(rate: float) -> float:
            nonlocal done
            reseed(derive_seed(seed, "update", done * batch_size))
            for group in step.optimizer.param_groups:
                group["lr"] = rate
            if momenta:
                set_momentum(step.optimizer, momenta[done])
            indices = stream.indices(done * batch_size, batch_size).tolist()
            done += 1
            return train_on(step, indices)

        fixed = spread_evenly(len(job.valid), validation)
        found = range_test(
            update,
            low=low,
            high=high,
            steps=steps,
            smoothing=smoothing,
            stop_factor=stop_factor,
            spacing=spacing,
            validate=(lambda: loss_on(job, step.model, fixed, batch_size, where)) if fixed else None,
        )
    return replace(found, momenta=tuple(momenta[: len(found.learning_rates)]))


def _falling(momentum: tuple[float, float], steps: int) -> list[float]:
    if not holds(lambda pair: len(pair) == 2 and 0 <= pair[1] <= pair[0] < 1, momentum):
        raise InputError(f"momentum must be (high, low) with 0 <= low <= high < 1, got {momentum!r}")
    high, low = momentum
    return [high - (high - low) * i / (steps - 1) for i in range(steps)]


def set_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Sets the momentum of every parameter group: "momentum", or β₁ of "betas".

    >>> optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    >>> set_momentum(optimizer, 0.85)
    >>> optimizer.param_groups[0]["betas"]
    (0.85, 0.999)
    """
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        elif "momentum" in group:
            group["momentum"] = momentum
        else:
            raise InputError(f"a cyclical momentum needs momentum or betas, {type(optimizer).__name__} has neither")
