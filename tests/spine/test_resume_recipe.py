"""What of a plan may be another when its run is resumed."""

import dataclasses
import math
import shutil

import pytest
from torch import nn

from batchlab.core.errors import (
    InputError,
)
from batchlab.core.facts import Estimate
from batchlab.core.job import Target
from batchlab.core.plan import FrontierRow, Plan, Reason
from batchlab.core.run import Run
from batchlab.optim import by_name
from batchlab.spine.train import train
from tests.spine.hard_run import lines
from tests.spine.jobs import toy_job, toy_plan

OTHER = {  # another lawful value of every field; those beneath may be another run's
    "batch_size": 32,
    "optimizer": "sgd",
    "learning_rate": 0.5,
    "hyperparameters": {"eps": 1e-7},
    "noise_scale": Estimate(64.0, 50.0, math.inf, "given"),
    "warmup_examples": 64,
    "schedule": "wsd",
    "schedule_settings": {"decay_share": 0.5},
    "batch_schedule": "norm_test",
    "batch_settings": {"eta": 0.5},
    "min_batch_size": 2,
    "max_batch_size": 200,
    "learning_rate_rule": "linear",
    "ema_half_life": 100.0,
    "average_power": 4.0,
    "clip_norm": 1.0,
    "precision": "bf16",
    "noise_every": 3,
}

MAY_DIFFER = {
    "goal": "time",
    "micro_batch": 8,
    "accumulation": 8,
    "world_size": 2,
    "steps": 8,
    "predicted_steps": Estimate(5.0, 4.0, 6.0, "given"),
    "predicted_step_seconds": 1.0,
    "compile": True,
    "evaluation_batch": 8,
    "measure_noise": False,
    "evaluate_every": 2,
    "checkpoint_every": 2,
    "target": Target("loss", -1.0),
    "reasons": {"steps": Reason("given", "user", {}, 8)},
    "frontier": (FrontierRow(64, 1, 5.0, 1.0, 1.0),),
    "notes": ("given",),
    "schema": 0,
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun") / "r"
    train(toy_job(), toy_plan(steps=4), out=folder, device="cpu")
    return folder


def test_every_field_of_a_plan_may_be_another_on_resume_or_may_not():
    assert {field.name for field in dataclasses.fields(Plan)} == {"job"} | set(OTHER) | set(MAY_DIFFER)


@pytest.mark.parametrize("change", OTHER)
def test_another_recipe_cannot_be_resumed(begun, change):
    told = Run.open(begun).meta
    needed = {"schedule_settings": {"schedule": "wsd"}, "batch_settings": {"batch_schedule": "norm_test"}}
    other = toy_plan(**{"steps": 8} | needed.get(change, {}) | {change: OTHER[change]})
    with pytest.raises(InputError, match=rf"cannot resume with .*another {change}: the run has .*, the plan says "):
        train(toy_job(), other, out=begun, resume=True, device="cpu")
    assert Run.open(begun).meta == told, "or the run could not be resumed by its own plan any more"


def test_all_that_is_another_is_said(begun):
    other = toy_plan(learning_rate_rule="linear", clip_norm=1.0)
    said = "another learning_rate_rule: the run has 'none', the plan says 'linear'; another clip_norm: the run has None"
    with pytest.raises(InputError, match=f"cannot resume with {said}, the plan says 1.0$"):
        train(toy_job(), other, out=begun, resume=True, device="cpu")


def test_what_teaches_nothing_else_may_be_another(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "r")
    other = toy_plan(**{name: value for name, value in MAY_DIFFER.items() if name != "compile"})
    run = train(toy_job(), other, out=tmp_path / "r", resume=True, device="cpu")
    assert run.summary["steps"] == 8 and run.plan.evaluate_every == 2


@pytest.mark.parametrize(
    ("plan", "seed", "message"),
    [
        (toy_plan(clip_norm=1.0), 0, "another clip_norm: the run has None, the plan says 1.0"),
        (toy_plan(), 1, "another seed: the run has 0, got 1"),
    ],
)
def test_a_run_with_no_checkpoint_yet_is_begun_again_by_its_own_recipe(begun, tmp_path, plan, seed, message):
    shutil.copytree(begun, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    with pytest.raises(InputError, match=f"cannot resume with {message}"):
        train(toy_job(), plan, out=tmp_path / "r", seed=seed, resume=True, device="cpu")
    train(toy_job(), toy_plan(steps=4), out=tmp_path / "r", resume=True, device="cpu")
    assert lines(tmp_path / "r") == lines(begun)


def test_a_run_without_a_seed_is_resumed_by_its_own(tmp_path):
    whole = train(toy_job(), toy_plan(steps=6), out=tmp_path / "whole", seed=5, device="cpu")
    train(toy_job(), toy_plan(steps=3), out=tmp_path / "r", seed=5, device="cpu")
    run = train(toy_job(), toy_plan(steps=6), out=tmp_path / "r", resume=True, device="cpu")
    assert run.meta["seed"] == 5 and [line["loss"] for line in run.steps()] == [line["loss"] for line in whole.steps()]


def test_a_run_whose_groups_were_parted_in_another_way_is_resumed_in_those(tmp_path, monkeypatch):
    def normed():
        return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 1)).double()

    job = dataclasses.replace(toy_job(), model=normed)
    whole = by_name.gains_of
    monkeypatch.setattr(by_name, "gains_of", lambda model: whole(model) | {id(model[0].weight)})
    train(job, toy_plan(steps=4), out=tmp_path / "r", device="cpu")
    there = train(job, toy_plan(steps=8), out=tmp_path / "whole", device="cpu")
    monkeypatch.undo()
    run = train(job, toy_plan(steps=8), out=tmp_path / "r", resume=True, device="cpu")
    assert [line["loss"] for line in run.steps()] == [line["loss"] for line in there.steps()]


def test_another_micro_batch_goes_on_with_the_same_stream(tmp_path):
    job, plan = toy_job(), toy_plan(steps=10)
    train(job, plan, out=tmp_path / "whole", device="cpu")
    train(job, dataclasses.replace(plan, steps=5), out=tmp_path / "r", device="cpu")
    train(job, dataclasses.replace(plan, micro_batch=23, accumulation=3), out=tmp_path / "r", resume=True, device="cpu")
    for a, b in zip(lines(tmp_path / "whole"), lines(tmp_path / "r"), strict=True):
        assert (a["step"], a["position"], a["batch_size"], a["lr"]) == (
            b["step"],
            b["position"],
            b["batch_size"],
            b["lr"],
        )
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-12)
