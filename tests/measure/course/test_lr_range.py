"""The range test of a job: trained as by a plain loop with torch's own optimizers, and what it refuses."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed
from batchlab.data.stream import SampleStream
from batchlab.measure.course.learning_rate import lr_range, range_test, set_momentum
from batchlab.optim.vrgd.optimizers import VRSGD
from tests.spine.jobs import toy_job


def line_job(optimizer):
    """Six weights without a bias, all 0.1 at first, so that torch's own optimizer needs no parameter groups."""

    def model():
        made = nn.Linear(6, 1, bias=False).double()
        nn.init.constant_(made.weight, 0.1)
        return made

    return dataclasses.replace(toy_job(optimizer=optimizer, n=32), model=model)


NAIVE = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.0, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.01),
}


@pytest.mark.parametrize("batch_size", [32, 5])
@pytest.mark.parametrize("optimizer", sorted(NAIVE))
def test_a_job_is_trained_as_by_a_plain_loop(optimizer, batch_size):
    job, ramped = line_job(optimizer), {"low": 1e-3, "high": 3.0, "steps": 40, "smoothing": 0.2, "stop_factor": 3.0}
    found = lr_range(job, batch_size=batch_size, **ramped, device="cpu", seed=4)
    model, stream, position = job.model(), SampleStream(32, derive_seed(4, "stream")), 0
    plain = NAIVE[optimizer](model.parameters())

    def update(rate):
        nonlocal position
        x, y = job.train[stream.indices(position, batch_size)]
        position += batch_size
        plain.param_groups[0]["lr"] = rate
        plain.zero_grad()
        loss = (model(x).squeeze(1) - y).square().mean()
        loss.backward()
        plain.step()
        return loss.item()

    expected = range_test(update, **ramped)
    assert found.losses == pytest.approx(expected.losses, rel=1e-9)
    assert found.smoothed == pytest.approx(expected.smoothed, rel=1e-9)
    assert found.reason == expected.reason and len(found.losses) >= 20


@pytest.mark.parametrize("batch_size", [20, 3])
def test_an_optimizer_of_groups_gets_groups_of_the_batch(batch_size):
    """Eight of two or three examples, or one each, weighted by their size."""
    job, ramped = line_job("vrsgd"), {"low": 1e-3, "high": 1.0, "steps": 12, "smoothing": 0.2}
    found = lr_range(job, batch_size=batch_size, **ramped, device="cpu", seed=4)
    model, stream, position = job.model(), SampleStream(32, derive_seed(4, "stream")), 0
    plain = VRSGD(model.parameters(), lr=0.0, momentum=0.9)

    def update(rate):
        nonlocal position
        indices = stream.indices(position, batch_size)
        position += batch_size
        plain.param_groups[0]["lr"], total = rate, 0.0
        for part in np.array_split(indices, min(8, batch_size)):
            x, y = job.train[part]
            loss = (model(x).squeeze(1) - y).square().sum() / batch_size
            loss.backward()
            plain.add_group(examples=len(part))
            total += loss.item()
        plain.step()
        plain.zero_grad()
        return total

    assert found.losses == pytest.approx(range_test(update, **ramped).losses, rel=1e-9)
    assert found.losses != pytest.approx(lr_range(line_job("sgd"), batch_size=batch_size, **ramped, seed=4).losses)


def test_a_range_test_is_a_function_of_its_seed_and_keeps_the_callers_generators():
    toy, made = toy_job(dropout=0.3), []
    job = dataclasses.replace(toy, model=lambda: made.append(toy.model()) or made[-1])
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first, again, other = (lr_range(job, steps=20, device="cpu", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert first == again and first.losses != other.losses
    assert len(made) == 3


@pytest.mark.parametrize("batch_size", [0, 33, math.nan])
def test_a_batch_that_the_data_cannot_fill_is_refused(batch_size):
    with pytest.raises(InputError, match=r"batch_size must lie in 1..32, the training examples, got "):
        lr_range(line_job("sgd"), batch_size=batch_size)


@pytest.mark.parametrize(("optimizer", "key"), [("sgd", "momentum"), ("adamw", "betas")])
def test_momentum_falls_while_the_rate_rises_as_in_a_plain_loop(optimizer, key):
    job = line_job(optimizer)
    options = {"low": 1e-3, "high": 0.5, "steps": 20, "smoothing": 0.2}
    found = lr_range(job, batch_size=8, momentum=(0.95, 0.85), validation=20, device="cpu", seed=4, **options)
    model, stream, step = job.model(), SampleStream(32, derive_seed(4, "stream")), 0
    plain = NAIVE[optimizer](model.parameters())
    x_valid, y_valid = job.valid[[2 * i for i in range(20)]]

    def update(rate):
        nonlocal step
        now = 0.95 - 0.1 * step / 19
        plain.param_groups[0].update({"lr": rate, key: now if key == "momentum" else (now, 0.999)})
        x, y = job.train[stream.indices(8 * step, 8)]
        step += 1
        plain.zero_grad()
        loss = (model(x).squeeze(1) - y).square().mean()
        loss.backward()
        plain.step()
        return loss.item()

    def validate():
        with torch.no_grad():
            return (model(x_valid).squeeze(1) - y_valid).square().mean().item()

    expected = range_test(update, validate=validate, **options)
    assert found.losses == pytest.approx(expected.losses, rel=1e-9)
    assert found.validation == pytest.approx(expected.validation, rel=1e-9)
    assert found.momenta == pytest.approx(np.linspace(0.95, 0.85, 20)[: len(found.losses)], rel=1e-12)
    without = lr_range(job, batch_size=8, device="cpu", seed=4, **options)
    assert without.momenta == () and without.losses != found.losses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": (0.85, 0.95)}, r"momentum must be \(high, low\) with 0 <= low <= high < 1, got \(0.85, 0.95\)"),
        ({"momentum": (1.0, 0.9)}, r"momentum must be \(high, low\) with"),
        ({"momentum": (math.nan, 0.9)}, r"momentum must be \(high, low\) with"),
        ({"momentum": 0.9}, r"momentum must be \(high, low\) with .* got 0.9"),
        ({"momentum": ("a", "b")}, r"momentum must be \(high, low\) with"),
        ({"batch_size": 32.5}, r"batch_size must lie in 1\.\..*, the training examples, got 32.5"),
        ({"validation": 41}, r"validation must lie in 0..40, the validation examples, got 41"),
        ({"validation": -1}, r"validation must lie in 0..40"),
        ({"spacing": "log"}, "spacing must be"),
    ],
)
def test_a_bad_range_test_of_a_job_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        lr_range(line_job("sgd"), **{"batch_size": 8, "device": "cpu"} | changes)


def test_an_optimizer_without_momentum_cycles_none():
    with pytest.raises(InputError, match="a cyclical momentum needs momentum or betas, Adagrad has neither"):
        set_momentum(torch.optim.Adagrad([nn.Parameter(torch.zeros(1))]), 0.9)
