"""Means over the validation data: one number at any batch size and number of ranks, and a module left as it was."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchlab.core.errors import InputError
from batchlab.spine.evaluate import evaluate
from tests.spine.forked import in_ranks
from tests.spine.jobs import squared_error, toy_data, toy_job

CPU = torch.device("cpu")


def positive_units(batch):
    """An example counts as its positive inputs and one more."""
    return int((batch[0] > 0).sum()) + len(batch[0])


def loss_per_unit(module, batch):
    x, y = batch
    units = (x > 0).sum(1) + 1
    return ((module(x).squeeze(1) - y).square() * units).sum() / units.sum()


def metrics(module, batch):
    """A float, an integer tensor and a tensor."""
    x, y = batch
    return {"three": 3.0, "size": torch.tensor(7), "error": (module(x).squeeze(1) - y).abs().mean()}


def jobs(n):
    """Counted in examples, and in units of which examples hold one to seven."""
    plain = dataclasses.replace(toy_job(metric=metrics), valid=toy_data(n, seed=1))
    counted = dataclasses.replace(
        plain, loss=loss_per_unit, metric=None, unit="token", units_per_example=positive_units
    )
    return plain, counted


def naive(job, module):
    """Over all examples in one pass; each metric is of the same mean."""
    with torch.no_grad():
        return {"loss": job.loss(module, job.valid[:]).item()} | {
            name: float(value) for name, value in (job.metric(module, job.valid[:]) if job.metric else {}).items()
        }


@given(n=st.integers(1, 40), batch_size=st.integers(1, 50))
def test_the_batch_size_changes_nothing(n, batch_size):
    for job in jobs(n):
        module = job.model()
        assert evaluate(job, module, batch_size=batch_size, device=CPU) == pytest.approx(naive(job, module), rel=1e-12)


def _evaluate(folder, n):
    rank, found = dist.get_rank(), []
    for job in jobs(n):
        torch.manual_seed(0)
        found.append(evaluate(job, job.model(), batch_size=2, device=CPU))
    (folder / str(rank)).write_text(json.dumps(found))


@pytest.mark.parametrize("n", [3, 8, 40])
def test_the_number_of_ranks_changes_nothing(tmp_path, n):
    assert in_ranks(3, tmp_path, _evaluate, tmp_path, n) == [0, 0, 0]
    texts = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert len(set(texts)) == 1
    for job, found in zip(jobs(n), json.loads(texts[0]), strict=True):
        torch.manual_seed(0)
        assert found == pytest.approx(naive(job, job.model()), rel=1e-12)


def _too_few(folder):
    with pytest.raises(InputError, match="1 validation examples are too few for 2 ranks"):
        _evaluate(folder, 1)


def test_fewer_examples_than_ranks_are_refused(tmp_path):
    assert in_ranks(2, tmp_path, _too_few, tmp_path) == [0, 0]


def test_sums_are_in_float64():
    """2^24, 1 and 1 in float32: their sum there would be 2^24."""
    values = torch.tensor([2.0**24, 1.0, 1.0])
    job = dataclasses.replace(toy_job(loss=lambda _, batch: batch.sum()), valid=values)
    assert evaluate(job, nn.Identity(), batch_size=1, device=CPU) == {"loss": (2**24 + 2) / 3}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_precision_is_that_of_the_forward_pass_alone(precision):
    seen = []

    def loss(module, batch):
        output = module(batch[0])
        seen.append(output.dtype)
        return (output.squeeze(1) - batch[1]).square().mean()

    job = toy_job(loss=loss, dtype=torch.float32)
    module = job.model()
    found = evaluate(job, module, batch_size=16, device=CPU, precision=precision)
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert all(p.dtype == torch.float32 for p in module.parameters())
    with torch.no_grad():
        whole = squared_error(module, job.valid[:]).item()
    assert found["loss"] == pytest.approx(whole, rel=0.05 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_module_is_left_as_it_was(training):
    """Running statistics do not move, dropout is off, no graph is built; after an error too."""
    job = toy_job(batch_norm=True, dropout=0.5)
    module = job.model().train(training)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = [evaluate(job, module, batch_size=size, device=CPU) for size in (1, 40)]
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {part.training for part in module.modules()} == {training}
    job = dataclasses.replace(job, loss=fails)
    with pytest.raises(KeyError):
        evaluate(job, module, batch_size=8, device=CPU)
    assert module.training == training and torch.is_grad_enabled()


def fails(module, batch):
    assert not module.training and not torch.is_grad_enabled()
    raise KeyError


@pytest.mark.parametrize(
    ("loss", "got"), [(lambda m, b: m(b[0]), r"a tensor of shape \(8, 1\)"), (lambda m, b: 1.0, "float")]
)
def test_a_loss_must_be_a_scalar(loss, got):
    job = toy_job(loss=loss)
    with pytest.raises(InputError, match=f"job loss must return a scalar tensor, the mean over the batch, got {got}"):
        evaluate(job, job.model(), batch_size=8, device=CPU)


def test_examples_without_units_change_nothing():
    def loss(module, batch):
        x, y = batch
        kept = y > 0
        return (module(x).squeeze(1) - y)[kept].square().mean()  # NaN where none is kept

    job = dataclasses.replace(
        toy_job(loss=loss), unit="token", units_per_example=lambda batch: int((batch[1] > 0).sum())
    )
    torch.manual_seed(0)
    module = job.model()
    found = [evaluate(job, module, batch_size=size, device=CPU)["loss"] for size in (1, 3, 40)]
    assert found[0] == pytest.approx(found[2], rel=1e-12) and found[1] == pytest.approx(found[2], rel=1e-12)
