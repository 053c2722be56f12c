"""Landscapes against closed forms, their invariance to scale, and how the losses of batches are gathered."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed
from batchlab.measure.surface.directions import random_direction
from batchlab.measure.surface.landscape import Landscape, landscape
from tests.measure.surface.small import Quadratic, quadratic, quadratic_data, quadratic_loss


def test_a_line_through_a_quadratic_is_its_parabola():
    H, data = quadratic_data()
    model = quadratic()
    found = landscape(model, quadratic_loss, data, directions=3, seed=4)
    theta = model.theta.detach().reshape(-1)
    for k, row in enumerate(found.losses):
        d = random_direction(model, seed=derive_seed(4, "landscape", k))["theta"].reshape(-1)
        along = [0.5 * (theta + a * d) @ H @ (theta + a * d) for a in found.x]
        torch.testing.assert_close(torch.tensor(row, dtype=torch.float64), torch.stack(along), rtol=1e-10, atol=1e-10)
        assert found.direction_norms[k] == pytest.approx(float(d.norm()), rel=1e-12)
    assert found.x[25] == 0.0 and found.x[0] == -1.0 and found.x[-1] == 1.0 and len(found.x) == 51
    assert (found.examples, found.unfilled, found.non_finite) == (10, 0, 0)


def test_a_plane_through_a_quadratic_is_its_closed_form():
    H, data = quadratic_data()
    model = quadratic()
    found = landscape(model, quadratic_loss, data, dimensions=2, points=7, span=2.0, seed=4)
    theta = model.theta.detach().reshape(-1)
    d1, d2 = (random_direction(model, seed=derive_seed(4, "landscape", k))["theta"].reshape(-1) for k in (0, 1))
    places = [[theta + a * d1 + b * d2 for b in found.y] for a in found.x]
    closed = torch.tensor([[0.5 * p @ H @ p for p in row] for row in places], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(found.losses, dtype=torch.float64), closed, rtol=1e-8, atol=1e-8)
    line = landscape(model, quadratic_loss, data, points=7, span=2.0, seed=4, directions=1)
    assert line.losses[0] == pytest.approx([row[3] for row in found.losses], rel=1e-12)


def test_the_width_of_a_minimum_is_known():
    H, data = quadratic_data()
    model = Quadratic(torch.zeros(3, 4, dtype=torch.float64))
    d = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    truth = 2 * math.sqrt(2 * 0.5 / float(d.reshape(-1) @ H @ d.reshape(-1)))
    found = landscape(model, quadratic_loss, data, directions=[{"theta": d}], points=201, span=1.013 * truth)
    assert found.widths(0.5) == pytest.approx([truth], rel=1e-3)
    assert found.widths(0.5)[0] < truth  # linear between points of a convex curve


def scale_free_net():
    """A bias-free ReLU net trained on digits in float64, and its data in ragged batches."""
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pictures[:300] / 16.0), torch.tensor(labels[:300])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 10, bias=False)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, list(zip(x.split(128), y.split(128), strict=True))


def cross_entropy(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def rescaled(model, factor=10.0):
    """The same function: ReLU(c·z) = c·ReLU(z)."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(factor)
        other[2].weight.div_(factor)
    return other


def test_filter_normalised_curves_and_widths_do_not_see_the_scale_of_weights():
    model, data = scale_free_net()
    other = rescaled(model)
    x = torch.cat([x for x, _ in data])
    assert float((model(x) - other(x)).detach().abs().max()) < 1e-10

    def pair(norm):
        settings = {"norm": norm, "directions": 6, "points": 11, "seed": 2}
        return [landscape(each, cross_entropy, data, **settings) for each in (model, other)]

    first, second = pair("filter")
    difference = np.abs(np.subtract(first.losses, second.losses)).max()
    assert difference < 1e-8
    assert first.width(0.5).value == pytest.approx(second.width(0.5).value, rel=1e-8)
    assert not math.isclose(first.losses[0][0], first.origin, rel_tol=0.1)  # there is a curve to compare
    raw, raw_other = pair("none")
    apart = np.abs(np.subtract(raw.losses, raw_other.losses)).max()
    assert apart > 1e6 * difference and apart > 10
    # a width at a level that both reach: the plain one follows the scale, the other does not
    low = 0.01
    plain = [landscape(m, cross_entropy, data, norm="none", directions=3, points=101).width(low).value
             for m in (model, other)]  # fmt: skip
    assert plain[0] / plain[1] > 2 or plain[1] / plain[0] > 2


def test_losses_that_are_not_finite_are_kept_apart():
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(1.0)

    def loss(model, batch):
        w = model.weight.sum()
        return torch.sqrt(0.8 - (w - 1).abs()) + 0 * batch.sum() if len(batch) == 1 else (w - 1) ** 2

    data = [torch.zeros(3, 1), torch.zeros(1, 1)]
    found = landscape(model, loss, data, points=5, directions=[{"weight": torch.ones(1, 1)}])
    (row,) = found.losses
    assert row[0] == row[4] == math.inf and found.non_finite == 2 and found.unfilled == 0
    assert row[1] == pytest.approx((3 * 0.25 + math.sqrt(0.3)) / 4, rel=1e-12)
    assert Landscape.from_json(found.to_json()) == found
    with pytest.raises(InputError, match="the loss at the model's own weights is not finite"):
        landscape(model, lambda m, b: m.weight.sum() * math.nan, data)


def test_the_weights_of_batches_are_their_examples_or_what_count_says():
    model = nn.Linear(1, 1, bias=False)
    batches = [{"x": torch.full((3, 2), 4.0)}, {"x": torch.zeros(0, 2)}, {"x": torch.full((1, 2), 8.0)}]
    loss = lambda model, batch: batch["x"].mean() + 0 * model.weight.sum()  # noqa: E731
    assert landscape(model, loss, batches, points=3).origin == 5.0  # the empty one's NaN counts nothing
    halves = landscape(model, loss, batches, points=3, count=lambda batch: int(batch["x"].numel() > 0))
    assert (halves.origin, halves.examples) == (6.0, 2)
