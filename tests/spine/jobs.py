"""Small jobs with every trait that makes training hard to repeat, and plans for them."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from batchlab.core.job import Job
from batchlab.core.plan import Plan


def toy_data(n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=dtype)
    return TensorDataset(x, (x.sin().sum(1) + 0.1 * torch.randn(n, generator=generator, dtype=dtype)))


def squared_error(module, batch):
    x, y = batch
    return (module(x).squeeze(1) - y).square().mean()


def toy_job(*, dropout=0.0, batch_norm=False, loss=squared_error, dtype=torch.float64, n=256, **changes):
    def model():
        layers = [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)]
        if batch_norm:
            layers.insert(1, nn.BatchNorm1d(16))
        if dropout:
            layers.insert(2, nn.Dropout(dropout))
        return nn.Sequential(*layers).to(dtype)

    settings = {"train": toy_data(n, dtype=dtype), "valid": toy_data(40, seed=1, dtype=dtype), "optimizer": "adamw"}
    return Job("toy", model, loss, **(settings | changes))


def toy_plan(batch_size=64, micro_batch=16, **changes):
    settings = {
        "job": "toy",
        "goal": "balanced",
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "accumulation": -(-batch_size // micro_batch),
        "world_size": 1,
        "steps": 20,
        "optimizer": "adamw",
        "learning_rate": 1e-2,
        "evaluate_every": 5,
        "checkpoint_every": 4,
    }
    return Plan(**(settings | changes))
