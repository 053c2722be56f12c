"""Means over the validation data, exact at any batch size and number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlab.core.checks import holds
from batchlab.core.errors import InputError
from batchlab.core.job import Job
from batchlab.core.modes import evaluating
from batchlab.data.fetch import fetch, to_device


def evaluate(
    job: Job, module: nn.Module, *, batch_size: int, device: torch.device, precision: str = "float32"
) -> dict[str, float]:
    """ "loss" and the job's metrics on `job.valid`, each the mean over all its units; the same on every rank.

    batch_size: examples of one forward pass; it changes nothing but speed. Under a process group each rank takes a
    contiguous share. The module is in evaluation mode meanwhile, and without gradients.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if len(job.valid) < world:
        raise InputError(f"{len(job.valid)} validation examples are too few for {world} ranks")
    share = np.array_split(np.arange(len(job.valid)), world)[rank].tolist()
    sums: dict[str, Tensor] = {}
    units = 0
    with evaluating(module), torch.no_grad():
        for start in range(0, len(share), batch_size):
            indices = share[start : start + batch_size]
            fetched = fetch(job.valid, indices, job.collate)
            count = units_of(job, fetched, len(indices))  # before it is moved: counting would wait for the device
            batch = to_device(fetched, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                values = measured(job, module, batch)
            for name, value in values.items():
                before = sums.get(name, torch.zeros((), dtype=torch.float64, device=device))
                sums[name] = before + value * count if count else before  # a mean over nothing may be NaN
            units += count
    names = list(sums)
    packed = torch.stack([*sums.values(), torch.tensor(float(units), dtype=torch.float64, device=device)])
    if world > 1:
        dist.all_reduce(packed)
    *totals, whole = packed.tolist()
    return {name: total / whole for name, total in zip(names, totals, strict=True)}


def measured(job: Job, module: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The loss and the job's metrics of one batch, as float64 scalars."""
    values: dict[str, Any] = {"loss": scalar(job.loss(module, batch))}
    if job.metric is not None:
        metrics = job.metric(module, batch)
        if not isinstance(metrics, Mapping):
            raise InputError(f"job metric must return a dict of name to mean, got {type(metrics).__name__}")
        values |= {name: value for name, value in metrics.items() if name != "loss"}
    return {name: torch.as_tensor(value).detach().double() for name, value in values.items()}


def units_of(job: Job, batch: Any, examples: int) -> int:
    """The units in a batch of `examples` examples; of a function's whole number, as a tensor or a float too."""
    per_example = job.units_per_example
    if not callable(per_example):
        return per_example * examples
    count = per_example(batch)
    if not holds(lambda value: value >= 0 and float(value).is_integer(), count):
        raise InputError(f"job units_per_example must give a whole number of units, 0 or more, got {count!r}")
    return int(count)


def scalar(loss: Any) -> Tensor:
    """The job's loss itself, if it is what a job must return."""
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"job loss must return a scalar tensor, the mean over the batch, got {got}")
    return loss
