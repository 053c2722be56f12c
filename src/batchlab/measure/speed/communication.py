"""Seconds that averaging gradients over ranks adds to a training step, by a step without it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.job import Job
from batchlab.measure.order import median_interval
from batchlab.measure.training_step import TrainingStep
from batchlab.parallel.agree import device_of

ROUNDS = 20


class _Loss(nn.Module):
    """A job's loss as a module, for DDP to wrap."""

    def __init__(self, job: Job, model: nn.Module) -> None:
        super().__init__()
        self.job, self.model = job, model

    def forward(self, batch: Any) -> Tensor:
        return self.job.loss(self.model, batch)


def communication_seconds(
    step: TrainingStep, sizes: Sequence[int], *, rounds: int = ROUNDS, group: dist.ProcessGroup | None = None
) -> dict[int, Estimate]:
    """By micro-batch: the median over rounds of a DDP step's seconds less those of the same step under `no_sync`.

    That is the time that averaging is waited for: what DDP hides behind the backward pass is not in it. Sizes take
    turns, so do the two kinds of step, and all ranks start each together. The slowest rank's time counts, in both.
    Every rank must call with the same sizes and rounds. Near 0 the median can come out negative: nothing is clamped.
    """
    if not dist.is_initialized() or dist.get_world_size(group) < 2:
        raise InputError("communication takes two ranks or more: there is no process group of so many")
    check_count(rounds=rounds)
    loss = _Loss(step.job, step.model)
    batches = {size: step.batch(size) for size in sizes}
    loss(batches[min(sizes)]).backward()
    unused = any(p.grad is None for p in step.trained)
    step.clear()
    ids = [step.device] if step.device.type == "cuda" else None
    wrapped = DistributedDataParallel(loss, device_ids=ids, process_group=group, find_unused_parameters=unused)
    added: dict[int, list[float]] = {size: [] for size in sizes}
    for index in range(-1, rounds):
        for size, batch in batches.items():
            kinds = (True, False) if index % 2 else (False, True)
            seconds = {synced: _slowest(_pass(step, wrapped, batch, synced, group), group) for synced in kinds}
            if index >= 0:
                added[size].append(seconds[True] - seconds[False])
    method = f"DDP step less no_sync step, {dist.get_world_size(group)} ranks"
    return {size: median_interval(each, method=method) for size, each in added.items()}


def _pass(
    step: TrainingStep, wrapped: DistributedDataParallel, batch: Any, synced: bool, group: dist.ProcessGroup | None
) -> float:
    """Seconds of one forward and backward pass on this rank, begun together."""
    step.wait()
    dist.barrier(group)
    started = time.perf_counter()
    if synced:
        wrapped(batch).backward()
    else:
        with wrapped.no_sync():
            wrapped(batch).backward()
    step.wait()
    ended = time.perf_counter()
    step.clear()
    return ended - started


def _slowest(seconds: float, group: dist.ProcessGroup | None) -> float:
    tensor = torch.tensor(seconds, dtype=torch.float64, device=device_of(group))
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return float(tensor)
