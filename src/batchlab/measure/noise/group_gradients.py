"""The gradients of an update's micro-batches, held one by one, for tests that compare them (`batch_tests`)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.measure.noise.batch_tests import Moments, batch_moments


class GroupGradients:
    """Takes each micro-batch's gradient out of `.grad`, and puts their sum back when the update is whole.

        groups = GroupGradients(model.parameters())
        for piece in pieces:
            (loss(piece) * len(piece) / batch).backward()  # under DDP inside `no_sync`
            groups.add(len(piece), share=len(piece) / batch)
        moments = groups.finish()

    parameters: of the model; those without a gradient count as zero. process_group: over whose ranks the batch is
    spread; `.grad` becomes the mean over ranks, as DDP has it, and every rank must call `finish`.

    It holds a copy of the gradient for each micro-batch until `finish`; use it at the updates where a test is due
    (`BatchController.due`). Whole tensors only, no DTensor; gradients must not be scaled by a loss scale.
    """

    def __init__(self, parameters: Iterable[Tensor], process_group: dist.ProcessGroup | None = None) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        if not self._parameters:
            raise InputError("parameters must hold at least one tensor that requires a gradient, got none")
        self._process_group = process_group
        self._rows: list[list[Tensor]] = []
        self._examples: list[int] = []
        self._shares: list[float] = []

    def add(self, examples: int, *, share: float) -> None:
        """After a micro-batch's backward. share: what its mean loss was multiplied by."""
        check_count(examples=examples)
        check_positive(share=share)
        row = []
        for parameter in self._parameters:
            row.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach())
            parameter.grad = None
        self._rows.append(row)
        self._examples.append(examples)
        self._shares.append(share)

    @torch.no_grad()
    def finish(self) -> Moments:
        """The moments of the update's examples, from the mean gradients of its micro-batches, over all ranks."""
        shares = torch.tensor(self._shares, dtype=torch.float64)
        stacks = []
        world = 1 if self._process_group is None else dist.get_world_size(self._process_group)
        for parameter, rows in zip(self._parameters, zip(*self._rows, strict=True), strict=True):
            total = torch.stack(rows).sum(0)
            if world > 1:
                dist.all_reduce(total, group=self._process_group)
                total /= world
            parameter.grad = total
            each = shares.to(total).view(-1, *[1] * total.ndim)
            stacks.append(torch.stack(rows) / each)
        examples = self._examples
        self._rows, self._examples, self._shares = [], [], []
        return batch_moments(stacks, examples=examples, process_group=self._process_group)

    def drop(self) -> None:
        """Forgets the micro-batches so far."""
        self._rows, self._examples, self._shares = [], [], []
