"""The noise estimators on a GPU: what the CPU gives, under autocast and loss scaling too, and states taken across."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.measure.noise.batch_tests import batch_moments, pooled_variance
from batchlab.measure.noise.coordinate_test import coordinate_moments
from batchlab.measure.noise.dual_norm import GEOMETRIES, dual_norm_noise, dual_norm_parts, group_gradients
from batchlab.measure.noise.gradient_noise import METHODS, GradientNoise
from batchlab.measure.noise.gradient_signal import GradientSignal
from batchlab.measure.noise.group_gradients import GroupGradients
from batchlab.measure.noise.independence import gradient_independence_curve
from batchlab.measure.noise.signal_to_noise import gsnr
from batchlab.measure.norms import CHUNK, sq_norm, sq_norm_of_sum, to_floats
from tests.measure.noise.single_examples import make_batch, make_model, run_passes

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
close = pytest.approx


def batch_on(device, seed, n=12):
    return tuple(part.to(device) for part in make_batch(seed, n))


def take_steps(noise, model, steps):
    """A few updates by plain gradient descent; (grad_sq, trace) of each."""
    found, device = [], next(model.parameters()).device
    for step in steps:
        model.zero_grad()
        run_passes(noise, model, *batch_on(device, step), [5, 7])
        noise.step()
        found.append(noise.pair)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return found


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ranks"])
def test_a_noise_pair_is_that_of_the_cpu(accelerator, method):
    steps = 20 if method == "norm_layers" else 3
    models = [make_model().to(device) for device in (accelerator, CPU)]
    noise, reference = (GradientNoise(model, method) for model in models)
    found = take_steps(noise, models[0], range(steps))
    right = take_steps(reference, models[1], range(steps))
    assert all(math.isfinite(number) for pair in right for number in pair)
    for ours, theirs in zip(found, right, strict=True):
        assert ours == close(theirs, rel=1e-9, abs=1e-14)
    assert noise.skipped == 0


def test_projections_are_the_same_on_both(accelerator):
    model, found = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 9)).double(), []
    tokens = torch.randint(9, (6, 40), generator=torch.Generator().manual_seed(0))
    for device in (CPU, accelerator):
        own = copy.deepcopy(model).to(device)
        noise, at = GradientNoise(own, "per_example", projections=2), tokens.to(device)
        with noise.micro_batch(len(at)):
            F.cross_entropy(own(at).flatten(0, 1), at.roll(1, 1).flatten()).backward()
        noise.step()
        found.append(noise.pair)
    assert found[1] == close(found[0], rel=1e-9)
    exact = GradientNoise(own, "per_example")
    own.zero_grad()
    with exact.micro_batch(len(at)):
        F.cross_entropy(own(at).flatten(0, 1), at.roll(1, 1).flatten()).backward()
    exact.step()
    assert exact.pair.trace != close(found[1].trace, rel=1e-6)  # they were taken


@pytest.mark.parametrize("form", [{"foreach": True}, {"fused": True}, {"amsgrad": True}])
def test_the_preconditioned_pair_is_that_of_the_cpu(accelerator, form):
    def last(device):
        model = make_model().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **form)
        noise = GradientNoise(model, weighting="preconditioned", optimizer=optimizer)
        for step in range(3):
            optimizer.zero_grad()
            run_passes(noise, model, *batch_on(device, step), [5, 7])
            noise.step()
            optimizer.step()
        return noise.pair

    assert last(accelerator) == close(last(CPU), rel=1e-8)


def test_a_state_goes_from_one_device_to_the_other(accelerator):
    for there, here in ((CPU, accelerator), (accelerator, CPU)):
        model = make_model().to(there)
        before = GradientNoise(model, "per_example", projections=2)
        take_steps(before, model, range(5))
        state, weights = before.state_dict(), copy.deepcopy(model.state_dict())
        take_steps(before, model, [5])
        resumed = make_model().to(here)
        resumed.load_state_dict(weights)
        noise = GradientNoise(resumed, "per_example", projections=2)
        noise.load_state_dict(state)
        take_steps(noise, resumed, [5])
        ends = [(found.value, found.low, found.high) for found in (noise.estimate(), before.estimate())]
        assert ends[0] == close(ends[1], rel=1e-9) and math.isfinite(ends[0][0])


def test_autocast_and_a_loss_scale_change_the_pair_by_rounding_alone(accelerator):
    """bf16 has 8 bits: 2 to 3 % are left of a step's squares; the loss scale is taken out exactly."""
    x, y = make_batch(0, 64)
    found = {}
    for kind in ("plain", "scaled", "bf16"):
        model = make_model().float().to(accelerator)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler(accelerator.type, init_scale=2.0**10, enabled=kind != "plain")
        noise = GradientNoise(model)
        for part_x, part_y in zip(x.float().to(accelerator).split(16), y.to(accelerator).split(16), strict=True):
            with noise.micro_batch(16), torch.autocast(accelerator.type, torch.bfloat16, enabled=kind == "bf16"):
                scaler.scale(F.cross_entropy(model(part_x), part_y) / 4).backward()
        scaler.unscale_(optimizer)
        noise.step()
        found[kind] = noise.pair
    assert found["scaled"] == close(found["plain"], rel=1e-5)
    assert found["bf16"] == close(found["plain"], rel=0.2)
    assert found["bf16"] != close(found["plain"], rel=1e-6)


def test_the_signal_to_noise_ratio_is_that_of_the_cpu(accelerator):
    def measured(device):
        model = make_model().to(device)
        signal, (x, y) = GradientSignal(model), batch_on(device, 0, 32)
        for part_x, part_y in zip(x.split(4), y.split(4), strict=True):
            with signal.group(4):
                (F.cross_entropy(model(part_x), part_y) / 8).backward()
        found = signal.step(keep=True)
        assert all(r.device.type == device.type for r in signal.ratios.values())
        return [(*layer.quantiles, layer.mean, layer.of_sums, layer.zeros) for layer in (*found.layers, found.whole)]

    for ours, theirs in zip(measured(accelerator), measured(CPU), strict=True):
        assert ours == close(theirs, rel=1e-8, abs=1e-12)


def test_gsnr_knows_coordinates_without_noise(accelerator):
    rows = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 0.0]], device=accelerator)
    assert gsnr(rows).tolist() == [4.0, math.inf, 0.0]
    assert gsnr(rows, [1, 3], normalise=True).device == rows.device


def stacks(device, groups=8):
    model = make_model().to(device)
    x, y = batch_on(device, 0, 4 * groups)
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    return group_gradients(model, loss, list(zip(x.split(4), y.split(4), strict=True)))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_dual_norms_are_those_of_the_cpu(accelerator, geometry):
    ours, theirs = stacks(accelerator), stacks(CPU)
    assert all(stack.device.type == accelerator.type for stack in ours.values())
    found, right = (dual_norm_parts(each, 4, geometry) for each in (ours, theirs))
    assert found == close(right, rel=1e-8)
    assert dual_norm_noise([ours] * 4, 4, geometry).value == close(dual_norm_noise([theirs] * 4, 4, geometry).value)


def test_batch_tests_are_those_of_the_cpu(accelerator):
    ours, theirs = stacks(accelerator), stacks(CPU)
    assert batch_moments(ours, examples=4) == close(batch_moments(theirs, examples=4), rel=1e-10)
    assert coordinate_moments(ours, examples=4) == close(coordinate_moments(theirs, examples=4), rel=1e-8)
    means, variances = torch.tensor([1.0, 4.0]), torch.tensor([2.0, 0.0])
    assert pooled_variance(means.to(accelerator), variances.to(accelerator), [2, 1]).item() == 4.0


def test_group_gradients_give_the_moments_and_put_the_sum_back(accelerator):
    def measured(device):
        model = make_model().to(device)
        groups, (x, y) = GroupGradients(model.parameters()), batch_on(device, 1, 24)
        for part_x, part_y in zip(x.split([5, 7, 12]), y.split([5, 7, 12]), strict=True):
            (F.cross_entropy(model(part_x), part_y) * len(part_x) / 24).backward()
            groups.add(len(part_x), share=len(part_x) / 24)
        return groups.finish(), [p.grad.cpu() for p in model.parameters()]

    (found, ours), (right, theirs) = measured(accelerator), measured(CPU)
    assert found == close(right, rel=1e-9)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_the_independence_curve_is_that_of_the_cpu(accelerator):
    rows = torch.randn(64, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.2
    found, right = gradient_independence_curve(rows.to(accelerator)), gradient_independence_curve(rows)
    assert [each.value for each in found.inverse] == close([each.value for each in right.inverse], rel=1e-10)
    assert found.plateau == right.plateau


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [7, CHUNK, 3 * CHUNK + 5])
def test_squared_norms_of_large_tensors(accelerator, dtype, size):
    """Sums of float32 within a chunk are off by 2^-24·√65536 = 1.5e-5 at the very most."""
    g, w = torch.randn(2, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    ours, weights = g.to(accelerator), w.abs().to(accelerator)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert to_floats([sq_norm(ours), 3.0]) == close([g.double().square().sum().item(), 3.0], rel=tolerance)
    exact = (g.double().square() * w.abs().double()).sum().item()
    assert sq_norm(ours, weights).item() == close(exact, rel=1e-12 if dtype == torch.float64 else 1e-3)
    rough = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-3}[dtype]
    both = (g.double() + w.double()).square().sum().item()
    assert float(sq_norm_of_sum(ours, w.to(accelerator))) == close(both, rel=rough)


def test_sparse_gradients_have_the_norm_of_dense_ones(accelerator):
    table = nn.Embedding(30, 5, sparse=True, device=accelerator)
    table(torch.tensor([3, 3, 7], device=accelerator)).square().sum().backward()
    assert sq_norm(table.weight.grad).item() == close(table.weight.grad.to_dense().square().sum().item(), rel=1e-6)
