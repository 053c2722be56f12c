"""The exact gradient of the next batch: over micro-batches and ranks, and what is measured of it on the way."""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchlab.core.errors import InputError
from batchlab.core.job import Job
from batchlab.core.model import least_examples
from batchlab.core.plan import Plan
from batchlab.data.fetch import fetch, to_device
from batchlab.data.stream import SampleStream
from batchlab.measure.noise.batch_tests import Moments
from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.measure.noise.group_gradients import GroupGradients
from batchlab.optim.by_name import ADAM_LIKE, in_groups
from batchlab.schedule.batches.norm_test_batch import check_no_batch_norm
from batchlab.spine.evaluate import scalar, units_of

GROUPS = 8  # the fewest that make a variance between them worth having (Jiang et al. 2023, arXiv 2309.13681)


class Found(NamedTuple):
    """loss: mean over the batch's units. norm: of its gradient. moments: where a test of the gradients was due."""

    loss: float
    norm: float
    moments: Moments | None


class _Loss(nn.Module):
    """The job's loss as a module, so that DDP and the compiler see one forward and the job sees its own model."""

    def __init__(self, job: Job, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._loss = job.loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


class BatchGradient:
    """Leaves the mean gradient of a batch in `.grad`, whatever the micro-batches and ranks.

    stream: which examples come when. Every rank makes one, and takes a contiguous share of each batch; shares differ
    by at most one example. in_geometry: whether the noise is measured in an Adam-like optimizer's geometry. needs: the
    facts that a batch controller reads; for "batch_test" the gradient is taken in groups.

    noise: what measures the noise scale, where the plan says so or the controller reads it, and nothing else takes the
    gradient in groups. Raises `InputError` where both want the gradient.
    """

    def __init__(
        self,
        job: Job,
        plan: Plan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        stream: SampleStream,
        *,
        device: torch.device,
        in_geometry: bool,
        needs: frozenset[str],
    ) -> None:
        self.job, self.plan, self.model, self.device = job, plan, model, device
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self._stream = stream
        self._by_optimizer: Any = self._grouping(optimizer)
        self._tested = self._testing() if "batch_test" in needs else None
        read = "noise_scale" in needs
        if read and self._by_optimizer is not None:
            raise InputError(
                f"batch_schedule {plan.batch_schedule!r} reads the noise scale, which is not measured where the "
                f"optimizer takes the gradient in groups, as {plan.optimizer!r} does: choose another of one of them"
            )
        wanted = (plan.measure_noise or read) and self._by_optimizer is None and self._tested is None
        self.noise = self._measuring(optimizer, in_geometry, read) if wanted else None
        self._read = read
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._least = least_examples(model)
        self._forward = self._wrapped(_Loss(job, model))

    def _grouping(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimizer, if it weighs the groups of a batch by their agreement."""
        if not in_groups(optimizer):
            return None
        if self.world > 1:
            optimizer.gradient.process_group = dist.group.WORLD  # type: ignore[attr-defined]
        return optimizer

    def _testing(self) -> GroupGradients:
        if self._by_optimizer is not None:
            raise InputError(
                f"batch_schedule {self.plan.batch_schedule!r} and the optimizer {self.plan.optimizer!r} both take the "
                "gradient in groups: choose another of one of them"
            )
        check_no_batch_norm(self.model, examples=max(1, self.plan.batch_size // GROUPS))
        return GroupGradients(self.model.parameters(), dist.group.WORLD if self.world > 1 else None)

    def _measuring(self, optimizer: torch.optim.Optimizer, in_geometry: bool, read: bool) -> GradientNoise:
        settings: dict[str, Any] = {"every": self.plan.noise_every}
        if read:  # what is followed remembers about 50 updates, however seldom it is measured, but five measurements
            settings["ema"] = max(0.98**self.plan.noise_every, 0.8)
        if in_geometry and self.plan.optimizer in ADAM_LIKE:
            settings |= {"weighting": "preconditioned", "optimizer": optimizer}
        return GradientNoise(self.model, **settings)

    def _wrapped(self, loss: _Loss) -> nn.Module:
        wrapped: nn.Module = loss
        if self.world > 1:
            wrapped = DistributedDataParallel(loss, device_ids=[self.device] if self.device.type == "cuda" else None)
        if self.plan.compile:
            wrapped.compile()
        return wrapped

    def backward(self, position: int, size: int, *, test: bool = True) -> Found:
        """Of the `size` examples from `position` on. test: whether the controller's test is due."""
        tested = self._tested if test else None
        in_groups_ = tested is not None or self._by_optimizer is not None
        pieces = self.pieces(position, size, in_groups=in_groups_)
        fetched = [fetch(self.job.train, piece, self.job.collate) for piece in pieces]
        units = [units_of(self.job, batch, len(piece)) for batch, piece in zip(fetched, pieces, strict=True)]
        batches = [to_device(batch, self.device) for batch in fetched]  # counted before: counting would wait for it
        total = self._total_units(units, size)
        told = [place for place, count in enumerate(units) if count] or [len(units) - 1]  # a mean over nothing is NaN
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for place in told:
            share = units[place] * self.world / total
            with self._unsynced(in_groups_ or place != told[-1]), self._observed(len(pieces[place])):
                part = self._loss(batches[place]) * share
                part.backward()  # type: ignore[no-untyped-call]
            if self._by_optimizer is not None:
                self._by_optimizer.add_group(examples=units[place])
            if tested is not None:
                tested.add(len(pieces[place]), share=share)
            loss += part.detach()
        if self.world > 1:
            dist.all_reduce(loss)
        if self._by_optimizer is not None:
            self._by_optimizer.finish()
        moments = tested.finish() if tested is not None else None
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return Found(loss.item() / self.world, norm.item(), moments)

    def pieces(self, position: int, size: int, *, in_groups: bool = False) -> list[list[int]]:
        """This rank's micro-batches of the next `size` examples, as example indices; sizes differ by one at most.

        None is of a single example where the model normalises over the batch.
        """
        share = np.array_split(self._stream.indices(position, size), self.world)[self.rank]
        compared = self._read and self.noise is not None and self.noise.due  # one piece tells nothing of the noise
        fewest = math.ceil((2 if compared else 1) / self.world)
        most = min(self.plan.micro_batch, max(1, math.ceil(len(share) / fewest)))
        if in_groups:
            most = min(most, max(1, len(share) // math.ceil(GROUPS / self.world)))
        count = min(math.ceil(len(share) / most), max(1, len(share) // self._least))
        return [piece.tolist() for piece in np.array_split(share, count)]

    def _total_units(self, units: list[int], size: int) -> int:
        if not callable(self.job.units_per_example):
            return self.job.units_per_example * size
        if self.world == 1:
            return max(sum(units), 1)
        total = torch.tensor(sum(units), device=self.device)
        dist.all_reduce(total)
        return max(int(total), 1)

    def _loss(self, batch: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16"):
            loss = scalar(self._forward(batch))
        if not loss.requires_grad:
            raise InputError("job loss does not depend on the model's weights: it has no gradient")
        return loss

    def _unsynced(self, alone: bool) -> contextlib.AbstractContextManager[None]:
        """DDP sums gradients over ranks at the last piece alone, and never where they are taken in groups."""
        if alone and isinstance(self._forward, DistributedDataParallel):
            return self._forward.no_sync()
        return contextlib.nullcontext()

    def _observed(self, examples: int) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.noise is None else self.noise.micro_batch(examples)
