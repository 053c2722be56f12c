"""What is followed along training, on a GPU: the CPU's numbers, and states taken from one device to the other."""

import copy

import pytest
import torch
from torch import nn

from batchlab.measure.course.adam_stability import AdamStability
from batchlab.measure.course.adam_update import update_density
from batchlab.measure.course.coordinate_check import coordinate_check
from batchlab.measure.course.learning_rate import lr_range
from batchlab.measure.course.weight_distance import WeightDistance
from tests.spine.jobs import toy_job

pytestmark = pytest.mark.gpu
CPU, DOUBLE = torch.device("cpu"), torch.float64
close = pytest.approx


def network(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1)).to(device, DOUBLE)


def train(model, optimizer, steps):
    device = next(model.parameters()).device
    for step in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step), dtype=DOUBLE).to(device)
        optimizer.zero_grad()
        (model(x).squeeze(1) - x.sin().sum(1)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("form", [{"foreach": True}, {"fused": True}, {"foreach": False, "amsgrad": True}])
def test_adams_updates_are_read_as_on_the_cpu_and_a_state_goes_over(accelerator, form):
    def started(device):
        model = network(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, **form)
        return model, optimizer, AdamStability(optimizer, model=model, every=2, coordinates=64)

    def told(stability):
        layers = [(each.rms, each.variance_ratio, each.cosine, each.lag1) for each in stability.reading.layers]
        assert len(layers) == 4
        return [number for layer in layers for number in layer]

    model, optimizer, stability = started(CPU)
    train(model, optimizer, range(5))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), stability.state_dict()))
    train(model, optimizer, range(5, 8))
    ours, its, resumed = started(accelerator)
    for target, each in zip((ours, its, resumed), state, strict=True):
        target.load_state_dict(each)
    train(ours, its, range(5, 8))
    assert told(resumed) == close(told(stability), rel=1e-8, abs=1e-12, nan_ok=True)
    u = resumed.updates("0.weight")
    assert u.device.type == accelerator.type and len(u) == 64
    assert update_density(u, 0.9, bins=4, limit=10.0)[1] == close(
        update_density(stability.updates("0.weight"), 0.9, bins=4, limit=10.0)[1]
    )


@pytest.mark.parametrize("kept", [None, "cpu"])
def test_the_distance_from_the_start_is_that_of_the_cpu(accelerator, kept):
    def followed(device, where):
        model = network(device)
        distance = WeightDistance(model, per_layer=True, per_decade=None, device=where)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(4):
            train(model, optimizer, [step])
            distance.step()
        return model, distance

    _, right = followed(CPU, None)
    model, found = followed(accelerator, kept)
    assert found.points() == [(t, close(d, rel=1e-10)) for t, d in right.points()]
    assert found.points("2.bias") == [(t, close(d, rel=1e-10)) for t, d in right.points("2.bias")]
    resumed = WeightDistance(model, per_layer=True, per_decade=None, device=kept)
    resumed.load_state_dict(right.state_dict())
    assert resumed.step() == close(right.points()[-1][1], rel=1e-10)  # from the CPU's start to the same weights


def test_the_coordinate_check_runs_on_the_device_and_gives_generators_back(accelerator):
    def checked(device):
        make = lambda width: nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2)).to(device, DOUBLE)  # noqa: E731
        sgd = lambda model, width: torch.optim.SGD(model.parameters(), lr=0.1)  # noqa: E731
        loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
        batches = [torch.ones(3, 4, dtype=DOUBLE, device=device) * k for k in (1, 2)]
        return coordinate_check(make, sgd, loss, batches, widths=[4, 8, 16], seeds=2)

    torch.manual_seed(5)
    expected = torch.rand(3, device=accelerator)
    torch.manual_seed(5)
    found = checked(accelerator)
    assert torch.equal(torch.rand(3, device=accelerator), expected)
    for ours, theirs in zip(found.coordinates, checked(CPU).coordinates, strict=True):
        assert (ours.module, ours.step) == (theirs.module, theirs.step)
        assert ours.changes == close(theirs.changes, rel=1e-9)


def test_the_range_test_is_that_of_the_cpu(accelerator):
    """Rates up to 0.1, at which the loss still falls and rounding is not blown up."""
    settings = {"batch_size": 32, "steps": 20, "low": 1e-4, "high": 1e-1, "validation": 40}
    found, right = (lr_range(toy_job(), device=device, **settings) for device in (accelerator, CPU))
    assert found.losses == close(right.losses, rel=1e-8)
    assert found.validation == close(right.validation, rel=1e-8)
    assert found.learning_rates == right.learning_rates and found.losses[-1] < found.losses[0]
