"""Attached to a model it is `gsnr` of the groups' own gradients, over micro-batches or ranks, and leaves no trace."""

import math

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.noise.gradient_noise import unbiased_pair
from batchlab.measure.noise.gradient_signal import GradientSignal
from batchlab.measure.noise.signal_to_noise import Gsnr, gsnr
from tests.spine.forked import in_ranks


def network(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)
    model[2].weight = nn.Parameter(torch.randn(5, 5, dtype=dtype))
    model[4].bias.requires_grad_(False)
    return model


def batch(n=24, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator, dtype=dtype), torch.randn(n, generator=generator, dtype=dtype)


def loss_of(model, x, y):
    return (model(x).squeeze(1) - y).square().mean()


def stacked(model, x, y, sizes):
    """Each group's own mean gradient, by name."""
    rows = []
    for part, target in zip(x.split(sizes), y.split(sizes), strict=True):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rows.append(torch.autograd.grad(loss_of(model, part, target), list(trained.values())))
    return dict(zip(trained, map(torch.stack, zip(*rows, strict=True)), strict=True))


def watched(signal, model, x, y, sizes, scale=1.0):
    for part, target in zip(x.split(sizes), y.split(sizes), strict=True):
        with signal.group(len(part)):
            (scale * loss_of(model, part, target) * len(part) / sum(sizes)).backward()


@pytest.mark.parametrize("sizes", [[6, 6, 6, 6], [1, 5, 10, 8], [12, 12], [1] * 24])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_it_is_the_ratio_of_the_groups_own_gradients(sizes, scale):
    model, (x, y) = network(), batch()
    signal, k = GradientSignal(model), len(sizes)
    watched(signal, model, x, y, sizes, scale)
    found = signal.step(keep=True)
    assert (found.groups, found.group_size, found.per) == (k, pytest.approx(24 / k), "group")
    everything = []
    for layer, (name, gradients) in zip(found.layers, stacked(model, x, y, sizes).items(), strict=True):
        expected = gsnr(gradients, sizes)
        torch.testing.assert_close(signal.ratios[name], expected, rtol=1e-8, atol=1e-12)
        assert layer.name == name and layer.coordinates == expected.numel()
        assert layer.mean == pytest.approx(float(expected.mean()), rel=1e-8)
        ordered = expected.flatten().sort().values
        assert layer.quantiles[2] == pytest.approx(float(ordered[math.ceil(0.5 * len(ordered)) - 1]), rel=1e-8)
        assert layer.quantiles == tuple(sorted(layer.quantiles))
        everything.append(expected.flatten())
    everything = torch.cat(everything)
    assert found.whole.coordinates == everything.numel()
    assert found.whole.mean == pytest.approx(float(everything.mean()), rel=1e-8)
    unbiased = ((k - 3) * found.whole.mean - 1) / k
    assert found.whole.unbiased_mean == pytest.approx(unbiased) if k >= 4 else math.isnan(found.whole.unbiased_mean)
    assert Gsnr.from_json(found.to_json()).whole == found.whole or k < 4


def test_the_ratio_of_sums_is_the_group_size_over_the_noise_scale():
    """With groups of one size, of McCandlish's unbiased pair."""
    model, (x, y) = network(), batch()
    signal, sizes = GradientSignal(model), [6, 6, 6, 6]
    watched(signal, model, x, y, sizes)
    found = signal.step()
    rows = torch.cat([g.flatten(1) for g in stacked(model, x, y, sizes).values()], 1)
    pair = unbiased_pair(float((rows**2).sum(1).mean()), float((rows.mean(0) ** 2).sum()), 6, 24)
    assert found.whole.of_sums == pytest.approx(6 * pair.grad_sq / pair.trace, rel=1e-9)
    each = found.per_sample()
    assert each.per == "sample" and each.per_sample() == each
    assert each.whole.of_sums == pytest.approx(pair.grad_sq / pair.trace, rel=1e-9)
    assert each.layers[0].mean == pytest.approx(found.layers[0].mean / 6)
    assert each.layers[0].zeros == found.layers[0].zeros


def test_a_parameter_that_a_group_does_not_use_counts_as_zero_there():
    a, b = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([3.0]))
    unused = nn.Parameter(torch.tensor([1.0]))
    model = nn.ParameterList([a, b, unused])
    signal = GradientSignal(model)
    for used in ((a, b), (a,), (a, b), (b,)):
        with signal.group(1):
            sum(p.sum() for p in used).backward()
    first, second, never = signal.step().layers
    assert first.mean == second.mean == pytest.approx(gsnr(torch.tensor([[1.0], [1.0], [1.0], [0.0]])).item())
    assert (never.mean, never.zeros, never.of_sums != never.of_sums) == (0.0, 1.0, True)


def test_identical_groups_are_all_signal():
    model, (x, y) = network(), batch(6)
    signal = GradientSignal(model)
    watched(signal, model, x.repeat(4, 1), y.repeat(4), [6] * 4)
    found = signal.step()
    assert found.whole.infinite + found.whole.zeros == 1.0 and math.isnan(found.whole.mean)
    assert found.whole.of_sums == math.inf


def test_what_is_not_finite_is_said():
    model, (x, y) = network(), batch()
    x[0, 0] = math.nan
    signal = GradientSignal(model)
    watched(signal, model, x, y, [12, 12])
    found = signal.step()
    assert math.isnan(found.whole.mean) and math.isnan(found.layers[0].quantiles[0])
    watched(signal, model, *batch(), [12, 12])
    assert math.isfinite(signal.step().whole.mean)


def test_watching_changes_no_bit_and_close_takes_the_hooks_off():
    courses = []
    for attached in (False, True):
        model, (x, y) = network(torch.bfloat16), batch(dtype=torch.bfloat16)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        signal = GradientSignal(model) if attached else None
        for _ in range(3):
            optimizer.zero_grad()
            for part, target in zip(x.split(6), y.split(6), strict=True):
                if signal is None:
                    (loss_of(model, part, target) / 4).backward()
                else:
                    with signal.group(6):
                        (loss_of(model, part, target) / 4).backward()
            if signal is not None:
                assert math.isfinite(signal.step().whole.of_sums)
            optimizer.step()
        courses.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *courses))
    signal.close()
    assert not any(p._backward_hooks for p in model.parameters())


def _in_ranks(expected):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model, (x, y) = network(torch.float32), batch(dtype=torch.float32)
    signal, rank = GradientSignal(model), dist.get_rank()
    wrapped = DistributedDataParallel(model)
    with signal.group(6):
        loss_of(wrapped, x.split(6)[rank], y.split(6)[rank]).backward()
    found = signal.step(keep=True)
    for name, ratio in expected.items():
        torch.testing.assert_close(signal.ratios[name], ratio, rtol=1e-6, atol=1e-6)
    assert found.groups == 4 and found.group_size == 6.0


def _ragged_in_ranks(expected):
    import torch.distributed as dist

    model, (x, y) = network(), batch()
    signal, sizes = GradientSignal(model), [1, 5, 10, 8]
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    for part, target in parts[:3] if dist.get_rank() == 0 else parts[3:]:
        with signal.group(len(part)):
            (loss_of(model, part, target) * len(part) / 24).backward()
    assert signal.step(keep=True).groups == 4
    for name, ratio in expected.items():
        torch.testing.assert_close(signal.ratios[name], ratio, rtol=1e-9, atol=1e-12)


def test_ranks_are_groups_and_agree_with_micro_batches_of_one_process(tmp_path):
    model, (x, y) = network(torch.float32), batch(dtype=torch.float32)
    signal = GradientSignal(model)
    watched(signal, model, x, y, [6] * 4)
    signal.step(keep=True)
    assert in_ranks(4, tmp_path, _in_ranks, dict(signal.ratios)) == [0] * 4
    model, (x, y) = network(), batch()
    signal = GradientSignal(model)
    watched(signal, model, x, y, [1, 5, 10, 8])
    signal.step(keep=True)
    assert in_ranks(2, tmp_path, _ragged_in_ranks, dict(signal.ratios)) == [0] * 2


def test_bad_use_is_named():
    model, (x, y) = network(), batch()
    signal = GradientSignal(model)
    with signal.group(24):
        loss_of(model, x, y).backward()
    with pytest.raises(InputError, match="a step needs at least two groups, got 1"):
        signal.step()
    with pytest.raises(InputError, match="examples must be an integer of at least 1, got 0"), signal.group(0):
        pass
    with pytest.raises(InputError, match="group must not be entered twice at once"), signal.group(1), signal.group(1):
        pass
    with pytest.raises(InputError, match=r"0\.\w+ got two gradients in one group"), signal.group(24):
        for _ in range(2):
            model[0](x).sum().backward()
    watched(signal, model, x, y, [12, 12])
    assert signal.step().groups == 2  # what went before the error is forgotten
    with pytest.raises(InputError, match="the model has no parameter that requires a gradient"):
        GradientSignal(nn.Tanh())
