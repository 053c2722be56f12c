"""Every ready job on a GPU: its loss, metrics and training are those of the CPU, and its weights are written."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from batchlab.core.device import whole_float32
from batchlab.core.random import reseed
from batchlab.data.fetch import fetch, to_device
from batchlab.spine.folder import WEIGHTS_FILE
from batchlab.spine.learner import Learner
from batchlab.spine.train import train
from batchlab.workloads import autoencoder, diabetes, digits, images, pystdlib, syntax, table, text
from tests.spine.jobs import toy_plan

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _no_tf32():
    """To which cuDNN rounds convolutions and recurrent layers by default."""
    with whole_float32():
        yield


def _pictures(folder):
    pillow = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for name in ("dark", "light"):
        (folder / name).mkdir()
        for k in range(30):
            pixels = random.integers(0, 128, (12, 12, 3)) + (0 if name == "dark" else 100)
            pillow.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{k}.png")
    return images(folder, size=12)


def _rows(folder):
    random = np.random.default_rng(0)
    x = random.standard_normal((80, 3))
    lines = [",".join(f"{v:.6f}" for v in (*row, row.sum() + 0.1)) for row in x]
    (folder / "rows.csv").write_text("\n".join(["a,b,c,y", *lines]) + "\n")
    return table(folder / "rows.csv", "y")


def _words(folder):
    (folder / "words.txt").write_text("the batch is large and the noise is small. " * 100)
    return text(folder / "words.txt", context=16, width=24, layers=2, heads=3)


JOBS = {
    "autoencoder": lambda folder: autoencoder(),
    "diabetes": lambda folder: diabetes(),
    "digits": lambda folder: digits(),
    "images": _pictures,
    "pystdlib": lambda folder: pystdlib(context=16, width=24),
    "syntax": lambda folder: syntax(context=16),
    "table": _rows,
    "text": _words,
}


@pytest.mark.parametrize("name", JOBS)
def test_a_ready_job_is_the_cpus(accelerator, tmp_path, name):
    job = JOBS[name](tmp_path)
    batch = fetch(job.train, list(range(16)), job.collate)
    found = []
    for device in (accelerator, torch.device("cpu")):
        reseed(0)
        model, moved = job.model().to(device), to_device(batch, device)
        assert moved.inputs.device.type == device.type
        loss = job.loss(model, moved)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).cpu()
        with torch.no_grad():
            measured = {} if job.metric is None else job.metric(model, moved)
        metrics = {key: float(value) for key, value in measured.items()}
        found.append((loss.item(), gradient, metrics))
    (loss, gradient, metrics), (expected, exact, wanted) = found
    assert loss == pytest.approx(expected, rel=1e-4)
    assert (gradient - exact).norm() <= 1e-3 * exact.norm() and exact.norm() > 0
    assert metrics == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("name", JOBS)
def test_a_ready_job_trains_and_its_weights_load_on_the_cpu(accelerator, tmp_path, name):
    job = JOBS[name](tmp_path)
    plan = toy_plan(job=job.name, steps=4, micro_batch=8, batch_size=16, accumulation=2, learning_rate=1e-3)
    run = train(job, plan, out=tmp_path / "r", device=str(accelerator))
    here = Learner(job, plan, device="cpu")
    for line in run.steps():
        assert line["loss"] == pytest.approx(here.update().loss, rel=1e-2)
    here.model.load_state_dict(load_file(run.path / WEIGHTS_FILE))
    assert here.evaluate()["loss"] == pytest.approx(run.summary["final"]["loss"], rel=1e-3)
