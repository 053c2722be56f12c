"""Probe, plan, train, findings and sweep with everything on the GPU."""

import dataclasses
import math

import pytest
import torch

from batchlab.core.facts import Facts
from batchlab.core.plan import Plan
from batchlab.core.random import preserved_generators
from batchlab.spine.findings import findings
from batchlab.spine.learner import Learner
from batchlab.spine.plan import plan
from batchlab.spine.probe import probe
from batchlab.spine.train import train
from batchlab.spine.tune import tune
from batchlab.workloads import digits, syntax
from tests.spine.jobs import toy_job, toy_plan

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("make", [digits, lambda: toy_job(batch_norm=True, dtype=torch.float32)], ids=["digits", "toy"])
def test_probe_plan_train(accelerator, tmp_path, make):
    job = make()
    torch.manual_seed(5)
    expected = torch.rand(3, device=accelerator)
    torch.manual_seed(5)
    facts = probe(job, budget=5.0, device=accelerator)
    assert torch.equal(torch.rand(3, device=accelerator), expected)
    assert facts == Facts.from_json(facts.to_json()) and facts.device == str(accelerator)
    assert all(point.seconds.value > 0 for point in facts.micro_batches)
    if accelerator.type == "cuda":
        peaks = [point.memory_bytes for point in facts.micro_batches if point.memory_bytes is not None]
        assert facts.machine["gpus"] and peaks and peaks[0] > 0 and peaks == sorted(peaks)
    assert facts.noise_scale.value > 0 and facts.update_seconds.value > 0
    assert math.isfinite(facts.base_learning_rate) and facts.reference.steps >= 15
    made = plan(job, facts)
    assert made == Plan.from_json(made.to_json()) and made.micro_batch <= facts.max_micro_batch
    run = train(job, dataclasses.replace(made, steps=30), out=tmp_path / "r", facts=facts, device=str(accelerator))
    assert run.meta["device"] == str(accelerator) and run.summary["status"] in ("reached", "not reached")
    assert run.summary["final"]["loss"] < run.meta["initial"]["loss"]


@pytest.mark.parametrize("make", [digits, lambda: syntax(context=16)], ids=["convolutions", "lstm"])
def test_single_facts(accelerator, make):
    """Curvature needs second derivatives, which cuDNN's recurrent layers do not have."""
    found = findings(make(), ["noise", "memory", "curvature", "landscape"], budget=4.0, device=accelerator)
    assert found.device == str(accelerator)
    assert found.noise.noise_scale.value > 0 and found.memory.size >= 1
    assert math.isfinite(found.curvature.trace.value)
    assert math.isfinite(found.landscape.level)


def test_facts_at_a_run_of_the_device_are_those_on_the_cpu(accelerator, tmp_path):
    job = toy_job()
    run = train(job, toy_plan(steps=5), out=tmp_path / "r", device=str(accelerator))
    there, here = (findings(job, ["curvature"], at=run, budget=4.0, device=d) for d in (accelerator, "cpu"))
    assert there.weights == here.weights
    sharpest, expected = there.curvature.largest[0].value, here.curvature.largest[0].value
    same_sample = there.curvature.examples == here.curvature.examples  # it is as large as the time allows
    assert sharpest == pytest.approx(expected, rel=1e-6 if same_sample else 0.5)


def test_tune_from_python(accelerator, tmp_path):
    pytest.importorskip("plotly")
    run = tune(toy_job(), out=tmp_path / "r", budget=4.0, device=str(accelerator), max_steps=20)
    assert run.facts.device == run.meta["device"] == str(accelerator)
    assert "<html" in (run.path / "report.html").read_text()


def test_a_sweep_of_two_sizes(accelerator, tmp_path):
    pytest.importorskip("optuna")
    from tests.spine.sweep_jobs import quick

    study = quick(tmp_path / "s", batch_sizes=[16, 64], trials=2, device=str(accelerator))
    assert study.summary["status"] == "finished"
    assert [row["batch_size"] for row in study.rows()] == [16, 64]
    here = quick(tmp_path / "cpu", batch_sizes=[16, 64], trials=2, device="cpu")
    for mine, theirs in zip(study.rows(), here.rows(), strict=True):
        assert mine["median"] == pytest.approx(theirs["median"], rel=0.1, abs=1)


def test_data_that_lies_on_the_device_trains_there_and_on_the_cpu(accelerator):
    job, plan_ = toy_job(), toy_plan()
    data = torch.utils.data.TensorDataset(*(t.to(accelerator) for t in job.train.tensors))
    there = dataclasses.replace(job, train=data)
    losses = []
    with preserved_generators():
        for each, device in ((job, "cpu"), (there, accelerator), (there, "cpu")):
            learner = Learner(each, plan_, device=device)
            losses.append([learner.update().loss for _ in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-10) and losses[2] == losses[0]
