"""`Estimate` and `Facts`: what was measured of a job on this machine, each number with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from batchlab.core.checks import check_inside
from batchlab.core.errors import InputError
from batchlab.core.job import Target
from batchlab.core.jsonio import JsonNoun

SCHEMA = 1


@dataclass(frozen=True)
class Estimate(JsonNoun):
    """A number with its interval and how it was got.

    value: the point estimate; NaN where it is undefined, and then `method` says why.
    low, high: the interval at `coverage`; infinite where the data do not bound it.
    method: how it was got, in a few words.
    coverage: the share of repetitions in which the interval holds the truth, 0 to 1.

    >>> Estimate(64.0, 40.0, 110.0, "micro-batch norms, 200 steps")
    Estimate(64 [40, 110], 95 %, micro-batch norms, 200 steps)
    """

    value: float
    low: float
    high: float
    method: str
    coverage: float = 0.95

    def __post_init__(self) -> None:
        check_inside(coverage=self.coverage)
        if self.low > self.high:
            raise InputError(f"an interval's low must not exceed its high, got [{self.low}, {self.high}]")

    @property
    def defined(self) -> bool:
        """Whether there is a finite point estimate."""
        return math.isfinite(self.value)

    def __repr__(self) -> str:
        return (
            f"Estimate({self.value:.4g} [{self.low:.4g}, {self.high:.4g}], {100 * self.coverage:.4g} %, {self.method})"
        )


@dataclass(frozen=True)
class MicroBatchTime(JsonNoun):
    """One micro-batch size that was run. examples: its size. seconds: one forward and backward pass.

    memory_bytes: the peak of the device's allocator (GPU) or the growth of the process (CPU); None if unknown.
    """

    examples: int
    seconds: Estimate
    memory_bytes: int | None = None


@dataclass(frozen=True)
class NoisePoint(JsonNoun):
    """The gradient noise scale, in examples, after `examples` training examples (`steps` updates)."""

    steps: int
    examples: int
    noise_scale: Estimate


@dataclass(frozen=True)
class LearningRateTrial(JsonNoun):
    """One short run: `learning_rate`, and its validation loss, infinite if it diverged, NaN if it was not run.

    The loss is the geometric mean along the run, of averaged weights: steadier than the loss at the end.
    """

    learning_rate: float
    loss: float


@dataclass(frozen=True)
class Reference(JsonNoun):
    """The reference run: what training at the base batch size and learning rate did.

    steps_to_target: updates until the target was first met, the median over seeds; None where most did not meet it.
    steps_by_seed: the same of each seed that was run, None where it did not meet the target in the updates it had.
    warmup_examples, average_power: how it was run, as in `Plan`; a prediction from it holds for runs like it.
    evaluations: (steps, value of the target's metric on the validation data).
    """

    batch_size: int
    learning_rate: float
    steps: int
    seconds: float
    steps_to_target: int | None
    evaluations: tuple[tuple[int, float], ...]
    warmup_examples: int = 0
    average_power: float | None = None
    steps_by_seed: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Facts(JsonNoun):
    """What was measured of a job on this machine. Sizes count examples; times are seconds; memory is bytes.

    noise_scale: the run-level noise scale, in examples: what predicts the critical batch size.
    noise: the same along the reference run.
    micro_batches: the sizes that were run, ascending. max_micro_batch: the largest one to use.
    update_seconds: one optimizer step, whatever the batch. noise_seconds: what measuring the noise scale adds to an
        update, for each micro-batch; None if it was not timed.
    base_batch_size, base_learning_rate: a learning rate that was found good at that batch size.
    batch_norm: whether the model normalises over the batch, so that a micro-batch is part of what it computes.
    target, target_origin: what counts as trained, and where that came from ("job" or "reference run").
    warnings: what makes these facts less than they should be, in sentences. notes: how else they came about.
    """

    job: str
    unit: str
    units_per_example: float
    train_examples: int
    optimizer: str
    device: str
    machine: Mapping[str, Any]
    noise_scale: Estimate
    noise: tuple[NoisePoint, ...]
    micro_batches: tuple[MicroBatchTime, ...]
    max_micro_batch: int
    update_seconds: Estimate
    base_batch_size: int
    base_learning_rate: float
    learning_rate_trials: tuple[LearningRateTrial, ...]
    reference: Reference
    target: Target
    target_origin: str
    evaluation_seconds: float = 0.0
    noise_seconds: Estimate | None = None
    batch_norm: bool = False
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seed: int = 0
    schema: int = field(default=SCHEMA)

    def __post_init__(self) -> None:
        if self.schema > SCHEMA:
            raise InputError(f"facts of schema {self.schema} come from a newer batchlab; this one reads up to {SCHEMA}")
        if not self.micro_batches:
            raise InputError("facts need at least one measured micro-batch")
        for name in ("train_examples", "max_micro_batch", "base_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"facts {name} must be at least 1, got {getattr(self, name)!r}")
        if self.base_batch_size > self.train_examples:
            raise InputError(
                f"facts base_batch_size {self.base_batch_size} is larger than the data set of {self.train_examples}"
            )

    def micro_batch_seconds(self, examples: int) -> float:
        """Seconds of one forward and backward pass over `examples` (at most `max_micro_batch`).

        Linear between the measured sizes; below the smallest one, its time.
        """
        if not 1 <= examples <= self.max_micro_batch:
            raise InputError(f"examples must lie in 1..{self.max_micro_batch} (max_micro_batch), got {examples!r}")
        sizes = [point.examples for point in self.micro_batches]
        times = [point.seconds.value for point in self.micro_batches]
        for left in range(len(sizes) - 1):
            if sizes[left] <= examples <= sizes[left + 1]:
                share = (examples - sizes[left]) / (sizes[left + 1] - sizes[left])
                return times[left] + share * (times[left + 1] - times[left])
        return times[0] if examples < sizes[0] else times[-1] * examples / sizes[-1]

    def best_micro_batch(self, examples: int) -> int:
        """The measured micro-batch, at most `examples`, that works through `examples` in the least time."""
        fitting = [p.examples for p in self.micro_batches if p.examples <= min(examples, self.max_micro_batch)]
        if not fitting:
            return min(examples, self.max_micro_batch)
        return min(fitting + [min(examples, self.max_micro_batch)], key=lambda m: (self._pass_seconds(examples, m), -m))

    def _pass_seconds(self, examples: int, micro_batch: int) -> float:
        whole, rest = divmod(examples, micro_batch)
        return whole * self.micro_batch_seconds(micro_batch) + (self.micro_batch_seconds(rest) if rest else 0.0)

    def step_time(self, batch_size: int, devices: int = 1, micro_batch: int | None = None) -> float:
        """Seconds of one update with `batch_size` examples over `devices` like this one.

        The slowest device's share in micro-batches, and one optimizer step. Communication is not in it:
        it was not measured.
        """
        if batch_size < devices or devices < 1:
            raise InputError(
                f"batch_size must be at least devices >= 1, got batch_size={batch_size}, devices={devices}"
            )
        share = math.ceil(batch_size / devices)
        return self._pass_seconds(share, micro_batch or self.best_micro_batch(share)) + self.update_seconds.value
