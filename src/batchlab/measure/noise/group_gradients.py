"""The gradients of an update's micro-batches, held one by one, for tests that compare them (`batch_tests`)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.measure.noise.batch_tests import Moments, batch_moments
from batchlab.parallel.agree import agree_min
from batchlab.parallel.shards import is_spread


class GroupGradients:
    """Takes each micro-batch's gradient out of `.grad`, and puts their sum back when the update is whole.

        groups = GroupGradients(model.parameters())
        for piece in pieces:
            (loss(piece) * len(piece) / batch).backward()  # under DDP inside `no_sync`
            groups.add(len(piece), share=len(piece) / batch)
        moments = groups.finish()

    parameters: of the model; those without a gradient in a micro-batch count as zero there, and without one in any, on
    any rank, have none afterwards either. process_group: over whose ranks the batch is spread; `.grad` becomes the mean
    over ranks, as DDP has it, and every rank must call `finish`.

    It holds a copy of the gradient for each micro-batch until `finish`; use it at the updates where a test is due
    (`BatchController.due`). Whole dense tensors only, no DTensor; gradients must not be scaled by a loss scale.
    """

    def __init__(self, parameters: Iterable[Tensor], process_group: dist.ProcessGroup | None = None) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        if not self._parameters:
            raise InputError("parameters must hold at least one tensor that requires a gradient, got none")
        if any(map(is_spread, self._parameters)):
            raise InputError("parameters must be whole on each rank, got some that are spread over ranks")
        self._process_group = process_group
        self.drop()

    def add(self, examples: int, *, share: float) -> None:
        """After a micro-batch's backward. share: what its mean loss was multiplied by."""
        check_count(examples=examples)
        check_positive(share=share)
        row = [None if p.grad is None else p.grad.detach() for p in self._parameters]
        if any(gradient is not None and gradient.layout != torch.strided for gradient in row):
            raise InputError("gradients must be dense, got a sparse one: groups are compared coordinate by coordinate")
        for parameter in self._parameters:
            parameter.grad = None
        self._rows.append(row)
        self._examples.append(examples)
        self._shares.append(share)

    @torch.no_grad()
    def finish(self) -> Moments:
        """The moments of the update's examples, from the mean gradients of its micro-batches, over all ranks."""
        if not self._rows:
            raise InputError("finish needs at least one add before it")
        shares, examples, used = torch.tensor(self._shares, dtype=torch.float64), self._examples, self._used()
        stacks = []
        world = 1 if self._process_group is None else dist.get_world_size(self._process_group)
        for place, parameter in enumerate(self._parameters):
            rows = [row[place] for row in self._rows]
            stack = torch.stack([torch.zeros_like(parameter) if row is None else row for row in rows])
            total = stack.sum(0)
            if world > 1:
                dist.all_reduce(total, group=self._process_group)
                total /= world
            parameter.grad = total if used[place] else None
            stacks.append(stack / shares.to(total).view(-1, *[1] * total.ndim))
        self.drop()
        return batch_moments(stacks, examples=examples, process_group=self._process_group)

    def _used(self) -> list[bool]:
        """Whether a parameter got a gradient, from any micro-batch of any rank."""
        found = [any(row[place] is not None for row in self._rows) for place in range(len(self._parameters))]
        if self._process_group is None:
            return found
        return [least < 0 for least in agree_min([-float(each) for each in found], self._process_group)]

    def drop(self) -> None:
        """Forgets the micro-batches so far."""
        self._rows: list[list[Tensor | None]] = []
        self._examples: list[int] = []
        self._shares: list[float] = []
