"""A step that runs out of memory above a limit, a small job, and `_quick`, which acts in modules that import it."""

import pytest
import torch

from batchlab.core.job import Job
from tests.spine.jobs import toy_data


def without_freeing(patch):
    """For steps that hold nothing: collecting garbage takes 50 ms."""
    for module in ("micro_batch", "size_finder", "subjects"):
        patch.setattr(f"batchlab.measure.memory.{module}.free", lambda device=None: None)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_freeing(monkeypatch)


class Limited:
    """A step that runs out of memory above a limit."""

    def __init__(self, limit, error=None):
        self.limit, self.error, self.ran = limit, error or torch.OutOfMemoryError("CUDA out of memory."), []

    def __call__(self, size):
        if size > self.limit:
            raise self.error
        self.ran.append(size)


def toy_job(model):
    def loss(module, batch):
        x, y = batch
        return (module(x).squeeze(1) - y).square().mean()

    data = toy_data(256)
    return Job("toy", model, loss, data, toy_data(8, seed=1))
