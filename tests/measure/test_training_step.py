"""One step on a model of its own: whose gradient, at which rate, and where it fails."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed
from batchlab.data.stream import SampleStream
from batchlab.measure.training_step import TrainingStep
from batchlab.optim.by_name import names
from tests.spine.forked import in_child
from tests.spine.jobs import squared_error, toy_job

CPU = torch.device("cpu")


def gradient(step):
    return torch.cat([p.grad.flatten() for p in step.trained])


@pytest.mark.parametrize("size", [1, 7, 32, 77])
def test_the_gradient_is_the_mean_over_the_first_examples_of_the_stream(size):
    """Epoch after epoch where there are more than the data set's 32; each call adds."""
    job = toy_job(n=32)
    step = TrainingStep(job, device=CPU, seed=3)
    step.clear()
    loss = step.forward_backward(size)
    once = gradient(step)
    x, y = job.train[SampleStream(32, derive_seed(3, "stream")).indices(0, size)]
    naive = squared_error(step.model, (x, y))
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(naive, step.trained)])
    assert loss.item() == pytest.approx(naive.item(), rel=1e-12) and not loss.requires_grad
    torch.testing.assert_close(once, expected, rtol=1e-12, atol=1e-14)
    step.forward_backward(size)
    torch.testing.assert_close(gradient(step), 2 * expected, rtol=1e-12, atol=1e-14)


def test_a_share_of_the_gradient_is_that_of_the_loss_but_not_what_it_returns():
    step = TrainingStep(toy_job(n=32), device=CPU)
    batch, losses, found = step.batch(4), [], []
    for share in (1.0, 0.25):
        step.clear()
        losses.append(step.backward_on(batch, share=share).item())
        found.append(gradient(step))
    assert losses[0] == losses[1] and torch.equal(0.25 * found[0], found[1])


@pytest.mark.parametrize("optimizer", names())
def test_every_step_is_the_same_work_and_moves_nothing(optimizer):
    step = TrainingStep(toy_job(optimizer=optimizer), device=CPU)
    before = [p.clone() for p in step.model.parameters()]
    held = {p: set(step.optimizer.state[p]) for p in step.trained}
    assert all(held.values()) and all(not p.grad.any() for p in step.trained)
    for size in (8, 3):
        step(size)
        assert all(p.grad is None for p in step.trained)
    assert all(map(torch.equal, before, step.model.parameters()))
    assert {p: set(step.optimizer.state[p]) for p in step.trained} == held
    step.reset_optimizer()
    assert not step.optimizer.state


def test_a_seed_is_a_model_and_copies_of_it_are_held():
    job = toy_job()
    first, again, other = (TrainingStep(job, device=CPU, seed=seed, copies=2) for seed in (0, 0, 1))
    weights = [torch.cat([p.flatten() for p in step.model.parameters()]) for step in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert sum(held.numel() for held in first._held) == 2 * weights[0].numel()
    assert first.model.training


def copies_take_memory():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    job = dataclasses.replace(toy_job(optimizer="sgd"), model=lambda: nn.Linear(6, 2**20))
    step = TrainingStep(job, device=CPU)
    before = resident()
    step.hold_copies(8)
    assert resident() - before > 0.7 * 8 * 7 * 2**22  # what the step freed, at most two copies, is taken first


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_copies_take_memory_on_a_cpu_too():
    assert in_child(copies_take_memory, method="spawn") == 0


def test_gradients_are_held_while_a_whole_step_runs():
    """As they are in all but the first micro-batch of an update: the peak is then gradients and activations."""
    held = []

    def loss(module, batch):
        held.append([p.grad is not None and not p.grad.any() for p in module.parameters()])
        return squared_error(module, batch)

    step = TrainingStep(dataclasses.replace(toy_job(), loss=loss), device=CPU)
    for size in (4, 2):
        step(size)
    assert held == [[True] * len(step.trained)] * 2


def test_an_evaluation_sees_validation_data_without_gradients_and_leaves_training_mode():
    seen = []

    def note(module, batch):
        seen.append((len(batch[0]), module.training, torch.is_grad_enabled(), batch[0][0].clone()))
        return squared_error(module, batch)

    def metric(module, batch):
        note(module, batch)
        raise MemoryError("metric")

    job = dataclasses.replace(toy_job(n=32), loss=note)
    step = TrainingStep(job, device=CPU)
    for size in (3, 10**6):
        step.evaluate(size)
    assert [each[:3] for each in seen] == [(3, False, False), (len(job.valid), False, False)]
    assert all(torch.equal(each[3], job.valid[0][0]) for each in seen)
    assert all(part.training for part in step.model.modules()) and step.phase == "evaluation"
    step = TrainingStep(dataclasses.replace(job, metric=metric), device=CPU)
    with pytest.raises(MemoryError):
        step.evaluate(2)
    assert all(part.training for part in step.model.modules()) and step.phase == "evaluation"


def test_batches_of_the_callers_making_are_used_everywhere():
    made, used = [], []

    def make_batch(size):
        made.append((torch.full((size, 6), 2.0, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)))
        return made[-1]

    def loss(module, batch):
        used.append(batch)
        return squared_error(module, batch)

    step = TrainingStep(dataclasses.replace(toy_job(), loss=loss), device=CPU, make_batch=make_batch)
    step(5)
    step.evaluate(3)
    assert [len(batch[0]) for batch in used] == [5, 3]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(made, used, strict=True))


class Refusing(torch.autograd.Function):
    """Fails in the backward pass."""

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, __):
        raise MemoryError("backward")


class Unreadable:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise MemoryError("data")


def fail(*_):
    raise MemoryError("it fails")


@pytest.mark.parametrize(
    ("phase", "changes"),
    [
        ("data", {"train": Unreadable()}),
        ("forward", {"loss": fail}),
        ("backward", {"loss": lambda module, batch: Refusing.apply(squared_error(module, batch))}),
        ("step", {}),
    ],
)
def test_the_phase_tells_where_it_failed(phase, changes):
    step = TrainingStep(dataclasses.replace(toy_job(), **changes), device=CPU)
    if phase == "step":
        step.optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        step(4)
    assert step.phase == phase
    step.clear()
    assert all(p.grad is None for p in step.trained)


@pytest.mark.parametrize(("loss", "got"), [(lambda m, b: m(b[0]).squeeze(1), "tensor"), (lambda m, b: 1.0, "1.0")])
def test_a_loss_must_be_a_scalar(loss, got):
    step = TrainingStep(toy_job(loss=loss), device=CPU)
    with pytest.raises(InputError, match=f"job loss must return a scalar tensor, the mean over the batch, got {got}"):
        step(2)


def test_a_model_must_learn_something():
    job = dataclasses.replace(toy_job(), model=nn.Identity)
    with pytest.raises(InputError, match="the model has no parameter that requires a gradient"):
        TrainingStep(job, device=CPU)
