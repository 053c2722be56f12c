"""Making a job's model."""

from __future__ import annotations

import weakref

from torch import nn

from batchlab.core.errors import InputError
from batchlab.core.job import Job


def make_model(job: Job) -> nn.Module:
    """What `job.model` returns; `InputError` where that is no module."""
    model = job.model()
    if not isinstance(model, nn.Module):
        raise InputError(f"job model must return a torch.nn.Module, got {type(model).__name__}")
    return model


def check_fresh(job: Job) -> None:
    """`InputError` where `job.model` gives weights that it gave before: training would change the caller's own."""
    first = [weakref.ref(parameter) for parameter in make_model(job).parameters()]
    again = {id(parameter) for parameter in make_model(job).parameters()}
    if any(id(reference()) in again for reference in first if reference() is not None):
        raise InputError("job model must return fresh weights at each call, it returned the same ones twice")


def least_examples(model: nn.Module) -> int:
    """The fewest examples of one pass in training: 2 where there is batch normalisation, whose variance of one value a
    channel is refused by torch, else 1.

    >>> least_examples(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    2
    """
    return 2 if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()) else 1
