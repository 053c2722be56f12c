"""What a test does in one of DiLoCo's ranks: an optimizer over the group, steps on the rank's batches, its results."""

import torch
import torch.distributed as dist

from batchlab.optim.diloco.diloco import DiLoCo
from tests.optim.diloco.diloco_fixture import backward, batch


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def optimizer_of(model, inner=adamw, **settings):
    settings = {"inner_steps": 3, "outer_lr": 0.6, "process_group": dist.group.WORLD} | settings
    return DiLoCo(inner(model.parameters()), **settings)


def train(model, optimizer, steps, replica=None):
    """steps: their numbers. The replica's batches are those of its rank unless told."""
    for step in steps:
        backward(model, *batch(dist.get_rank() if replica is None else replica, step))
        optimizer.step()


def saved(folder, world):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def save(folder, **found):
    torch.save(found, folder / f"{dist.get_rank()}.pt")
