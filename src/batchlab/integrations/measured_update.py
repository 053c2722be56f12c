"""What a batch controller needs measured of an update's micro-batches, for loops that call hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.noise.batch_tests import Moments
from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.measure.noise.group_gradients import GroupGradients
from batchlab.schedule.batches.controller import BatchController
from batchlab.schedule.batches.norm_test_batch import check_no_batch_norm


class MeasuredUpdate:
    """Measures the noise scale, or takes the moments of a batch test, of updates of equal micro-batches.

    controller: whose `needs` say what. model, optimizer: that are trained. accumulation: micro-batches an update on a
    rank. world_size: ranks. noise: options of `GradientNoise`, measured where the controller needs it, or where they
    are given; with `weighting="preconditioned"` the optimizer is added.

    A batch test compares whole micro-batches, 2 of them at least, and needs one process: DDP averages gradients before
    they can be told apart. It is made at the updates where the controller is `due`.
    """

    def __init__(
        self,
        controller: BatchController,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        accumulation: int,
        world_size: int,
        noise: Mapping[str, Any] | None = None,
    ) -> None:
        self.noise: GradientNoise | None = None
        self._controller, self._accumulation = controller, accumulation
        self._groups: GroupGradients | None = None
        self._tests = False
        self.examples, self.pieces = 0, 0
        if "batch_test" in controller.needs:
            _check_tested(controller, accumulation, world_size, noise)
            check_no_batch_norm(model, examples=max(1, controller.batch_size // accumulation))
            self._groups = GroupGradients(model.parameters())
        elif "noise_scale" in controller.needs or noise is not None:
            options = dict(noise or {})
            if options.get("weighting") == "preconditioned":
                options.setdefault("optimizer", optimizer)
            self.noise = GradientNoise(model, **options)

    @contextlib.contextmanager
    def micro_batch(self, examples: int) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch, whose mean loss is divided by the accumulation."""
        if self.pieces == 0:
            self._tests = self._groups is not None and self._controller.due
        with contextlib.nullcontext() if self.noise is None else self.noise.micro_batch(examples):
            yield
        if self._tests and self._groups is not None:
            self._groups.add(examples, share=1 / self._accumulation)
        self.examples, self.pieces = self.examples + examples, self.pieces + 1

    @property
    def whole(self) -> bool:
        """Whether the update has all of its micro-batches."""
        return self.pieces == self._accumulation

    def finish(self) -> Moments | None:
        """After the last micro-batch, before clipping: the moments where a test was due; `.grad` is whole then."""
        if self.noise is not None:
            self.noise.step()
        return self._groups.finish() if self._tests and self._groups is not None else None

    def begin(self) -> None:
        """To the next update."""
        self.examples, self.pieces = 0, 0

    def close(self) -> None:
        """Takes the hooks off the model."""
        if self.noise is not None:
            self.noise.close()


def _check_tested(
    controller: BatchController, accumulation: int, world_size: int, noise: Mapping[str, Any] | None
) -> None:
    name = type(controller).__name__
    if world_size > 1:
        raise InputError(
            f"{name} needs one process here, got {world_size}: DDP averages gradients before they can be told apart"
        )
    if accumulation < 2:
        raise InputError(f"{name} compares micro-batches, of which an update must have 2 at least, got {accumulation}")
    if noise is not None:
        raise InputError(f"noise must be None with a {name}, which takes the gradient apart by itself, got {noise!r}")
