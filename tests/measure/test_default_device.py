"""Models and data have their own devices; the default one, on which nothing here can be computed, has no say."""

import pytest
import torch
from torch import nn

from batchlab.measure import AdamStability, WeightDistance, curvature, hessian_map, landscape, pca_trajectory


def square(model, batch):
    return model(batch).square().mean()


def adam(model, data):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, foreach=False)
    stability = AdamStability(optimizer, every=1, coordinates=5)
    square(model, data[0]).backward()
    optimizer.step()
    return stability.reading.layers[0].rms


def path(model, data):
    checkpoints = [{"weight": model.weight.detach().roll(k)} for k in range(3)]
    return pca_trajectory(checkpoints).trajectory


def distance(model, data):
    followed = WeightDistance(model)
    with torch.no_grad():
        model.weight.add_(1.0)
    return followed.step()


MEASURES = {
    "curvature": lambda model, data: curvature(model, square, data, steps=4, probes=1, repeats=2, batch_sizes=(3, 6)),
    "hessian map": lambda model, data: hessian_map(model, square, data, points=3, max_steps=4),
    "landscape": lambda model, data: landscape(model, square, data, points=3, directions=2),
    "trajectory": path,
    "distance": distance,
    "adam": adam,
}


@pytest.mark.parametrize("name", MEASURES)
def test_the_default_device_changes_nothing(name):
    data, found = [torch.randn(12, 4)], []
    for device in ("cpu", "meta"):
        torch.manual_seed(1)
        model = nn.Linear(4, 3, bias=False)
        with torch.device(device):
            found.append(MEASURES[name](model, data))
    assert found[0] == found[1]
