"""What a size finder runs: the step of a job on a model of its own, or a function of the caller's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from batchlab.core.errors import BatchlabError
from batchlab.core.job import Job
from batchlab.measure.memory.lockstep import Lockstep, communicates
from batchlab.measure.memory.out_of_memory import free
from batchlab.measure.training_step import TrainingStep


class JobSubject:
    """The training step and the evaluation of a job, on a fresh model.

    It holds a second copy of the trained weights for their average, and where it is `grouped` with other ranks a third
    for what DDP's buckets take, unless the model communicates itself and so holds its own.
    """

    def __init__(
        self,
        job: Job,
        *,
        device: torch.device,
        seed: int,
        lock: Lockstep | None,
        grouped: bool,
        make_batch: Callable[..., Any] | None,
        evaluation: bool,
    ) -> None:
        self.lock, self.grouped, self.make_batch, self.evaluation = lock, grouped, make_batch, evaluation
        self._new = partial(TrainingStep, job, device=device, seed=seed, copies=1)
        self._given: tuple[Any, ...] = ()
        self._step: TrainingStep | None = None
        self.communicates, self.stale = False, False
        self.renew()

    @property
    def phase(self) -> str:
        """What the step is at."""
        return "model" if self._step is None else self._step.phase

    @property
    def fragile(self) -> bool:
        """Whether a failed step leaves the model in the middle of collectives."""
        return self.communicates

    def at(self, bucket: Any) -> None:
        """Batches are of `bucket` from now on."""
        self._given = (bucket,)

    def _make(self) -> TrainingStep:
        step = self._new(make_batch=None if self.make_batch is None else self._batch)
        self.communicates = communicates(step.model)
        step.hold_copies(int(self.grouped and not self.communicates))
        return step

    def _batch(self, size: int) -> Any:
        assert self.make_batch is not None
        return self.make_batch(size, *self._given)

    def renew(self) -> None:
        """A fresh model and optimizer, on all ranks at once: making them may hold collectives."""
        self._step = None
        free()
        self._step = self._make() if self.lock is None else self.lock.run(self._make)
        self.stale = False

    @property
    def step(self) -> TrainingStep:
        """The step, once it is made."""
        if self._step is None:
            raise BatchlabError("the model was not made")
        return self._step

    def train(self, size: int) -> None:
        """One training step, whole."""
        self.step(size)

    def evaluate(self, size: int) -> None:
        """Loss and metrics on validation data, if that is asked for."""
        if self.evaluation:
            self.step.evaluate(size)

    def wait(self) -> None:
        """Until the device is done."""
        self.step.wait()

    def clear(self) -> None:
        """Drops the gradients of a failed step."""
        if self._step is not None:
            self._step.clear()


class FunctionSubject:
    """A function of the caller's: it does what it does. renew: makes anew what a failed step has left unusable."""

    def __init__(self, step: Callable[..., None], renew: Callable[[], None] | None, lock: Lockstep | None) -> None:
        self._step, self._renew, self.lock, self.stale = step, renew, lock, False
        self._given: tuple[Any, ...] = ()

    @property
    def phase(self) -> str:
        """The function's own, where it has one."""
        return str(getattr(self._step, "phase", "step"))

    @property
    def fragile(self) -> bool:
        """Whether there is something to make anew."""
        return self._renew is not None

    def at(self, bucket: Any) -> None:
        """The function gets `bucket` from now on."""
        self._given = (bucket,)

    def train(self, size: int) -> None:
        """The function at that size."""
        self._step(size, *self._given)

    def evaluate(self, size: int) -> None:
        """Nothing: the function evaluates where it is to."""

    def wait(self) -> None:
        """Nothing: the function is timed as it is."""

    def clear(self) -> None:
        """Nothing: what it holds is the caller's."""

    def renew(self) -> None:
        """The caller's, on all ranks at once."""
        if self._renew is not None:
            _ = self._renew() if self.lock is None else self.lock.run(self._renew)
        self.stale = False
