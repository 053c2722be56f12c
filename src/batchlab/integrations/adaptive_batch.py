"""A batch size that moves along a run, in any training loop: controller, sampler, noise and learning rate in step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.data.batch_sampler import share_of
from batchlab.data.stream_batches import StreamBatches
from batchlab.integrations.batch_rate import BatchRate, LrFactor, check_schedule, lr_factor
from batchlab.integrations.batch_rate import HeldRate as HeldRate
from batchlab.integrations.micro_batches import MicroBatches
from batchlab.measure.noise.batch_tests import Moments
from batchlab.measure.noise.coordinate_test import CoordinateMoments
from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.schedule.batches.controller import BatchController, StepFacts
from batchlab.schedule.batches.scheduled_batch import LrRule
from batchlab.schedule.rates.counted import Counted


class BatchUpdate(NamedTuple):
    """What an update was, and what comes.

    step: updates so far, this one included. seen: examples so far. batch_size: of this update, over all ranks.
    learning_rate: of this update, of the optimizer's first group; None without a schedule. noise: the running estimate,
    in examples, None where it is not measured. wanted: the size that the controller asks for now. next_size: of the
    next update, which is another where `ahead` > 0. ahead: updates that the loader had begun already, in older sizes.
    """

    step: int
    seen: int
    batch_size: int
    learning_rate: float | None
    noise: Estimate | None
    wanted: int
    next_size: int
    ahead: int

    def log(self) -> dict[str, float]:
        """For a tracker: "batch_size", "examples", and where known "learning_rate" and "noise_scale"."""
        found: dict[str, float] = {"batch_size": self.batch_size, "examples": self.seen}
        if self.learning_rate is not None:
            found["learning_rate"] = self.learning_rate
        if self.noise is not None and self.noise.defined:
            found["noise_scale"] = self.noise.value
        return found


class AdaptiveBatch:
    """Joins what moves the batch with what must move along; one call after each update.

        adaptive = AdaptiveBatch(controller, sampler, noise=noise, schedule=schedule, lr_rule="sqrt")
        for batch in DataLoader(data, batch_sampler=sampler):
            ...                                     # backward passes, noise.step(), optimizer.step()
            update = adaptive.step()

    controller: its sizes count examples over all ranks and micro-batches of an update.
    sampler: a `StreamBatches`, one batch of it an update; in a trainer's loop a `MicroBatches`. Micro-batches must be
        equal on every rank there, so that the controller's `multiple_of` is a multiple of accumulation x ranks.
    noise: where the controller reads the noise scale; the loop calls its `micro_batch` and `step` as ever.
    schedule: the learning rate as a function of what was seen, `HeldRate` for one that stands. Nothing else may step
        it: `step` counts each update by the examples that it really had, a skipped one too.
    lr_rule: how the rate moves with the batch, on top of the schedule: "none", "linear" or "sqrt" of the size over
        lr_batch (`rules.learning_rate`), or a function of the size that gives the factor, such as
        `lambda size: rescale(1.0, 64, size, rule="surge", noise_scale=900.0)`. None: the `lr_factor` of a
        `ScheduledBatch`, else "none". It needs a schedule, and holds for the size that an update really has.
    lr_batch: where the optimizer's own rates were stated, by default the controller's size when this is made.
    trained: updates of the sampler's run that were trained on, where its loader has begun more; None for all of them.
    max_micro_batch: the most examples that fit at once on a rank; refused where the controller's maximum asks for more.

    What counts is what the sampler handed out, never the wish: with `ahead` updates begun by a loader's workers a new
    size comes so many updates late, and the controller's patience should be longer. Every rank makes one and calls
    `step` after each update, for it is a collective: one all-reduce of two numbers.

    State: plain numbers, of any number of ranks. It holds those of controller, sampler, noise and schedule, so that
    these need not be saved beside it; model and optimizer are saved as ever. Load before the first batch is taken.

    Not for `drop_last`, which leaves out examples as the size has it, nor for samplers whose batch size is not theirs
    to choose (buckets, packing). With batch normalisation the size of a micro-batch changes what is trained.

    >>> from batchlab.schedule.batches.batch_ramp import BatchRamp
    >>> sampler = MicroBatches(100, 4, accumulation=2)
    >>> adaptive = AdaptiveBatch(BatchRamp(4, 8, over=8, increment=4, multiple_of=2), sampler)
    >>> sizes = []
    >>> for micro, piece in enumerate(sampler):
    ...     if micro % 2:
    ...         sizes.append(adaptive.step(examples=2 * len(piece)).batch_size)
    ...     if adaptive.seen >= 24:
    ...         break
    >>> sizes
    [4, 4, 8, 8]
    """

    def __init__(
        self,
        controller: BatchController,
        sampler: StreamBatches,
        *,
        noise: GradientNoise | None = None,
        schedule: Counted | None = None,
        lr_rule: LrRule | LrFactor | None = None,
        lr_batch: int | None = None,
        max_micro_batch: int | None = None,
        trained: int | None = None,
    ) -> None:
        _check_sampler(controller, sampler, max_micro_batch)
        _check_noise(controller, sampler, noise)
        self.controller, self.sampler, self.noise = controller, sampler, noise
        self.updates = sampler.taken if trained is None else trained
        self.seen = sampler.position(self.updates)
        size, fresh = controller.batch_size, self.updates == 0
        factor = lr_factor(controller, lr_rule, size if lr_batch is None else lr_batch)
        check_schedule(schedule, factor, size if fresh else None)
        if fresh and sampler.batch_size != size:
            raise InputError(
                f"sampler and controller must start at one size, got {sampler.batch_size} and {controller.batch_size}"
            )
        self._measured = 0 if noise is None else noise.steps
        self.rate = None if schedule is None else BatchRate(schedule, factor, self._size_of(self.updates))

    def step(
        self,
        *,
        batch_test: Moments | CoordinateMoments | None = None,
        loss: float | None = None,
        seconds: float | None = None,
        skipped: bool = False,
        examples: int | None = None,
    ) -> BatchUpdate:
        """After an update, and after `noise.step()`: sets the next batch size and learning rate.

        batch_test, loss, seconds, skipped: see `StepFacts`; those that the controller's `needs` names must be given.
        examples: what this rank counted in its batches, held against what the sampler gave it; `InputError` if they
        differ, as where a trainer shares out the batches again.
        """
        if self.updates >= self.sampler.taken:
            raise InputError(f"step must follow a batch: {self.updates + 1} updates of {self.sampler.taken} batches")
        size = self._size_of(self.updates)
        self._check_counted(examples, size)
        self._check_given(batch_test is not None or skipped, seconds is not None)
        self._check_measured(skipped)
        self.updates, self.seen = self.updates + 1, self.seen + size
        noise = None if self.noise is None else self.noise.estimate()
        facts = StepFacts(self.seen, size, loss, noise, batch_test, seconds, skipped)
        learning_rate = None if self.rate is None else self.rate.learning_rate
        wanted = self.controller.next_batch(self.updates, facts.agreed())
        self.sampler.batch_size = wanted
        next_size = self._size_of(self.updates)
        if self.rate is not None:
            self.rate.step(size, next_size)
        ahead = self.sampler.taken - self.updates
        return BatchUpdate(self.updates, self.seen, size, learning_rate, noise, wanted, next_size, ahead)

    def _size_of(self, update: int) -> int:
        return self.sampler.position(update + 1) - self.sampler.position(update)

    def _check_counted(self, examples: int | None, size: int) -> None:
        if examples is None:
            return
        low, high = share_of(size, self.sampler.rank, self.sampler.world_size)
        if examples != high - low:
            raise InputError(
                f"examples must be the {high - low} that the sampler gave rank {self.sampler.rank} for the update, got "
                f"{examples}: either they are counted wrongly, or the loader does not hand out the sampler's batches"
            )

    def _check_given(self, tested: bool, timed: bool) -> None:
        needs, name = self.controller.needs, type(self.controller).__name__
        if "batch_test" in needs and self.controller.due and not tested:
            raise InputError(f"{name} reads batch_test where it is due: give this update's Moments")
        if "seconds" in needs and not timed:
            raise InputError(f"{name} reads seconds: give what the update took")

    def _check_measured(self, skipped: bool) -> None:
        if self.noise is None:
            return
        before, self._measured = self._measured, self.noise.steps
        if self.noise.steps == before and not skipped and "noise_scale" in self.controller.needs:
            raise InputError(
                f"{type(self.controller).__name__} reads the noise scale: call noise.step() before adaptive.step(), "
                "after the update's last backward pass"
            )

    def state_dict(self) -> dict[str, Any]:
        """As of the last `step`, whatever the loader has begun since."""
        return {
            "updates": self.updates,
            "examples": self.seen,
            "controller": self.controller.state_dict(),
            "sampler": self.sampler.state_dict(self.updates),
            "noise": None if self.noise is None else self.noise.state_dict(),
            "rate": None if self.rate is None else self.rate.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, with_sampler: bool = True) -> None:
        """Goes on where the state was taken, with the noise and the schedule that both have.

        with_sampler: False after `resume_sampler`, where the sampler may have gone on since.
        """
        lacking = {"updates", "examples", "controller", "sampler", "noise", "rate"} - set(state)
        if lacking:
            raise InputError(f"state must be of an AdaptiveBatch: it lacks {sorted(lacking)}")
        check_count(0, updates=state["updates"], examples=state["examples"])
        if with_sampler:
            resume_sampler(state, self.controller, self.sampler)
        self.updates, self.seen = int(state["updates"]), int(state["examples"])
        if self.noise is not None and state["noise"] is not None:
            self.noise.load_state_dict(state["noise"])
        if self.rate is not None and state["rate"] is not None:
            self.rate.load_state_dict(state["rate"], self._size_of(self.updates))


def resume_sampler(state: Mapping[str, Any], controller: BatchController, sampler: StreamBatches) -> None:
    """Loads what of an `AdaptiveBatch`'s state must be there before a loader looks ahead: controller and sampler."""
    sampler.load_state_dict(state["sampler"])
    controller.load_state_dict(state["controller"])
    if controller.batch_size != state["controller"]["batch_size"]:
        sampler.batch_size = controller.batch_size  # what it was had to be brought into the bounds


def _check_sampler(controller: BatchController, sampler: StreamBatches, max_micro_batch: int | None) -> None:
    if not isinstance(controller, BatchController):
        raise InputError(f"controller must be a BatchController, got {type(controller).__name__}")
    if not isinstance(sampler, StreamBatches):
        raise InputError(f"sampler must be a StreamBatches or a MicroBatches, got {type(sampler).__name__}")
    if sampler.drop_last:
        raise InputError("sampler must not have drop_last, by which the size says what is left out: use endless=True")
    if sampler.world_size > 1 and not sampler.endless:
        raise InputError(
            f"sampler must be endless with {sampler.world_size} ranks, or some size would leave fewer examples than "
            "ranks for the last batch of an epoch: use endless=True, or MicroBatches"
        )
    if controller.maximum > sampler.n:
        raise InputError(f"the controller's maximum must be at most the {sampler.n} examples, got {controller.maximum}")
    pieces, unit = 1, sampler.world_size
    if isinstance(sampler, MicroBatches):
        pieces, unit = sampler.accumulation, sampler.accumulation * sampler.world_size
        if controller.multiple_of % unit:
            raise InputError(
                f"the controller's multiple_of must be a multiple of accumulation {pieces} x ranks "
                f"{sampler.world_size} = {unit}, so that micro-batches are equal, got {controller.multiple_of}"
            )
    if -(-controller.minimum // controller.multiple_of) * controller.multiple_of < unit:
        raise InputError(f"the controller's minimum must be at least the {unit} ranks, got {controller.minimum}")
    if max_micro_batch is None:
        return
    check_count(max_micro_batch=max_micro_batch)
    if controller.maximum > unit * max_micro_batch:
        raise InputError(
            f"the controller's maximum must be at most accumulation {pieces} x max_micro_batch {max_micro_batch} x "
            f"ranks {sampler.world_size} = {unit * max_micro_batch}, got {controller.maximum}: raise the accumulation"
        )


def _check_noise(controller: BatchController, sampler: StreamBatches, noise: GradientNoise | None) -> None:
    if "noise_scale" not in controller.needs:
        return
    if noise is None:
        raise InputError(f"{type(controller).__name__} reads the noise scale: give noise, a GradientNoise")
    one = isinstance(sampler, MicroBatches) and sampler.accumulation * sampler.world_size == 1
    if one and noise.method in ("micro_batch", "ranks"):
        raise InputError(
            "the noise scale needs two micro-batches an update, got accumulation 1 on one rank: raise the accumulation"
        )
