import dataclasses
import json
import math
import os
import random
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from batchlab.core import files
from batchlab.core.checkpoint import checkpoints, load_checkpoint, newest_whole
from batchlab.core.errors import (
    CheckpointError,
    InputError,
    Interrupted,
    NonFiniteError,
    RunLockedError,
    StorageError,
)
from batchlab.core.facts import Estimate
from batchlab.core.job import Target
from batchlab.core.plan import FrontierRow, Plan, Reason
from batchlab.core.run import STEPS_FILE, Run
from batchlab.core.store import RunWriter
from batchlab.optim import by_name
from batchlab.spine.train import train
from tests.spine.forked import in_child
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(hard_job(), HARD_PLAN, out=folder, device="cpu")
    return folder


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


def _kill_at_call(number):
    """A loss that kills its process, without warning, at its number-th call: inside an accumulation."""
    calls = []

    def loss(module, batch):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return squared_error(module, batch)

    return loss


def _train_killed(folder, where, number):
    loss = squared_error
    if where == "loss":
        loss = _kill_at_call(number)
    elif where == "time":
        threading.Timer(number / 1000, os.kill, (os.getpid(), signal.SIGKILL)).start()
    else:
        original, calls = getattr(files.os, where), []

        def dying(*arguments):
            calls.append(None)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        setattr(files.os, where, dying)
    train(hard_job(loss), HARD_PLAN, out=folder, device="cpu")


def _kills():
    """50 places: inside accumulations, at renames and fsyncs of checkpoints and run.json, and at any time."""
    draw = random.Random(0)
    yield from (("loss", draw.randint(1, 24 * 4)) for _ in range(20))
    yield from (("fsync", draw.randint(1, 20)) for _ in range(10))
    yield from (("replace", draw.randint(1, 10)) for _ in range(10))
    yield from (("time", draw.randint(1, 400)) for _ in range(10))


@pytest.mark.parametrize(("where", "number"), list(_kills()))
def test_kill_and_resume_is_bit_identical(tmp_path, uninterrupted, where, number):
    folder = tmp_path / "run"
    code = in_child(_train_killed, folder, where, number)
    assert code == -signal.SIGKILL or (where == "time" and code == 0)
    begun = (folder / "run.json").exists()
    train(hard_job(), HARD_PLAN, out=folder, resume=begun, device="cpu")
    assert lines(folder) == lines(uninterrupted)
    assert same(state(folder), state(uninterrupted))
    assert (folder / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_resumes_the_same(tmp_path, uninterrupted, number):
    def ask(line):
        if line["step"] == 7:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        train(hard_job(), HARD_PLAN, out=tmp_path / "r", callbacks=[ask], device="cpu")
    assert caught.value.signum == number and signal.getsignal(number) is before
    assert f"or batchlab train JOB --out {tmp_path / 'r'} --resume" in str(caught.value)
    run = Run.open(tmp_path / "r")
    assert run.summary["status"] == "interrupted" and run.summary["steps"] == 7
    assert state(run.path)["learner"]["step"] == 7
    train(hard_job(), HARD_PLAN, out=tmp_path / "r", resume=True, device="cpu")
    assert lines(tmp_path / "r") == lines(uninterrupted) and same(state(tmp_path / "r"), state(uninterrupted))


def test_a_user_handler_is_called_and_put_back(tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("mine"))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Interrupted):
            train(
                toy_job(),
                toy_plan(),
                out=tmp_path / "r",
                callbacks=[lambda _: signal.raise_signal(15) if not heard else None],
            )
        assert heard == ["mine"] and signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


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


def test_a_truncated_checkpoint_and_a_torn_line_fall_back(tmp_path, uninterrupted):
    folder = tmp_path / "r"
    train(hard_job(), dataclasses.replace(HARD_PLAN, steps=14), out=folder, device="cpu")
    newest = checkpoints(folder / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    with (folder / "steps.jsonl").open("ab") as file:
        file.write(b'{"step": 15, "loss"')
    train(hard_job(), HARD_PLAN, out=folder, resume=True, device="cpu")
    assert lines(folder) == lines(uninterrupted)


def test_no_whole_checkpoint_is_said(tmp_path):
    train(toy_job(), toy_plan(steps=4), out=tmp_path / "r", device="cpu")
    for path in checkpoints(tmp_path / "r" / "checkpoints"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        train(toy_job(), toy_plan(steps=8), out=tmp_path / "r", resume=True, device="cpu")


def test_a_finished_run_resumed_stays_as_it_is(tmp_path):
    plan = toy_plan(steps=400, target=Target("loss", 0.5))
    first = train(toy_job(), plan, out=tmp_path / "r", device="cpu").summary
    assert train(toy_job(), plan, out=tmp_path / "r", resume=True, device="cpu").summary == first


def test_a_second_trainer_is_refused_and_told_of_the_first(tmp_path):
    with (
        RunWriter(tmp_path / "r", {"schema": 1}),
        pytest.raises(RunLockedError, match=rf"is being written by process {os.getpid()} on "),
    ):
        train(toy_job(), toy_plan(), out=tmp_path / "r", device="cpu")


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


@pytest.mark.parametrize("call", [1, 3, 8])
def test_a_full_disk_ends_the_run_and_keeps_what_was_written(tmp_path, monkeypatch, call, uninterrupted):
    folder, calls, fsync = tmp_path / "r", [], os.fsync

    def full(descriptor):
        calls.append(None)
        if len(calls) >= call + 4:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("batchlab.core.files.os.fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            train(hard_job(), HARD_PLAN, out=folder, device="cpu")
    train(hard_job(), HARD_PLAN, out=folder, resume=True, device="cpu")
    assert lines(folder) == lines(uninterrupted) and same(state(folder), state(uninterrupted))


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


def test_integers_of_numpy_are_integers(tmp_path):
    plan = toy_plan(batch_size=np.int64(64), micro_batch=np.int32(64), steps=np.int64(2), learning_rate=np.float32(0.5))
    run = train(toy_job(), plan, out=tmp_path / "r", seed=np.int64(3), device="cpu")
    assert run.plan == plan and run.meta["seed"] == 3
    with pytest.raises(InputError, match="seed must be an integer, got True"):
        train(toy_job(), plan, out=tmp_path / "r", seed=True, device="cpu")


def test_what_is_written_holds_no_pickle(uninterrupted):
    texts = [(uninterrupted / "run.json").read_text(), *(uninterrupted / "steps.jsonl").read_text().splitlines()]
    for text in texts:
        json.loads(text, parse_constant=pytest.fail)
    written = {path.suffix for path in uninterrupted.rglob("*") if path.is_file()}
    assert written == {".json", ".jsonl", ".safetensors", ".lock"}
    for path in checkpoints(uninterrupted / "checkpoints"):
        assert load_checkpoint(path)["learner"]["seed"] == 0


def test_lines_that_are_gone_are_told_of_once(tmp_path):
    folder = tmp_path / "r"
    train(toy_job(), toy_plan(steps=6, checkpoint_every=2), out=folder, device="cpu")
    kept = (folder / STEPS_FILE).read_text().splitlines(keepends=True)[:2]
    (folder / STEPS_FILE).write_text("".join(kept))
    for steps, before in ((8, 6), (9, 8)):
        plan = dataclasses.replace(Run.open(folder).plan, steps=steps)
        run = train(toy_job(), plan, out=folder, resume=True, device="cpu")
        (lacking,) = [note for note in run.plan.notes if "lacks" in note]
        assert lacking.startswith(f"{STEPS_FILE} lacks 4 of the {before} updates before the checkpoint")


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
