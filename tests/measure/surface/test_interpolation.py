"""The line between two models begins and ends in them, batch norm's statistics and all."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.surface.interpolation import Interpolation, interpolate
from tests.spine.forked import in_ranks


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        mask = torch.tensor([0.0, -math.inf, 0.0, 0.0])
        self.register_buffer("mask", mask)
        self.register_buffer("passing", torch.full((1,), float(seed)), persistent=False)

    def forward(self, x):
        x = torch.softmax(self.norm(self.first(x)) + self.mask, dim=1)
        return self.last(x).squeeze(1)


def net(seed, steps):
    model = Net(seed)
    for _ in range(steps):
        model(3 * torch.randn(16, 5) + seed)
    return model


def loss(model, batch):
    return (model(batch) - batch.sum(1)).square().mean()


DATA = [torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (7, 4, 1)]


def plain(model):
    model.eval()
    with torch.no_grad():
        return sum(float(loss(model, batch).double()) * len(batch) for batch in DATA) / 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_ends_are_the_two_models_exactly(dtype):
    a, b = net(1, 3).to(dtype).train(), net(2, 8).to(dtype).eval()
    data = [batch.to(dtype) for batch in DATA]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (a, b)]
    found = interpolate(a, b, loss, data, points=21)
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert a.training and not b.training
    ends = dict(zip(found.x, found.losses, strict=True))
    DATA[:], held = data, list(DATA)
    try:
        assert (ends[0.0], ends[1.0]) == (plain(a), plain(b))
    finally:
        DATA[:] = held
    assert (found.x[0], found.x[-1], found.mode, found.examples) == (-0.5, 1.5, "states", 12)
    assert Interpolation.from_json(found.to_json()) == found


def test_the_middle_has_the_mean_of_weights_and_statistics_and_integers_stay():
    a, b, seen = net(1, 3), net(2, 8), []

    def watching(model, batch):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        seen[-1]["passing"] = model.passing.clone()
        return loss(model, batch)

    interpolate(a, b, watching, DATA[:1], coordinates=[0.5, 0.75])
    middle = seen[1]
    for name in ("first.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(middle[name], (a.state_dict()[name] + b.state_dict()[name]) / 2)
    assert not torch.equal(a.norm.running_var, b.norm.running_var)
    assert int(middle["norm.num_batches_tracked"]) == 3 and float(middle["passing"]) == 1.0
    assert torch.equal(middle["mask"], a.mask)
    seen.clear()
    interpolate(a, b, watching, DATA[:1], coordinates=[0.5, 0.75], mode="weights")
    assert torch.equal(seen[1]["norm.running_var"], a.norm.running_var)
    torch.testing.assert_close(seen[1]["first.weight"], (a.first.weight + b.first.weight).detach() / 2)


def test_the_default_grid_is_the_reference_codes_and_meets_both_ends():
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    found = interpolate(a, b, lambda m, x: m(x).square().mean(), [torch.ones(1, 1)])
    assert len(found.x) == 401 and found.x[100] == 0.0 and found.x[300] == 1.0


def test_a_barrier_is_measured_from_the_straight_line_between_the_ends():
    found = Interpolation((-0.5, 0.0, 0.5, 1.0, 1.5), (50.0, 1.0, 4.0, 3.0, 50.0), "states", 1)
    assert found.barrier == 2.0
    assert Interpolation((0.0, 0.5, 1.0), (1.0, 0.0, 3.0), "states", 1).barrier == 0.0
    assert Interpolation((0.0, 0.5, 1.0), (1.0, math.inf, 3.0), "states", 1).barrier == math.inf
    assert math.isnan(Interpolation((0.0, 0.5), (1.0, 0.0), "states", 1).barrier)


def test_negative_running_variances_beyond_the_ends_are_counted():
    a, b = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    b.running_var.fill_(4.0)
    found = interpolate(b, a, lambda m, x: m(x).square().mean(), [torch.ones(3, 1)], coordinates=[0.0, 1.0, 1.5])
    assert found.losses[2] == math.inf and found.non_finite == 1 and math.isfinite(found.losses[1])


def test_frozen_models_have_a_line_too_and_an_interruption_leaves_no_trace():
    a, b = net(1, 3).requires_grad_(False), net(2, 8).requires_grad_(False)
    before, calls = {k: v.clone() for k, v in a.state_dict().items()}, []

    def failing(model, batch):
        calls.append(1)
        if len(calls) > 10:
            raise KeyboardInterrupt
        return loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        interpolate(a, b, failing, DATA)
    assert all(torch.equal(a.state_dict()[key], value) for key, value in before.items()) and a.training


def _in_a_rank(folder):
    found = interpolate(net(1, 3), net(2, 8), loss, DATA, points=9, process_group=dist.group.WORLD)
    (folder / f"{dist.get_rank()}").write_text(found.to_json())


def test_two_ranks_get_what_one_process_gets(tmp_path):
    whole = interpolate(net(1, 3), net(2, 8), loss, DATA, points=9)
    assert in_ranks(2, tmp_path, _in_a_rank, tmp_path) == [0, 0]
    for rank in range(2):
        assert Interpolation.from_json((tmp_path / f"{rank}").read_text()) == whole


@pytest.mark.parametrize(
    ("b", "options", "message"),
    [
        (nn.Linear(2, 2), {"mode": "all"}, 'mode must be "states" or "weights", got \'all\''),
        (nn.Linear(2, 2), {"points": 1}, "points must be at least 2 and low below high, got points=1"),
        (nn.Linear(2, 2), {"low": 1.0, "high": 1.0}, "low below high, got points=401, 1.0 to 1.0"),
        (nn.Linear(2, 3), {}, r"must have the same shapes, 'weight' has \(2, 2\) and \(3, 2\)"),
        (nn.Linear(2, 2, bias=False), {}, "must have the same entries, 'bias' is in one of them only"),
        ("b", {}, "model must be a torch.nn.Module, got str"),
    ],
)
def test_bad_input_is_named(b, options, message):
    with pytest.raises(InputError, match=message):
        interpolate(nn.Linear(2, 2), b, lambda m, x: m(x).mean(), [torch.ones(1, 2)], **options)
