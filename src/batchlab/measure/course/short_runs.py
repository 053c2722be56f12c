"""Updates and losses of short runs on one model: what tests of a rate or a decay are read from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from batchlab.core.job import Job
from batchlab.core.model import least_examples
from batchlab.core.modes import evaluating
from batchlab.data.fetch import fetch, to_device
from batchlab.measure.training_step import TrainingStep
from batchlab.optim.by_name import in_groups

GROUPS = 8  # of a batch, as in `train`, where an optimizer takes the gradient in groups


def spread_evenly(examples: int, count: int) -> list[int]:
    """`count` places among the examples, as far apart as can be.

    >>> spread_evenly(10, 4)
    [0, 2, 5, 7]
    """
    return [i * examples // count for i in range(count)]


def train_on(step: TrainingStep, indices: list[int]) -> float:
    """One update on the examples at `indices`: the mean loss over their units before it.

    An optimizer that takes the gradient in groups gets eight, or as many as the batch allows.
    """
    job, optimizer = step.job, step.optimizer
    most = len(indices) // least_examples(step.model) if in_groups(optimizer) else 1
    parts = [part.tolist() for part in np.array_split(indices, max(1, min(GROUPS, most)))]
    batches = [to_device(fetch(job.train, part, job.collate), step.device) for part in parts]
    units = [units_of(job, batch, len(part)) for batch, part in zip(batches, parts, strict=True)]
    total = 0.0
    for batch, count in zip(batches, units, strict=True):
        share = count / max(sum(units), 1) if len(parts) > 1 else 1.0
        total += share * float(step.backward_on(batch, share=share))
        if in_groups(optimizer):
            cast(Any, optimizer).add_group(examples=count)
    optimizer.step()
    step.clear()
    return total


def units_of(job: Job, batch: Any, examples: int) -> int:
    per_example = job.units_per_example
    return int(per_example(batch)) if callable(per_example) else per_example * examples


@torch.no_grad()
def loss_on(job: Job, model: nn.Module, indices: Sequence[int], batch_size: int, device: torch.device) -> float:
    """The mean loss over all units of the validation examples at `indices`, in evaluation mode."""
    total, units = 0.0, 0
    with evaluating(model):
        for start in range(0, len(indices), batch_size):
            part = list(indices[start : start + batch_size])
            batch = to_device(fetch(job.valid, part, job.collate), device)
            count = units_of(job, batch, len(part))
            total += float(job.loss(model, batch)) * count if count else 0.0
            units += count
    return total / units if units else math.nan
