"""One training step of a job, its time, and a model given back after a trial, where there is a GPU."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from batchlab.measure.batch_rows import join, row_count, take_rows
from batchlab.measure.noise.self_timed import SelfTimed
from batchlab.measure.restore import restored
from batchlab.measure.speed.step_time import throughput
from batchlab.measure.training_step import TrainingStep
from tests.spine.jobs import toy_job

pytestmark = pytest.mark.gpu
CPU, DOUBLE = torch.device("cpu"), torch.float64


@pytest.mark.parametrize(("optimizer", "batch_norm"), [("sgd", True), ("adamw", True), ("lamb", False)])
def test_a_training_step_is_that_of_the_cpu(accelerator, optimizer, batch_norm):
    found = []
    for device in (CPU, accelerator):
        step = TrainingStep(toy_job(batch_norm=batch_norm, optimizer=optimizer), device=device)
        step.reset_optimizer()
        for group in step.optimizer.param_groups:
            group["lr"] = 1e-2
        for size in (32, 7):
            loss = step.forward_backward(size)
            step.step()
        step.evaluate(16)
        step.wait()
        assert {p.device.type for p in step.model.parameters()} == {loss.device.type} == {device.type}
        found.append([loss.cpu(), *(p.detach().cpu() for p in step.model.state_dict().values())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


def test_every_size_is_timed_on_the_device_and_generators_are_given_back(accelerator):
    torch.manual_seed(5)
    expected = torch.rand(3, device=accelerator)
    torch.manual_seed(5)
    found = throughput(toy_job(dropout=0.2), [4, 64], seconds=0.5, device=accelerator)
    assert torch.equal(torch.rand(3, device=accelerator), expected)
    assert [each.examples for each in found.micro_batches] == [4, 64] and found.out_of_memory_at is None
    assert all(each.seconds.value > 0 for each in found.micro_batches) and found.update.value > 0


@pytest.mark.parametrize("form", [{}, {"fused": True}, {"capturable": True}])
def test_model_optimizer_and_generators_come_back_bit_for_bit(accelerator, form):
    if "capturable" in form and accelerator.type == "cpu":
        pytest.skip("capturable is for accelerators")
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)]
    model = nn.Sequential(*layers).to(accelerator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **form)
    x = torch.randn(16, 6).to(accelerator)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        return [p.detach().clone() for p in model.state_dict().values()]

    step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    generator = torch.get_rng_state()
    with restored(model, optimizer):
        first = step()
        step()
    assert torch.equal(torch.get_rng_state(), generator)
    after = tree_leaves((model.state_dict(), optimizer.state_dict()))
    for ours, theirs in zip(after, tree_leaves(before), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    torch.testing.assert_close(step(), first)  # the masks of dropout are the same again


def test_rows_are_taken_and_joined_where_they_lie(accelerator):
    batch = {"x": torch.arange(12.0, device=accelerator).view(6, 2), "y": [torch.arange(6), 3]}
    assert row_count(batch) == 6
    parts = [take_rows(batch, rows) for rows in ([4, 1], [0])]
    assert parts[0]["x"].device.type == accelerator.type and parts[0]["y"][0].is_cpu
    (whole,) = join(parts)
    assert whole["x"].tolist() == [[8.0, 9.0], [2.0, 3.0], [0.0, 1.0]] and whole["y"][0].tolist() == [4, 1, 0]
    if accelerator.type == "cuda":
        assert len(join([parts[0], take_rows({"x": batch["x"].cpu(), "y": batch["y"]}, [0])])) == 2


def test_a_self_timed_loop_waits_for_the_device(accelerator):
    timed, x = SelfTimed(accelerator, warm_up=1), torch.ones(64, 64, device=accelerator)
    for _ in range(100):
        x = (x @ x).clamp(max=1)
        timed.ended()
        if timed.settled:
            break
    assert timed.settled and 1 <= timed.every <= 100
