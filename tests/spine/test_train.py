"""One run: what is written of it, and what it refuses."""

import dataclasses
import json
import math
import os
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from batchlab.core.checkpoint import checkpoints, load_checkpoint
from batchlab.core.errors import (
    InputError,
    NonFiniteError,
    RunLockedError,
)
from batchlab.core.job import Job, Target
from batchlab.core.run import Run
from batchlab.core.store import RunWriter
from batchlab.spine.train import train
from tests.spine.hard_run import HARD_PLAN, hard_job, state
from tests.spine.jobs import squared_error, toy_job, toy_plan


def test_a_run_is_written_and_read(tmp_path):
    heard = []
    target = Target("loss", 0.5)
    run = train(
        toy_job(), toy_plan(steps=400, target=target), out=tmp_path / "r", callbacks=[heard.append], device="cpu"
    )
    steps = list(run.steps())
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1)) == [line["step"] for line in heard]
    assert steps[-1]["position"] == 64 * len(steps)
    assert run.summary["status"] == "reached" and run.summary["target_step"] == len(steps)
    assert run.summary["final"]["loss"] <= 0.5 and len(steps) % 5 == 0
    assert run.plan.target == target and run.meta["job"]["train_examples"] == 256
    model = toy_job().model()
    model.load_state_dict(load_file(run.path / "model.safetensors"))
    with torch.no_grad():
        assert squared_error(model, toy_job().valid[:]).item() == pytest.approx(run.summary["final"]["loss"])


class _OneStorage(nn.Module):
    """Two parameters in one storage, as cuDNN lays out an LSTM's; one of them has a second name."""

    def __init__(self):
        super().__init__()
        flat = torch.randn(6 + 1, dtype=torch.float64)
        self.weight, self.bias = nn.Parameter(flat[:6]), nn.Parameter(flat[6:])
        self.zero = self.bias

    def forward(self, x):
        return (x @ self.weight + self.zero)[:, None]


def test_weights_that_share_a_storage_are_written_once_each(tmp_path):
    job = dataclasses.replace(toy_job(), model=_OneStorage)
    run = train(job, toy_plan(steps=3), out=tmp_path / "r", device="cpu")
    written = load_file(run.path / "model.safetensors")
    assert {name: tuple(weight.shape) for name, weight in written.items()} == {"weight": (6,), "bias": (1,)}
    model = _OneStorage()
    model.load_state_dict(written | {"zero": written["bias"]})
    with torch.no_grad():
        assert squared_error(model, job.valid[:]).item() == pytest.approx(run.summary["final"]["loss"])
    with safe_open(run.path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "zero": "bias"}


def test_the_callers_generators_are_left_alone(tmp_path):
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.random.get_rng_state(), random.getstate()
    train(hard_job(), HARD_PLAN, out=tmp_path / "r", device="cpu")
    assert torch.equal(torch.random.get_rng_state(), expected[0]) and random.getstate() == expected[1]


def test_a_second_trainer_is_refused_and_told_of_the_first(tmp_path):
    with (
        RunWriter(tmp_path / "r", {"schema": 1}),
        pytest.raises(RunLockedError, match=rf"is being written by process {os.getpid()} on "),
    ):
        train(toy_job(), toy_plan(), out=tmp_path / "r", device="cpu")


def test_nan_from_the_start_writes_nothing(tmp_path):
    job = toy_job(loss=lambda module, batch: squared_error(module, batch) * math.nan)
    with pytest.raises(InputError, match="job loss is nan on the first micro-batch"):
        train(job, toy_plan(), out=tmp_path / "r", device="cpu")
    assert not (tmp_path / "r").exists()


def test_non_finite_steps_are_recorded_and_stop_the_run_when_there_are_too_many(tmp_path):
    calls = []

    def loss(module, batch):
        calls.append(module.training)
        value = squared_error(module, batch)
        return value * math.inf if 8 < sum(calls) <= 12 or sum(calls) > 24 else value

    said = "not finite, the last at step 11 .* The learning rate was 0.01: take a lower one, in another folder"
    with pytest.raises(NonFiniteError, match=said):
        train(toy_job(loss=loss), toy_plan(), out=tmp_path / "r", device="cpu")
    run = Run.open(tmp_path / "r")
    assert [line["step"] for line in run.steps() if line["skipped"]] == [3, 7, 8, 9, 10, 11]
    assert next(line for line in run.steps() if line["step"] == 3)["loss"] in ("inf", "nan")
    assert run.summary["status"] == "stopped" and run.summary["skipped_steps"] == 6
    assert state(run.path)["learner"]["step"] == 11


def test_an_error_in_the_users_code_is_kept_and_passed_on(tmp_path):
    calls = []

    def loss(module, batch):
        calls.append(module.training)
        if sum(calls) == 10:
            raise KeyError("lost label")
        return squared_error(module, batch)

    with pytest.raises(KeyError, match="lost label"):
        train(toy_job(loss=loss), toy_plan(), out=tmp_path / "r", device="cpu")
    run = Run.open(tmp_path / "r")
    assert run.meta["status"] == "stopped" and run.meta["error"] == "KeyError: 'lost label'"
    assert run.summary["steps"] == 2
    resumed = train(toy_job(), toy_plan(), out=tmp_path / "r", resume=True, device="cpu")
    assert resumed.meta["error"] is None and resumed.summary["status"] == "finished"


def test_the_target_that_never_comes_is_said(tmp_path):
    run = train(toy_job(), toy_plan(steps=6, target=Target("loss", -1.0)), out=tmp_path / "r", device="cpu")
    assert run.summary["status"] == "not reached" and run.summary["target_step"] is None


def test_a_target_met_at_the_start_is_said(tmp_path):
    run = train(toy_job(), toy_plan(target=Target("loss", 1e9)), out=tmp_path / "r", device="cpu")
    assert run.summary["status"] == "reached" and run.summary["target_step"] == 0
    assert list(run.steps()) == []
    assert len(checkpoints(run.path / "checkpoints")) == 1  # so that `probe --at` finds one


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (toy_plan(batch_size=300, micro_batch=300), "plan batch_size 300 is larger than the data set of 256 examples"),
        (toy_plan(job="other"), "the plan is for the job 'other', this job is 'toy'"),
        (toy_plan(target=Target("accuracy", 1.0, "max")), "target metric 'accuracy' is not among the measured"),
    ],
)
def test_plans_that_do_not_fit_are_refused(tmp_path, plan, message):
    with pytest.raises(InputError, match=message):
        train(toy_job(), plan, out=tmp_path / "r", device="cpu")
    assert not (tmp_path / "r").exists()


def test_a_plan_for_other_devices_is_said_to_be(tmp_path):
    plan = toy_plan(steps=2, micro_batch=16, accumulation=1, world_size=4, predicted_step_seconds=1e-3)
    run = train(toy_job(), plan, out=tmp_path / "r", device="cpu")
    assert (run.plan.world_size, run.plan.accumulation, run.plan.predicted_step_seconds) == (1, 4, None)
    assert run.plan.notes == ("planned for 4 devices with 1 passes, run on 1 with 4: the predicted time does not hold",)


def test_a_batch_too_small_for_batch_normalisation_is_refused_before_anything_is_written(tmp_path):
    plan = toy_plan(batch_size=1, micro_batch=1, accumulation=1)
    with pytest.raises(InputError, match="^plan batch_size 1 leaves a pass of one example, whose batch norm"):
        train(hard_job(), plan, out=tmp_path / "r", device="cpu")
    assert not (tmp_path / "r").exists()


def test_one_example_of_several_places_is_enough_for_batch_normalisation(tmp_path):
    image = torch.randn(32, 3, 4, 4)
    model = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))  # noqa: E731
    job = Job("conv", model, lambda m, x: m(x[0]).square().mean(), TensorDataset(image), TensorDataset(image[:4]))
    plan = dataclasses.replace(toy_plan(batch_size=1, micro_batch=1, accumulation=1, steps=3), job="conv", target=None)
    assert train(job, plan, out=tmp_path / "r", device="cpu").summary["steps"] == 3


def test_integers_of_numpy_are_integers(tmp_path):
    plan = toy_plan(batch_size=np.int64(64), micro_batch=np.int32(64), steps=np.int64(2), learning_rate=np.float32(0.5))
    run = train(toy_job(), plan, out=tmp_path / "r", seed=np.int64(3), device="cpu")
    assert run.plan == plan and run.meta["seed"] == 3
    with pytest.raises(InputError, match="seed must be an integer, got True"):
        train(toy_job(), plan, out=tmp_path / "r", seed=True, device="cpu")


def test_what_is_written_holds_no_pickle(tmp_path):
    folder = tmp_path / "r"
    train(hard_job(), HARD_PLAN, out=folder, device="cpu")
    texts = [(folder / "run.json").read_text(), *(folder / "steps.jsonl").read_text().splitlines()]
    for text in texts:
        json.loads(text, parse_constant=pytest.fail)
    written = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert written == {".json", ".jsonl", ".safetensors", ".lock"}
    for path in checkpoints(folder / "checkpoints"):
        assert load_checkpoint(path)["learner"]["seed"] == 0
