"""A linear model on 200 points, and facts for it made by hand: a sweep of it takes a second.

`finished` is a sweep of three sizes, run once for every module that imports it.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from batchlab.core.facts import Estimate
from batchlab.core.job import Job, Target
from batchlab.spine.sweep import sweep
from tests.spine.facts_fixture import hand_facts

TARGET = Target("loss", 1.0)
SIZES, TRIALS, SEEDS = [4, 16, 64], 4, 2


def points(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    return TensorDataset(x, x.sum(1) + 0.7 * torch.randn(n, generator=generator))


def squared_error(module, batch):
    x, y = batch
    return (module(x).squeeze(1) - y).square().mean()


def linear_job(*, loss=squared_error, target=TARGET, **changes):
    settings = {
        "name": "linear",
        "train": points(200, 0),
        "valid": points(100, 1),
        "optimizer": "sgd",
        "target": target,
    }
    return Job(model=lambda: nn.Linear(8, 1), loss=loss, **(settings | changes))


def linear_facts(target=TARGET, **changes):
    settings = {
        "job": "linear",
        "optimizer": "sgd",
        "examples": 200,
        "noise_scale": Estimate(8.0, 4.0, 16.0, "set by hand"),
        "s_min": 15.0,
        "pass_seconds": 0.1,
        "base_batch_size": 16,
        "base_learning_rate": 0.01,
        "micro_batches": (1, 4, 16, 64, 200),
        "target": target,
    }
    return hand_facts(**(settings | changes))


def quick(out, *, job=None, facts=None, **changes):
    settings = {"batch_sizes": SIZES, "trials": TRIALS, "seeds": SEEDS, "facts": facts or linear_facts()}
    return sweep(job or linear_job(), out=out, **(settings | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    before = torch.random.get_rng_state()
    seen = []
    study = quick(tmp_path_factory.mktemp("sweep") / "study", progress=lambda phase, done: seen.append((phase, done)))
    assert torch.equal(torch.random.get_rng_state(), before)
    return study, seen


def searched(study, size):
    return [t for t in study.trials() if t["batch_size"] == size and t["kind"] == "search"]


def steps_of(study):
    return sorted(
        (t["batch_size"], t["kind"], t["learning_rate"], t["seed"], t["steps_to_target"]) for t in study.trials()
    )
