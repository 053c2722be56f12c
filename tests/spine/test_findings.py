"""Single facts: each as its own estimator gives it, at fresh weights or a run's, and shown in the run's report."""

import dataclasses

import pytest
import torch
from torch.utils.data import TensorDataset

import batchlab as bl
from batchlab.core.checkpoint import checkpoints, load_checkpoint
from batchlab.core.errors import CheckpointError, InputError
from batchlab.core.run import Run
from batchlab.measure.findings import FINDINGS_FILE, KINDS, Findings
from batchlab.spine.findings import found_in, keep
from batchlab.spine.findings_chapters import lines, sections
from tests.spine.jobs import toy_job, toy_plan


@pytest.fixture(scope="module")
def everything():
    return bl.probe(toy_job(), only=KINDS, budget=5.0)


@pytest.fixture
def run(tmp_path):
    bl.train(toy_job(), toy_plan(steps=4), out=tmp_path / "run", seed=0)
    return Run.open(tmp_path / "run")


def test_all_kinds_are_measured_and_read_back(everything):
    assert all(getattr(everything, kind) is not None for kind in KINDS)
    assert everything.weights == "fresh, seed 0"
    assert Findings.from_json(everything.to_json()) == everything
    names = [name for name, _, _ in lines(everything)]
    assert names[:2] == ["Noise scale", "Largest micro-batch"] and "Energy of a step" in names
    assert {section.name for section in sections(everything)} == {"curvature", "landscape", "energy", "measured-alone"}


def test_the_noise_scale_is_that_of_the_whole_data(everything):
    """At the weights it names: against tr(Σ) and |G|² from every example's own gradient."""
    from batchlab.core.model import make_model
    from batchlab.core.random import derive_seed, preserved_generators, reseed

    job = toy_job()
    with preserved_generators():
        reseed(derive_seed(0, "weights"))
        model = make_model(job)
    rows = []
    for i in range(len(job.train)):
        x, y = job.train[i]
        gradients = torch.autograd.grad(job.loss(model, (x[None], y[None])), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    rows = torch.stack(rows)
    grad_sq, trace = rows.mean(0).square().sum().item(), rows.var(0).sum().item()
    found = everything.noise
    assert found.trace == pytest.approx(trace, rel=0.05) and found.grad_sq == pytest.approx(grad_sq, rel=0.25)
    assert found.noise_scale.low <= 1.1 * trace / grad_sq and found.noise_scale.high >= 0.9 * trace / grad_sq


def few_to_validate(job):
    """With as few validation examples as are taken whatever the time, so that two measurements take the same."""
    return dataclasses.replace(job, valid=TensorDataset(*job.valid[:32]))


@pytest.mark.parametrize("examples", [5, 9])
def test_measuring_noise_leaves_batch_normalisations_statistics_and_no_piece_of_one(examples):
    job = toy_job(batch_norm=True, n=examples)
    job = few_to_validate(job)
    alone = bl.probe(job, only=["landscape"], budget=0.2).landscape.landscape.origin
    both = bl.probe(job, only=["noise", "landscape"], budget=0.4)
    assert both.noise.steps >= 20 and both.landscape.landscape.origin == alone


def test_the_curvature_is_of_all_examples_where_time_allows(everything):
    assert everything.curvature.examples == 256
    assert not any(note.startswith("curvature") for note in everything.notes)


def test_only_what_is_asked_for_and_the_generators_are_kept():
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    found = bl.probe(toy_job(), only=["memory"], budget=0.5)
    assert found.memory.size >= 1 and found.noise is found.curvature is found.energy is found.landscape is None
    assert torch.equal(torch.random.get_rng_state(), before)
    assert bl.probe(toy_job(), only="memory", budget=0.5).memory is not None


def test_a_runs_weights_are_its_newest_checkpoints(run):
    job = few_to_validate(toy_job())
    found = bl.probe(job, only=["landscape"], at=run, budget=0.5)
    assert found.weights == "toy after 4 updates"
    model = toy_job().model()
    model.load_state_dict(load_checkpoint(checkpoints(run.path / "checkpoints")[0])["learner"]["model"])
    x, y = job.valid.tensors
    assert found.landscape.landscape.origin == pytest.approx(job.loss(model, (x, y)).item(), rel=1e-9)


def test_kept_findings_join_and_the_report_shows_them(run, tmp_path):
    keep(run, bl.probe(toy_job(), only=["noise"], at=run, budget=0.5))
    keep(run, bl.probe(toy_job(), only=["landscape"], at=run, budget=0.5))
    both = found_in(run)
    assert both.noise is not None and both.landscape is not None
    page = bl.report(run, tmp_path / "page.html").read_text()
    assert "Loss landscape" in page and "Measured on its own" in page
    other = dataclasses.replace(both, weights="elsewhere", noise=None)
    keep(run, other)
    assert found_in(run).noise is None  # of other weights: not mixed


def test_a_report_without_findings_has_no_such_parts(run, tmp_path):
    assert found_in(run) is None
    assert "Loss landscape" not in bl.report(run, tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": ["nois"]}, r"only must name some of noise, memory, curvature, energy, landscape, got \['nois'\]"),
        ({"only": []}, "only must name some of"),
        ({"only": ["noise"], "budget": 0.0}, "budget must be finite and > 0 seconds, got 0.0"),
        ({"only": ["noise"], "budget": "1"}, "budget must be finite and > 0 seconds, got '1'"),
    ],
)
def test_bad_input_is_named(settings, message):
    with pytest.raises(InputError, match=message):
        bl.probe(toy_job(), **settings)


def test_runs_of_other_jobs_or_without_weights_are_refused(run):
    with pytest.raises(InputError, match="is a run of the job 'toy', not of 'other'"):
        bl.probe(dataclasses.replace(toy_job(), name="other"), only=["noise"], at=run)
    wider = dataclasses.replace(toy_job(), model=lambda: torch.nn.Linear(6, 2).double())
    with pytest.raises(InputError, match="holds weights of another model than the job's: (?s:.*)weight"):
        bl.probe(wider, only=["noise"], at=run)
    with pytest.raises(InputError, match="at is for only="):
        bl.probe(toy_job(), at=run)
    for file in (run.path / "checkpoints").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no whole checkpoint"):
        bl.probe(toy_job(), only=["noise"], at=run)


def test_damaged_findings_are_named(run, tmp_path):
    (run.path / FINDINGS_FILE).write_text('{"job": 3}')
    with pytest.raises(InputError, match=r"findings\.json"):
        bl.report(run, tmp_path / "page.html")
