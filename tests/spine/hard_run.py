"""A run that is hard to resume: dropout, BatchNorm, an average of the weights; and what of a run must be the same."""

import torch

from batchlab.core.checkpoint import newest_whole
from batchlab.core.run import Run
from tests.spine.jobs import squared_error, toy_job, toy_plan

TIMES = ("seconds", "examples_per_second")


def lines(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in Run.open(folder).steps()]


def state(folder):
    found, problems = newest_whole(folder / "checkpoints")
    assert not problems
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def hard_job(loss=squared_error):
    return toy_job(dropout=0.2, batch_norm=True, dtype=torch.float32, loss=loss)


HARD_PLAN = toy_plan(steps=24, ema_half_life=300.0, checkpoint_every=3)
