"""Landscapes, lines between models and paths on a GPU: what the CPU gives, and the model as it was."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from batchlab.measure.surface.directions import random_direction
from batchlab.measure.surface.interpolation import interpolate
from batchlab.measure.surface.landscape import landscape
from batchlab.measure.surface.trajectory import pca_trajectory, project_trajectory

pytestmark = pytest.mark.gpu
CPU, DOUBLE = torch.device("cpu"), torch.float64
close = pytest.approx


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(16, 1)]
    model = nn.Sequential(*layers).to(DOUBLE)
    model(torch.randn(16, 2, 6, dtype=DOUBLE))  # running statistics that are not 0 and 1
    return model


def squared(model, batch):
    return (model(batch).squeeze(1) - 1).square().mean()


DATA = [torch.randn(n, 2, 6, generator=torch.Generator().manual_seed(n), dtype=DOUBLE) for n in (7, 4)]


@pytest.mark.parametrize("norm", ["filter", "layer", "weight"])
def test_directions_are_those_of_the_cpu(accelerator, norm):
    model = network()
    right = random_direction(model, seed=3, norm=norm)
    found = random_direction(model.to(accelerator), seed=3, norm=norm)
    for name, d in found.items():
        assert d.device.type == accelerator.type
        torch.testing.assert_close(d.cpu(), right[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("settings", [{"dimensions": 2, "points": 5}, {"directions": 3, "points": 7}])
def test_a_landscape_is_that_of_the_cpu_and_gives_the_model_back(accelerator, settings):
    model = network()
    right = landscape(model, squared, DATA, **settings)
    model.to(accelerator)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3, device=accelerator)
    torch.manual_seed(5)
    found = landscape(model, squared, DATA, **settings)
    assert torch.equal(torch.rand(3, device=accelerator), expected)
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(right.losses), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and model.training
    half = replace(right, losses=tuple((math.nan, *row[1:]) for row in right.losses))
    resumed = landscape(model, squared, DATA, resume=half, **settings)
    torch.testing.assert_close(torch.tensor(resumed.losses), torch.tensor(right.losses), rtol=1e-9, atol=1e-12)


def test_random_losses_get_the_same_numbers_at_every_point(accelerator):
    """Noise of the device's own generator; along a direction of zeros but for one weight that no loss depends on."""
    model = nn.Linear(2, 1).to(accelerator)
    loss = lambda model, batch: model(batch).mean() * 0 + torch.randn(3, device=accelerator).square().mean()  # noqa: E731
    found = landscape(model, loss, [torch.ones(2, 2)], points=5, directions=[{"weight": torch.ones(1, 2)}])
    assert len(set(found.losses[0])) == 1 and found.losses[0][0] > 0


def test_the_line_between_models_that_lie_on_two_devices(accelerator):
    a, b = network(0), network(1)
    right = interpolate(a, b, squared, DATA, points=5)
    found = interpolate(a.to(accelerator), b, squared, DATA, points=5)
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(right.losses), rtol=1e-9, atol=1e-12)


def test_a_path_of_checkpoints_on_either_device(accelerator):
    generator = torch.Generator().manual_seed(0)
    path = [{"w": torch.randn(5, 6, generator=generator, dtype=DOUBLE) * k, "b": torch.ones(3) * k} for k in range(6)]
    right = pca_trajectory(path)
    on_gpu = [{name: each.to(accelerator) for name, each in point.items()} for point in path]
    mixed = [point if k % 2 else own for k, (point, own) in enumerate(zip(path, on_gpu, strict=True))]
    for found in (pca_trajectory(on_gpu), pca_trajectory(mixed)):
        assert torch.tensor(found.trajectory.points).flatten().tolist() == close(
            torch.tensor(right.trajectory.points).flatten().tolist(), rel=1e-9, abs=1e-9
        )
        assert found.trajectory.captured == close(right.trajectory.captured, rel=1e-10)
    again = project_trajectory(on_gpu, right.directions)
    assert again.captured == close(right.trajectory.captured, rel=1e-10)


def test_a_hessian_map_is_that_of_the_cpu(accelerator):
    pytest.importorskip("curvlinops")
    from batchlab.measure.surface.convexity import hessian_map

    model = network()
    right = hessian_map(model, squared, DATA, points=3)
    found = hessian_map(model.to(accelerator), squared, DATA, points=3)
    for name in ("largest", "smallest"):
        torch.testing.assert_close(
            torch.tensor(getattr(found, name)), torch.tensor(getattr(right, name)), rtol=1e-5, atol=1e-6
        )
