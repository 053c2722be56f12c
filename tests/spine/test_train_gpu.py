"""Runs on a GPU: written, resumed exactly, and carried between the GPU and the CPU."""

import dataclasses
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from batchlab.core.checkpoint import newest_whole
from batchlab.core.errors import Interrupted
from batchlab.core.facts import Estimate
from batchlab.core.job import Target
from batchlab.core.random import preserved_generators, reseed
from batchlab.spine.folder import WEIGHTS_FILE
from batchlab.spine.train import train
from batchlab.workloads.digits import digits
from tests.spine.forked import in_child
from tests.spine.hard_run import lines, same, state
from tests.spine.jobs import squared_error, toy_job, toy_plan

pytestmark = pytest.mark.gpu
NOISE = Estimate(64.0, 50.0, 80.0, "given")
HARD = {"dropout": 0.2, "batch_norm": True, "dtype": torch.float32}
PLANS = {
    "float32": {"ema_half_life": 300.0},
    "bf16": {"average_power": 3.0, "precision": "bf16", "clip_norm": 1.0},
    "adaptive": {"batch_schedule": "adaptive", "noise_scale": NOISE, "max_batch_size": 256},
}


@pytest.mark.parametrize("name", PLANS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(accelerator, tmp_path, name):
    job, plan = toy_job(**HARD), toy_plan(steps=18, **PLANS[name])
    where = {"device": str(accelerator)}
    whole = train(job, plan, out=tmp_path / "whole", **where)

    def ask(line):
        if line["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM after step 7"):
        train(job, plan, out=tmp_path / "parts", callbacks=[ask], **where)
    torch.rand(5, device=accelerator)
    again = train(job, plan, out=tmp_path / "parts", resume=True, **where)
    assert again.summary["status"] == "finished"
    assert lines(whole.path) == lines(again.path)
    assert same(state(whole.path)["learner"], state(again.path)["learner"])
    assert same(load_file(whole.path / WEIGHTS_FILE), load_file(again.path / WEIGHTS_FILE))


@pytest.mark.parametrize("back", [False, True])
def test_a_run_is_carried_between_the_gpu_and_the_cpu(accelerator, tmp_path, back):
    job, plan = toy_job(batch_norm=True), toy_plan(steps=16, ema_half_life=200.0, clip_norm=2.0)
    whole = train(job, plan, out=tmp_path / "whole", device="cpu")
    first, second = ("cpu", str(accelerator)) if back else (str(accelerator), "cpu")
    train(job, dataclasses.replace(plan, steps=6), out=tmp_path / "parts", device=first)
    run = train(job, plan, out=tmp_path / "parts", resume=True, device=second)
    assert run.meta["device"] == second
    for mine, theirs in zip(lines(run.path), lines(whole.path), strict=True):
        assert mine["position"] == theirs["position"] and mine["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        if "valid" in theirs:
            assert mine["valid"] == pytest.approx(theirs["valid"], rel=1e-9)
    mine, theirs = (load_file(each.path / WEIGHTS_FILE) for each in (run, whole))
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-8, atol=1e-10)


def test_digits_in_bf16_learns_and_resumes(accelerator, tmp_path, monkeypatch):
    """Bit for bit where cuDNN is told to be deterministic."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    job, target = digits(), Target("accuracy", 0.9, "max")
    settings = {"job": "digits", "micro_batch": 64, "evaluate_every": 20, "checkpoint_every": 15, "precision": "bf16"}
    plan = toy_plan(64, steps=60, **({"learning_rate": 3e-3} | settings))
    whole = train(job, plan, out=tmp_path / "whole", device=str(accelerator))
    train(job, dataclasses.replace(plan, steps=30), out=tmp_path / "parts", device=str(accelerator))
    again = train(job, plan, out=tmp_path / "parts", resume=True, device=str(accelerator))
    assert same(state(whole.path)["learner"], state(again.path)["learner"])
    assert target.reached(whole.summary["final"]["accuracy"])
    model = digits().model()
    model.load_state_dict(load_file(whole.path / WEIGHTS_FILE))
    batch = job.collate([job.valid[i] for i in range(len(job.valid))])
    with torch.no_grad():
        accuracy = job.metric(model, batch)["accuracy"].item()
    assert accuracy == pytest.approx(whole.summary["final"]["accuracy"], abs=0.03)


def test_weights_that_share_one_storage_are_written(accelerator, tmp_path):
    """As an LSTM's do on a GPU; and tied ones are written once."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 1)
            self.again = self.head

        def forward(self, x):
            return self.again(self.lstm(x[:, None])[0][:, -1])

    job = dataclasses.replace(toy_job(dtype=torch.float32), model=Recurrent)
    run = train(job, toy_plan(steps=3, ema_half_life=100.0), out=tmp_path / "r", device=str(accelerator))
    written, kept = load_file(run.path / WEIGHTS_FILE), newest_whole(run.path / "checkpoints")[0]["learner"]
    assert {"lstm.weight_ih_l0", "lstm.bias_hh_l0", "again.weight"} <= written.keys() and "head.weight" not in written
    model = Recurrent()
    model.load_state_dict(written | {name.replace("again", "head"): written[name] for name in written})
    with torch.no_grad():
        loss = squared_error(model, job.valid[:]).item()
    assert loss == pytest.approx(run.summary["final"]["loss"], rel=2e-3)
    assert kept["step"] == 3


def test_the_callers_generators_are_left_alone_on_the_device_too(accelerator, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4), torch.rand(4, device=accelerator)
    torch.manual_seed(3)
    train(toy_job(**HARD), toy_plan(steps=3), out=tmp_path / "r", device=str(accelerator))
    assert torch.equal(torch.rand(4), expected[0])
    assert torch.equal(torch.rand(4, device=accelerator), expected[1])


def _draws_on_the_cpu():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with preserved_generators():
        reseed(7)
        assert not torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.rand(3), expected)


def test_a_fork_of_a_process_that_used_the_gpu_keeps_its_own_generators(accelerator):
    """As a loader's worker is; it cannot reach the GPU's."""
    torch.ones(1, device=accelerator).item()
    assert in_child(_draws_on_the_cpu) == 0
