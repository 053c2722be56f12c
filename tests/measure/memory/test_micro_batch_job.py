"""A job in the finder: failures in each phase leave nothing behind, and neither model, generators nor data change."""

import gc
import os
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from batchlab.core.errors import InputError
from batchlab.core.job import Job
from batchlab.measure.memory.micro_batch import find_micro_batch
from tests.measure.memory.limited import _quick as _quick
from tests.measure.memory.limited import toy_job
from tests.spine.forked import in_child
from tests.spine.jobs import toy_data

PHASES = ("data", "forward", "backward", "step", "evaluation")


class Bulky(nn.Module):
    """Keeps a weak reference to every activation, and fails on demand."""

    def __init__(self, failing, limit, seen):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(100))
        self.register_buffer("passes", torch.zeros(()))
        self.failing, self.limit, self.seen, self.size, self.failures = failing, limit, seen, 0, 0

    def check(self, place):
        if self.failing == place and self.size > self.limit:
            self.failures += 1
            raise RuntimeError("HIP out of memory. Tried to allocate")

    def forward(self, x):
        self.size = len(x)
        self.passes += 1
        activation = x[:, None] * self.weight
        self.seen.append(weakref.ref(activation))
        self.check("forward" if self.training else "evaluation")
        if activation.requires_grad:
            activation.register_hook(lambda gradient: self.check("backward"))
        return activation.square()


def bulky_job(failing, limit, seen):
    """A job that fails above `limit`, its models, and what makes the optimizer's step fail too, while it is hooked."""
    data, models = torch.arange(1024.0), []

    def model():
        models.append(Bulky(failing, limit, seen))
        return models[-1]

    def collate(batch):
        models[-1].size = len(batch)
        models[-1].check("data")
        return torch.stack(batch)

    job = Job("bulky", model, lambda m, x: m(x).mean(), data, data, collate=collate)
    return job, models, register_optimizer_step_pre_hook(lambda *_: models[-1].check("step"))


def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def failed_steps(failing, least, limit=130):
    """Searches until `least` steps have failed in that phase; returns the failures, and what the steps kept alive."""
    seen, failures, alive = [], 0, 0
    while failures < least:
        job, models, hook = bulky_job(failing, limit, seen)
        found = find_micro_batch(job, start=512, saturation=0, rel_gap=0, device="cpu")
        hook.remove()
        assert found.size == limit
        assert {each.phase for each in found.tries if not each.fits} == {failing}
        failures += models[0].failures
        dead = weakref.ref(models.pop())
        gc.collect()
        alive += dead() is not None
    return failures, alive + sum(reference() is not None for reference in seen)


def leaves_nothing_behind():
    """A process of its own: a worker's heap moves by itself. What was imported is frozen: it is collected for ever."""
    torch.set_num_threads(1)
    gc.freeze()
    own = Bulky("", 0, [])
    optimizer = torch.optim.AdamW(own.parameters())
    own(torch.ones(3)).sum().backward()
    optimizer.step()

    def state():
        tensors = [own.weight, own.weight.grad, own.passes, *optimizer.state[own.weight].values()]
        generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        return [tensor.clone() for tensor in tensors], generators

    before, generators = state()
    for failing in PHASES:
        failed_steps(failing, 1)  # loads what is loaded once
    gc.collect()
    gc.freeze()
    for failing in PHASES:
        held = resident()
        failures, alive = failed_steps(failing, 100)
        assert failures >= 100 and alive == 0
        assert resident() - held <= 2**20 + 1e-3 * held, failing
    after, generators_after = state()
    assert all(map(torch.equal, before, after)) and own.training
    assert torch.equal(generators[0], generators_after[0]) and generators[2] == generators_after[2]
    assert np.array_equal(generators[1], generators_after[1])


def test_a_hundred_failures_in_each_phase_leave_nothing_behind():
    assert in_child(leaves_nothing_behind, method="spawn", timeout=300) == 0


def test_an_evaluation_that_runs_out_is_told_from_a_training_step():
    """The metric takes memory that grows faster than that of the step; without it the step's own limit counts."""
    data = torch.zeros(256, 3)

    def metric(module, batch):
        if len(batch) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"pairs": 0.0}

    job = Job("pairs", lambda: nn.Linear(3, 1), lambda m, x: m(x).mean(), data, data[:200], metric=metric)
    settings = {"saturation": 0, "rel_gap": 0, "start": 32, "device": "cpu"}
    found = find_micro_batch(job, **settings)
    assert (found.size, found.why) == (20, "21 does not fit (evaluation)")
    assert find_micro_batch(job, **settings, evaluation=False).size == 256


def test_tensors_of_a_failed_step_die_before_the_next_one():
    alive = []

    def step(size):
        assert not any(reference() is not None for reference in alive)
        held = torch.empty(1000)
        alive.append(weakref.ref(held))
        if size > 20:
            try:
                raise MemoryError("inner")
            except MemoryError as error:
                raise RuntimeError("CUDA out of memory.") from error

    assert find_micro_batch(step, max_size=64, rel_gap=0).size == 20
    assert len(alive) > 4


def test_neither_model_nor_generators_nor_data_change():
    made = []

    def model():
        made.append(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).double())
        return made[-1]

    own = model()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    job = toy_job(model=model)
    state = torch.get_rng_state()
    found = find_micro_batch(job, start=2, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert 2 <= found.size <= len(job.train) and len(made) == 2
    assert all(each.peak_bytes is None or each.peak_bytes >= 0 for each in found.tries)


def test_the_state_of_the_optimizer_is_there_before_the_first_size():
    found_state = []

    def loss(module, batch):
        x, y = batch
        frame = __import__("sys")._getframe()
        while "self" not in frame.f_locals or not hasattr(frame.f_locals["self"], "optimizer"):
            frame = frame.f_back
        found_state.append(len(frame.f_locals["self"].optimizer.state))
        return (module(x).squeeze(1) - y).square().mean()

    job = Job("toy", lambda: nn.Linear(6, 1).double(), loss, toy_data(64), toy_data(8, seed=1), optimizer="adamw")
    find_micro_batch(job, device="cpu", evaluation=False)
    assert found_state and all(count == 2 for count in found_state)


class Narrow(nn.Module):
    """Normalises over the batch, and fails above a limit; notes the sizes in training."""

    def __init__(self, limit, seen):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
        self.limit, self.seen = limit, seen

    def forward(self, x):
        if self.training:
            self.seen.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.layers(x)


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"start": 1}, {"saturation": 0.0, "start": 64}])
def test_a_model_that_normalises_over_the_batch_is_not_run_with_one_example(limit, settings):
    seen = []
    job = toy_job(lambda: Narrow(limit, seen))
    if limit == 1:
        with pytest.raises(InputError, match="^not even 2 examples fit in memory, it ran out in the phase 'forward'"):
            find_micro_batch(job, device="cpu", evaluation=False, **settings)
    else:
        assert find_micro_batch(job, device="cpu", evaluation=False, **settings).size == limit
    assert min(seen) >= 2


def test_one_example_alone_is_refused_where_the_model_normalises_over_the_batch():
    with pytest.raises(InputError, match="max_size must be at least 2, the fewest that can be run, got 1"):
        find_micro_batch(toy_job(lambda: Narrow(9, [])), device="cpu", max_size=1)
