"""Landscapes against closed forms, their invariance to scale, and a model that nothing shows was ever moved."""

import copy
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.random import derive_seed
from batchlab.measure.surface.directions import random_direction
from batchlab.measure.surface.landscape import Landscape, landscape
from tests.spine.forked import in_ranks


class Quadratic(nn.Module):
    """A batch is matrices H; the loss is the mean of ½·θᵀHθ over them."""

    def __init__(self, at):
        super().__init__()
        self.theta = nn.Parameter(at.clone())

    def forward(self, H):
        flat = self.theta.reshape(-1)
        return 0.5 * torch.einsum("i,nij,j->n", flat, H, flat)


def quadratic_loss(model, H):
    return model(H).mean()


def quadratic_data(size=12, examples=10, seed=0):
    """Symmetric matrices, their mean, and ragged batches of them."""
    H = torch.randn(examples, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    H = H @ H.mT
    return H.mean(0), list(H.split([4, 3, 2, 1]))


def quadratic(seed=1):
    return Quadratic(torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


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


class Everything(nn.Module):
    """Batch norm, dropout, a buffer that forward changes, tied and frozen parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.frozen = nn.Linear(6, 1).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.scratch.mul_(1.5)
        return self.frozen(self.drop(self.again(torch.tanh(self.norm(self.first(x)))))).squeeze(1)


def noisy_loss(model, batch):
    np.random.rand()
    random.random()
    return (model(batch) - 1 + 0.1 * torch.randn(len(batch))).square().mean()


def everything():
    torch.manual_seed(3)
    model = Everything()
    model(torch.randn(16, 6))
    model.norm.eval()
    model.first.bias.grad = torch.ones(6)
    return model


def picture(model):
    """All that must come back."""
    own = [*model.parameters(), *model.buffers()]
    return (
        [t.detach().clone() for t in own], [t.data_ptr() for t in own], [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()], model.first.bias.grad, model.first.weight.grad,
        torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(),
    )  # fmt: skip


def assert_same(before, after):
    assert all(map(torch.equal, before[0], after[0])) and torch.equal(before[6], after[6])
    assert before[1:4] == after[1:4] and before[7:] == after[7:]
    assert before[4] is after[4] and before[5] is after[5] is None


DATA = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (5, 4, 1)]


@pytest.mark.parametrize("dimensions", [1, 2])
def test_nothing_shows_that_the_model_was_moved(dimensions):
    model = everything()
    before = picture(model)
    found = landscape(model, noisy_loss, DATA, dimensions=dimensions, points=3)
    assert_same(before, picture(model))
    assert len({loss for row in found.losses for loss in row}) > 3
    again = landscape(model, noisy_loss, DATA, dimensions=dimensions, points=3)
    assert again == found  # a loss that draws random numbers gets the same ones


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("calls", [0, 1, 7])
def test_nothing_shows_after_an_interruption_either(error, calls):
    model, left = everything(), [calls]
    before = picture(model)

    def failing(model, batch):
        if not left[0]:
            raise error
        left[0] -= 1
        return noisy_loss(model, batch)

    with pytest.raises(error):
        landscape(model, failing, DATA, points=3)
    assert_same(before, picture(model))


def test_a_graph_that_the_caller_holds_stays_valid():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    (alone,) = torch.autograd.grad(model(x).square().mean(), [model[0].weight])
    held = model(x).square().mean()
    landscape(model, lambda m, b: m(b).square().mean(), [x], points=3)
    held.backward()
    assert torch.equal(model[0].weight.grad, alone)


def test_the_centre_is_the_plain_evaluation_bit_for_bit():
    model = everything()
    loss = lambda model, batch: (model(batch) - 1).square().mean()  # noqa: E731
    found = landscape(model, loss, DATA, points=3, directions=2)
    model.eval()
    with torch.no_grad():
        total = 0.0
        for batch in DATA:
            total += float(loss(model, batch).double()) * len(batch)
    assert found.origin == total / 10 == found.losses[0][1] == found.losses[1][1]
    whole = landscape(model, loss, [torch.cat(DATA)], points=3, directions=2)
    torch.testing.assert_close(torch.tensor(whole.losses), torch.tensor(found.losses), rtol=1e-5, atol=1e-6)


def test_shared_parameters_move_once_and_frozen_ones_stay():
    model = everything().eval()
    d = {"first.weight": torch.ones(6, 6)}
    seen = []

    def watching(model, batch):
        seen.append((float(model.again.weight[0, 0].detach()), float(model.frozen.weight[0, 0])))
        return (model(batch) - 1).square().mean()

    start, frozen = float(model.again.weight[0, 0].detach()), float(model.frozen.weight[0, 0])
    landscape(model, watching, DATA[:1], directions=[d], points=3)
    assert [each for each, _ in seen] == pytest.approx([start, start - 1, start + 1], abs=1e-6)
    assert {each for _, each in seen} == {frozen}


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


def test_a_shuffling_loader_gives_every_point_the_same_batches_and_its_generator_back():
    generator = torch.Generator().manual_seed(7)
    loader = DataLoader(TensorDataset(torch.randn(10, 6)), batch_size=4, shuffle=True, generator=generator)
    before, seen = generator.get_state(), []

    def loss(model, batch):
        seen.append(batch[0][0, 0].item())
        return model(batch[0]).square().mean()

    for data in (loader, DataLoader(TensorDataset(torch.randn(10, 6)), batch_size=4, shuffle=True)):
        seen.clear()
        landscape(nn.Linear(6, 1), loss, data, points=3, directions=1)
        assert seen[:3] == seen[3:6] == seen[6:9]
    assert torch.equal(generator.get_state(), before)

    def failing(model, batch):
        raise ValueError("a bad batch")

    with pytest.raises(ValueError, match="a bad batch") as held:  # while the traceback still holds the pass
        landscape(nn.Linear(6, 1), failing, loader, points=3)
    assert torch.equal(generator.get_state(), before) and held is not None


class Merging(nn.Linear):
    """An adapter that evaluation mode merges into the weights, as some do."""

    def train(self, mode=True):
        with torch.no_grad():
            self.weight += 1.0 if self.training and not mode else -1.0 if mode and not self.training else 0.0
        return super().train(mode)


def test_layers_that_merge_weights_in_evaluation_mode_are_left_as_they_are():
    model = Merging(6, 1)
    before = model.weight.detach().clone()
    landscape(model, lambda m, b: m(b).square().mean(), DATA, points=3, directions=1)
    assert torch.equal(model.weight, before) and model.training


def test_a_partly_filled_landscape_goes_on_where_it_ended():
    _, data = quadratic_data()
    model, calls = quadratic(), []

    def loss(model, batch):
        calls.append(1)
        return quadratic_loss(model, batch)

    whole = landscape(model, loss, data, dimensions=2, points=5)
    passes, held = len(calls), []

    def stop(so_far):
        held.append(so_far)
        if len(held) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        landscape(model, loss, data, dimensions=2, points=5, progress=stop)
    assert [each.unfilled for each in held] == list(range(24, 14, -1))
    part = Landscape.from_json(held[-1].to_json())
    assert part.unfilled == 15
    calls.clear()
    assert landscape(model, loss, data, dimensions=2, points=5, resume=part) == whole
    assert len(calls) == passes - 10 * 4
    for name, change in (
        ("seed", {"seed": 1}),
        ("norm", {"norm": "layer"}),
        ("x", {"span": 2.0}),
        ("x", {"points": 7}),
    ):
        with pytest.raises(InputError, match=f"resume must have the same {name}: "):
            landscape(model, loss, data, **({"dimensions": 2, "points": 5, "resume": part} | change))
    with pytest.raises(InputError, match="resume must be of the same weights, data and directions"):
        landscape(quadratic(seed=2), loss, data, dimensions=2, points=5, resume=part)
    with pytest.raises(InputError, match="resume must be a Landscape, got dict"):
        landscape(model, loss, data, dimensions=2, points=5, resume={})


def _in_a_rank(folder, dimensions):
    model, (_, data), calls = quadratic(), quadratic_data(), []
    part = None
    if dimensions == 2:  # each rank has another part of it already
        part = Landscape.from_json((folder / f"part-{dist.get_rank()}").read_text())

    def loss(model, batch):
        calls.append(1)
        return quadratic_loss(model, batch)

    group = dist.group.WORLD
    settings = {"dimensions": dimensions, "points": 5, "resume": part, "process_group": group}
    found = landscape(model, loss, data, **settings)
    (folder / f"{dist.get_rank()}").write_text(found.to_json())
    (folder / f"calls-{dist.get_rank()}").write_text(str(len(calls)))
    different = Quadratic(torch.full((3, 4), 1.0 + dist.get_rank(), dtype=torch.float64))
    with pytest.raises(InputError, match="all ranks must hold the same weights and data: they differ"):
        landscape(different, loss, data, process_group=group)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_two_ranks_share_the_points_and_get_what_one_process_gets(tmp_path, dimensions):
    _, data = quadratic_data()
    whole = landscape(quadratic(), quadratic_loss, data, dimensions=dimensions, points=5)
    if dimensions == 2:
        for rank in range(2):
            rows = [[x if (i == rank and j < 3) else math.nan for j, x in enumerate(row)]
                    for i, row in enumerate(whole.losses)]  # fmt: skip
            (tmp_path / f"part-{rank}").write_text(replace(whole, losses=tuple(map(tuple, rows))).to_json())
    assert in_ranks(2, tmp_path, _in_a_rank, tmp_path, dimensions) == [0, 0]
    calls = []
    for rank in range(2):
        assert Landscape.from_json((tmp_path / f"{rank}").read_text()) == whole
        calls.append(int((tmp_path / f"calls-{rank}").read_text()))
    points = 10 * 5 - 10 if dimensions == 1 else 25 - 6 - 1  # without the centres, which no pass is made for
    assert sum(calls) == 4 * (points + 2) and max(calls) - min(calls) <= 4 * 10


def made(rows, x=(-1.0, -0.5, 0.0, 0.5, 1.0), norm="filter", origin=0.0):
    return Landscape(1, x, (), tuple(map(tuple, rows)), origin, 1, (1.0,) * len(rows), norm, "biasbn", 0)


def test_widths_of_curves_that_end_early_or_are_infinite():
    bowl, open_right, walled = (4, 1, 0, 1, 4), (4, 1, 0, 0.1, 0.2), (math.inf, 0.5, 0, 0.5, math.inf)
    found = made([bowl, open_right, walled])
    assert found.widths(1.0) == (1.0, math.inf, 1.5)
    assert made([(0.0, 1.0)], x=(0.5, 1.0)).widths(0.5) == (math.inf,)  # nothing is known of the left
    assert made([(3.0, 2.0, 3.0)], x=(-1.0, 0.25, 1.0), origin=1.0).widths(1.0) == (0.5 + 0.25,)


def test_an_interval_is_never_narrower_than_what_was_seen():
    x = tuple(k / 10 for k in range(-10, 11))
    rows = [tuple(c * a * a for a in x) for c in range(1, 9)]
    wide = made(rows, x=x).width(0.9)
    assert wide.defined and 0 < wide.low < wide.value < wide.high <= 2 and wide.coverage > 0.95
    censored = made(rows, x=x).width(4.5)  # reached by the last four, the narrowest of them between 0.7 and 0.8
    assert not censored.defined and censored.method.startswith("undefined: median of 8 directions, 4 of them below")
    assert (censored.low, censored.high) == (2 * 0.7, math.inf)
    none = made(rows, x=x).width(100.0)
    assert (none.low, none.high) == (2.0, math.inf) and not none.defined
    one = made(rows[:1], x=x).width(0.5)
    assert (one.low, one.high) == (0.0, math.inf) and one.method.endswith("one direction has no interval")
    given = made(rows, x=x, norm="given").width(0.9)
    assert given == Estimate(wide.value, 0.0, math.inf, given.method) and "given have no interval" in given.method
    walled = made([(math.inf, 0.1, 0.0, 0.1, math.inf)] * 8).width(1.0)
    assert (walled.low, walled.value, walled.high) == (1.0, 1.5, 2.0)
    coarse = made([(100.0 * c, 0.0, 100.0 * c) for c in range(1, 9)], x=(-1.0, 0.0, 1.0)).width(1.0)
    assert (coarse.low, coarse.high) == (0.0, 2.0)  # the crossing may be anywhere between the points


def test_the_interval_over_directions_covers_at_its_rate():
    """400 landscapes of 10 directions through one minimum, each curve a parabola: 97.9 % is stated."""
    rng, covered = np.random.default_rng(0), 0
    eigenvalues = 1.0 / np.arange(1, 21) ** 2
    curvature = lambda n: rng.standard_normal((n, 20)) ** 2 @ eigenvalues  # noqa: E731
    truth = float(np.median(2 / np.sqrt(curvature(200_000))))
    x = np.linspace(-8, 8, 161)
    for _ in range(400):
        found = made(0.5 * curvature(10)[:, None] * x**2, x=tuple(x)).width(0.5)
        covered += found.low <= truth <= found.high
    stated = found.coverage
    assert stated == pytest.approx(0.9785, abs=1e-4)
    assert abs(covered / 400 - stated) < 4 * math.sqrt(stated * (1 - stated) / 400)  # 0.029


def test_a_profile_has_the_median_and_the_whole_range():
    found = made([(4, 1, 0, 1, 4), (2, 2, 0, 2, 2), (math.inf, 3, 0, 3, 6)])
    assert found.profile()[0] == (-1.0, 4.0, 2.0, math.inf) and found.profile()[3] == (0.5, 2.0, 1.0, 3.0)


LINE, ONES = nn.Linear(2, 1), [torch.ones(2, 2)]


def mean_of(model, batch):
    return model(batch).mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": iter(ONES)}, "ends after one: give list"),
        ({"data": (b for b in ONES)}, "got a generator that ends after one"),
        ({"data": torch.ones(2, 2)}, r"data must be a list of batches or a DataLoader, got one batch: give \[batch\]"),
        ({"data": (torch.ones(2, 2), torch.ones(2))}, r"got one batch: give \[batch\]"),
        ({"data": 3}, "data must be a list of batches or a DataLoader, got int"),
        ({"data": []}, "data must hold at least one batch with at least one example, got none"),
        ({"data": [(torch.ones(2), torch.ones(3))]}, "first dimension"),
        ({"count": lambda batch: -1}, "count must return the examples of a batch, at least 0, got -1"),
        ({"dimensions": 3}, "dimensions must be 1 or 2, got 3"),
        ({"points": 50}, "points must be an odd integer of at least 3, so that one of them is 0, got 50"),
        ({"points": 1}, "points must be an odd integer of at least 3"),
        ({"span": math.nan}, "span must be finite and > 0, got nan"),
        ({"norm": "l2"}, "norm must be one of"),
        ({"directions": 0}, "directions must be at least 1, got 0"),
        ({"directions": []}, "directions must be at least 1, got 0"),
        ({"dimensions": 2, "directions": 3}, "directions must be 2, got 3"),
        ({"directions": ["weight"]}, "a direction must be a mapping of name to tensor, got str"),
        ({"directions": [{"w": torch.ones(1)}]}, "'w' has .*, the model no trainable parameter of this name"),
        ({"directions": [{"weight": torch.ones(2)}]}, r"'weight' has \(2,\), the model \(1, 2\)"),
        ({"directions": [{"weight": torch.tensor([[1.0, math.nan]])}]}, "a direction must be finite"),
        ({"coordinates": [0.0, 0.0]}, "coordinates must be at least 2 finite ascending numbers"),
        ({"coordinates": [0.0, math.inf]}, "coordinates must be at least 2 finite ascending numbers"),
        ({"coordinates": ([0.0, 1.0], [0.0])}, "coordinates must be one axis"),
        ({"coordinates": [0.0, 1.0], "dimensions": 2}, "coordinates must be a pair of axes"),
        ({"loss": lambda m, b: m(b).squeeze(1)}, r"loss must return a scalar tensor, .* got shape \(2,\)"),
        ({"loss": lambda m, b: 1.0}, "loss must return a scalar tensor, .* got float"),
        ({"model": nn.ReLU()}, "the model has no parameter"),
    ],
)
def test_bad_input_is_named(options, message):
    given = {"model": LINE, "loss": mean_of, "data": ONES, "points": 3} | options
    with pytest.raises(InputError, match=message):
        landscape(given.pop("model"), given.pop("loss"), given.pop("data"), **given)


def test_widths_refuse_what_they_are_not_of():
    plane = landscape(LINE, lambda m, b: m(b).square().mean(), ONES, dimensions=2, points=3)
    with pytest.raises(InputError, match="of a landscape of 1 dimension, this one has 2"):
        plane.width(1.0)
    with pytest.raises(InputError, match="1 points are not evaluated yet: give the landscape as resume first"):
        made([(1, math.nan, 0, 1, 1)]).width(1.0)
    for level in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="level must be finite and > 0, in the loss's unit"):
            made([(1, 1, 0, 1, 1)]).width(level)
    with pytest.raises(InputError, match="level must be large enough to tell"):
        made([(1, 1, 1, 1, 1)], origin=1.0).width(1e-30)


def test_data_that_shrinks_between_passes_is_refused():
    class Shrinking:
        left = 3

        def __iter__(self):
            self.left -= 1
            return iter([torch.ones(self.left, 2)])

    with pytest.raises(InputError, match="the same examples at every pass, got 1 after 2"):
        landscape(LINE, mean_of, Shrinking(), points=3)


def test_half_precision_is_moved_in_float32_and_given_back():
    model = nn.Linear(6, 1, dtype=torch.bfloat16)
    before = model.weight.detach().clone()
    found = landscape(
        model, lambda m, b: m(b).float().square().mean(), [torch.randn(8, 6, dtype=torch.bfloat16)], points=5
    )
    assert torch.equal(model.weight, before) and len({x for row in found.losses for x in row}) > 10


def test_compiled_and_wrapped_models_are_moved_as_the_bare_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    data = [torch.randn(8, 6, dtype=torch.float64)]
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    plain = landscape(model, loss, data, points=3)
    compiled = landscape(torch.compile(model, backend="eager"), loss, data, points=3)
    torch.testing.assert_close(compiled.losses, plain.losses, rtol=1e-12, atol=0)


def _wrapped(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    data = [torch.randn(8, 6, dtype=torch.float64)]
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    plain = landscape(model, loss, data, points=3, directions=1)
    ddp = nn.parallel.DistributedDataParallel(model)
    if dist.get_rank() == 0:  # a forward pass of the wrapper would wait for the other rank
        assert landscape(ddp, loss, data, points=3, directions=1) == plain
    dist.barrier()
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(InputError, match="needs whole parameters, .*weight is sharded"):
        landscape(fully_shard(copy.deepcopy(model)), loss, data)


def test_a_rank_may_look_at_its_ddp_model_alone_and_sharded_models_are_refused(tmp_path):
    assert in_ranks(2, tmp_path, _wrapped, tmp_path) == [0, 0]


def test_a_landscape_whose_rows_do_not_fit_is_refused():
    with pytest.raises(InputError, match="a landscape's losses must be 1 rows of 5, got 1 rows"):
        made([(1.0, 2.0)])


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives_and_the_model_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    loss = lambda model, batch: (model(batch) - 1).square().mean()  # noqa: E731
    data = [batch.double() for batch in DATA]
    plain = landscape(model, loss, data, dimensions=2, points=5)
    before = [p.detach().clone() for p in model.cuda().parameters()]
    found = landscape(model, loss, data, dimensions=2, points=5)
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(plain.losses), rtol=1e-9, atol=1e-12)
    assert all(map(torch.equal, before, model.parameters()))
