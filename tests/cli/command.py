"""The command in a process of its own, its output kept apart."""

import os
import shlex
import subprocess
from pathlib import Path

from tests import warm

USER_JOB = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import batchlab as bl

print("hello from the job")  # must not reach stdout

def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, x.sum(1) + 0.1 * torch.randn(n, generator=generator))

def loss(module, batch):
    x, y = batch
    return (module(x).squeeze(1) - y).square().mean()

def make(name="line", **changes):
    settings = dict(model=lambda: nn.Linear(4, 1), loss=loss, train=data(256, 0), valid=data(64, 1))
    return bl.Job(name, target=bl.Target("loss", 0.5), **(settings | changes))

job = make()
def as_function():
    return make()
def nan_loss(module, batch):
    return loss(module, batch) * float("nan")
not_a_number = bl.Job("nan", lambda: nn.Linear(4, 1), nan_loss, train=data(256, 0), valid=data(64, 1))
def nothing_to_learn_from():
    return make(train=[])
number = 3
"""


def environment(**changes):
    """The environment without what would change the command's behaviour."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "RANK")}
    paths = [str(Path(__file__).parents[2] / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | changes


def batchlab(line, cwd, **changes):
    """Runs `batchlab LINE` in the folder `cwd` to its end."""
    return subprocess.run(
        [warm.command(), *shlex.split(line)],
        cwd=cwd,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
