"""Paths in a plane against their making, against scikit-learn, and on the landscape that they lie on."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.surface.landscape import landscape
from batchlab.measure.surface.trajectory import Trajectory, pca_trajectory, project_trajectory

SHAPES = {"a": (4, 3), "b": (5,), "c": (2, 2, 2)}


def split(flat):
    parts, start = {}, 0
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        parts[name] = flat[start : start + size].reshape(shape)
        start += size
    return parts


def flat(parts):
    return torch.cat([parts[name].reshape(-1) for name in SHAPES])


def path(rank, n=9, seed=0, size=25):
    """n checkpoints that leave their last one within `rank` dimensions only."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q
    steps = torch.randn(n, rank, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, rank)
    return [split(row + 5.0) for row in steps.double() @ axes.T]


@pytest.mark.parametrize("center", [False, True])
def test_a_path_in_a_plane_is_explained_and_found_again(center):
    checkpoints = path(2)
    trajectory, (first, second) = pca_trajectory(checkpoints, center=center)
    assert sum(trajectory.explained) >= 1 - 1e-6 and trajectory.captured == pytest.approx(1.0, abs=1e-10)
    last, d1, d2 = flat(checkpoints[-1]), flat(first), flat(second)
    assert float(d1.norm()) == pytest.approx(1.0, rel=1e-12) == float(d2.norm())
    assert abs(float(d1 @ d2)) < 1e-12
    for (a, b), checkpoint in zip(trajectory.points, checkpoints, strict=True):
        torch.testing.assert_close(last + a * d1 + b * d2, flat(checkpoint), rtol=0, atol=1e-10)
    assert trajectory.points[-1] == (0.0, 0.0) and trajectory.centered == center
    assert Trajectory.from_json(trajectory.to_json()) == trajectory


def test_centred_it_is_scikit_learns_pca_up_to_sign():
    checkpoints = path(7, n=12)
    M = torch.stack([flat(each) - flat(checkpoints[-1]) for each in checkpoints[:-1]])
    peer = PCA(2).fit(M.numpy())
    trajectory, directions = pca_trajectory(checkpoints, center=True)
    assert trajectory.explained == pytest.approx(peer.explained_variance_ratio_, rel=1e-10)
    for direction, component in zip(directions, peer.components_, strict=True):
        mine = flat(direction).numpy()
        np.testing.assert_allclose(mine * np.sign(mine @ component), component, rtol=0, atol=1e-10)
    s = torch.linalg.svd(M)
    plain = pca_trajectory(checkpoints)
    assert plain.trajectory.explained == pytest.approx((s.S[:2] ** 2 / (s.S**2).sum()).tolist(), rel=1e-10)
    np.testing.assert_allclose(abs(float(flat(plain.directions[1]) @ s.Vh[1])), 1.0, atol=1e-10)
    assert plain.trajectory.captured == pytest.approx(sum(plain.trajectory.explained), rel=1e-10)
    assert plain.trajectory.explained != pytest.approx(trajectory.explained, rel=1e-3)


def test_weights_are_read_in_parts(monkeypatch):
    checkpoints = path(4)
    whole = pca_trajectory(checkpoints)
    monkeypatch.setattr("batchlab.measure.surface.trajectory._COLUMNS", 5)
    parts = pca_trajectory(checkpoints)
    for mine, theirs in zip(parts.directions, whole.directions, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    np.testing.assert_allclose(parts.trajectory.points, whole.trajectory.points, rtol=0, atol=1e-12)


def test_a_random_walk_has_its_known_shares():
    """k-th share 6/(πk)² in many dimensions: the path of no training at all looks low-dimensional."""
    steps = torch.randn(200, 40_000, generator=torch.Generator().manual_seed(0))
    walk = [{"w": each} for each in steps.cumsum(0)]
    trajectory, _ = pca_trajectory(walk, center=True)
    assert trajectory.explained == pytest.approx((6 / math.pi**2, 6 / (2 * math.pi) ** 2), rel=0.02)


def test_projection_is_least_squares_and_the_cosine_formula_where_axes_are_orthogonal():
    checkpoints = path(4)
    generator = torch.Generator().manual_seed(5)
    d1, d2 = torch.randn(2, 25, generator=generator, dtype=torch.float64)
    M = torch.stack([flat(each) - flat(checkpoints[-1]) for each in checkpoints])
    skew = project_trajectory(checkpoints, [split(d1), split(d2)])
    truth = torch.linalg.lstsq(torch.stack([d1, d2], dim=1), M.T).solution.T
    torch.testing.assert_close(torch.tensor(skew.points, dtype=torch.float64), truth, rtol=1e-10, atol=1e-12)
    fitted = truth @ torch.stack([d1, d2])
    assert skew.captured == pytest.approx(float(fitted.square().sum() / M.square().sum()), rel=1e-10)
    cosine = torch.stack([M @ d1 / d1.norm() ** 2, M @ d2 / d2.norm() ** 2], dim=1)
    assert not torch.allclose(cosine, truth, rtol=1e-2)
    e2 = d2 - (d2 @ d1) / (d1 @ d1) * d1
    straight = project_trajectory(checkpoints, [split(d1), split(e2)])
    cosine = torch.stack([M @ d1 / d1.norm() ** 2, M @ e2 / e2.norm() ** 2], dim=1)
    torch.testing.assert_close(torch.tensor(straight.points, dtype=torch.float64), cosine, rtol=1e-10, atol=1e-12)


def test_the_path_of_a_run_lies_on_the_landscape_of_its_own_axes():
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False).double()  # two weights: the plane holds all
    x = torch.randn(20, 2, dtype=torch.float64)
    loss = lambda m, b: (m(b).squeeze(1) - b.sum(1)).square().mean()  # noqa: E731
    checkpoints, losses = [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for _ in range(5):
        checkpoints.append({k: v.detach().clone() for k, v in model.state_dict().items()})
        losses.append(loss(model, x))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    model.load_state_dict(checkpoints[-1])
    found = pca_trajectory(checkpoints, model=model)
    points = sorted(found.trajectory.points)
    axes = tuple(sorted(p[k] for p in points) for k in (0, 1))
    plane = landscape(model, loss, [x], dimensions=2, directions=found.directions, coordinates=axes)
    for (a, b), value in zip(found.trajectory.points, losses, strict=True):
        at = plane.losses[plane.x.index(a)][plane.y.index(b)]
        assert at == pytest.approx(float(value.detach()), rel=1e-9)
    assert found.trajectory.captured == pytest.approx(1.0, rel=1e-12)


def test_a_grid_holds_the_path_and_the_end():
    trajectory = Trajectory(((4.0, -1.0), (2.0, 0.5), (0.0, 0.0)), 1.0)
    for x, low, high in zip(trajectory.grid(21, 0.1), (0.0, -1.0), (4.0, 0.5), strict=True):
        assert len(x) == 21 and 0.0 in x
        assert x[0] <= low - 0.4 < x[0] + (x[1] - x[0]) and high + 0.4 <= x[-1] + 1e-12
        assert x[-1] - x[0] < 1.2 * (high - low + 0.8)
    for options in ({"points": 2}, {"margin": -0.1}):
        with pytest.raises(InputError, match="points must be at least 3 and margin at least 0"):
            trajectory.grid(**options)
    with pytest.raises(InputError, match="the path must have an extent along both axes, or a margin"):
        Trajectory(((1.0, 0.0), (0.0, 0.0)), 1.0).grid(margin=0.0)


def test_what_is_left_out_has_no_part_in_it():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    generator = torch.Generator().manual_seed(0)
    draw = lambda v: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v  # noqa: E731
    checkpoints = [{k: draw(v) for k, v in model.state_dict().items()} for _ in range(4)]
    names = lambda **options: set(pca_trajectory(checkpoints, **options).directions[0])  # noqa: E731
    every = {k for k, v in model.state_dict().items() if v.is_floating_point()}
    assert names() == every
    assert names(model=model) == {name for name, _ in model.named_parameters()}
    assert names(model=model, ignore="biasbn") == {"0.weight", "2.weight"} == names(ignore="biasbn")


def test_bad_input_is_named():
    checkpoints = path(3)
    with pytest.raises(InputError, match="checkpoints must be at least 3, two of them span no plane, got 2"):
        pca_trajectory(checkpoints[:2])
    with pytest.raises(InputError, match="all are equal: .* gives the live tensors, clone them"):
        pca_trajectory(checkpoints[:1] * 4)
    with pytest.raises(InputError, match="checkpoints must span a plane, these lie on one line"):
        pca_trajectory(path(1))
    with pytest.raises(InputError, match=r"checkpoints must have 'b' with shape \(5,\), number 1 has \(4,\)"):
        pca_trajectory([checkpoints[0], {**checkpoints[1], "b": torch.ones(4)}, checkpoints[2]])
    with pytest.raises(InputError, match="number 0 has no such entry"):
        pca_trajectory([{}, *checkpoints])
    with pytest.raises(InputError, match="checkpoints must be finite"):
        pca_trajectory([{**checkpoints[0], "b": torch.full((5,), math.nan)}, *checkpoints])
    with pytest.raises(InputError, match="these hold none"):
        pca_trajectory([{"n": torch.tensor(1)}] * 3)
    with pytest.raises(InputError, match="'weight' is not in the last one"):
        pca_trajectory(checkpoints, model=nn.Linear(2, 2))
    with pytest.raises(InputError, match='ignore must be "biasbn" or None'):
        pca_trajectory(checkpoints, ignore="bn")
    d = {"b": torch.ones(5, dtype=torch.float64)}
    with pytest.raises(InputError, match="directions must span a plane, these are parallel or zero"):
        project_trajectory(checkpoints, [d, {"b": 2 * d["b"]}])
    with pytest.raises(InputError, match="needs a checkpoint or more and 2 directions, got 9 and 1"):
        project_trajectory(checkpoints, [d])
    with pytest.raises(InputError, match="checkpoints must have 'x' with shape"):
        project_trajectory(checkpoints, [d, {"x": torch.ones(5)}])
