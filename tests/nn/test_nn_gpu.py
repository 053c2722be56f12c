"""Ghost and split BatchNorm on a GPU: the CPU's numbers in every layout, in half precision, and states taken across."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.nn import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    SplitBatchNorm1d,
    SplitBatchNorm3d,
    convert_ghost_batchnorm,
    convert_plain_batchnorm,
    convert_split_batchnorm,
    ghost_batch_norm,
    merge_statistics,
)
from batchlab.nn.batchnorm_kind import set_batchnorm_kind
from tests.nn.test_ghost_batchnorm import KINDS, LAST, inputs

pytestmark = pytest.mark.gpu
CPU, DOUBLE = torch.device("cpu"), torch.float64
SPLIT = {1: SplitBatchNorm1d, 4: SplitBatchNorm3d}


def steps(layer, batches, device, memory_format=torch.preserve_format):
    """Outputs, the gradients of inputs and parameters, and the state, of some updates and an evaluation; on the CPU."""
    found, layer = [], layer.to(device)
    for x in batches:
        x = x.to(device).clone(memory_format=memory_format).requires_grad_()
        layer.zero_grad()
        y = layer(x)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).to(device)
        (y * weights).sum().backward()
        assert y.device == x.device and y.stride() == x.stride()
        found += [y, x.grad, *(p.grad for p in layer.parameters())]
    found += [layer.eval()(x), *layer.state_dict().values()]
    return [each.detach().cpu().clone() for each in found]


def close(ours, theirs, tolerance=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("settings", [{}, {"ragged": "merge"}, {"interleaved": True}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_ghosts_are_those_of_the_cpu(accelerator, dims, settings):
    batches = [inputs(n, dims, seed=n) for n in (16, 14, 13)]
    make = lambda: KINDS[dims][0](3, 4, dtype=DOUBLE, **settings)  # noqa: E731
    close(steps(make(), batches, accelerator), steps(make(), batches, CPU))


@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_channels_last_comes_out_as_it_went_in(accelerator, dims, interleaved):
    batches = [inputs(n, dims, seed=n) for n in (16, 14)]
    make = lambda: KINDS[dims][0](3, 4, dtype=DOUBLE, interleaved=interleaved)  # noqa: E731
    close(steps(make(), batches, accelerator, LAST[dims]), steps(make(), batches, CPU))


@pytest.mark.parametrize("loop", [False, True])
def test_one_call_and_a_call_a_ghost_are_the_same(accelerator, loop):
    x = inputs(24, 3).to(accelerator)
    mean, var, tracked = (torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE), torch.tensor(0))
    state = [each.to(accelerator) for each in (mean, var, tracked)]
    y = ghost_batch_norm(x, *state[:2], 8, training=True, num_batches_tracked=state[2], loop=loop)
    for i, part in enumerate(x.split(8)):
        close(y[8 * i : 8 * i + 8], F.batch_norm(part, mean.to(accelerator), var.to(accelerator), training=True))
    assert state[2].item() == 3


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dims", [1, 4])
def test_splits_are_those_of_the_cpu(accelerator, dims, momentum):
    batches = [inputs(n, dims, seed=n) for n in (16, 12)]
    make = lambda: SPLIT[dims](3, 4, momentum=momentum, dtype=DOUBLE)  # noqa: E731
    close(steps(make(), batches, accelerator), steps(make(), batches, CPU))
    mean, var = (torch.rand(2, 3, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    ours = merge_statistics(mean.to(accelerator), var.to(accelerator))
    close([each.cpu() for each in ours], list(merge_statistics(mean, var)), 1e-6)


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4), nn.BatchNorm1d(4)]
    return nn.Sequential(*layers)


def picture(n=16):
    return torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("convert", [lambda m: convert_ghost_batchnorm(m, 4), lambda m: convert_split_batchnorm(m, 4)])
def test_layers_are_converted_where_they_lie_and_states_go_across(accelerator, convert):
    model = network().double().to(accelerator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model)
    assert all(each.device.type == accelerator.type for each in (*model.parameters(), *model.buffers()))
    model(picture().double().to(accelerator)).square().mean().backward()
    optimizer.step()
    there = convert(network().double())
    there.load_state_dict(model.state_dict())
    back = convert(network().double().to(accelerator))
    back.load_state_dict(copy.deepcopy(there.state_dict()))
    x = picture(8).double()
    y = there(x)
    close(model(x.to(accelerator)).cpu(), y)
    close(back(x.to(accelerator)).cpu(), y)
    plain = convert_plain_batchnorm(model).eval()
    close(plain(x.to(accelerator)).cpu(), there.eval()(x))


@pytest.mark.parametrize("kind", ["ghost", "split"])
def test_float32_and_bf16_autocast_are_off_by_rounding_alone(accelerator, kind):
    """Outputs are of variance 1: float32 (with TF32 in the convolution) is off by 1e-3, bf16 by 2^-8 or a few."""
    convert = {"ghost": convert_ghost_batchnorm, "split": convert_split_batchnorm}[kind]
    right = convert(network().double(), 4)(picture().double())
    for tolerance, enabled in ((2e-2, False), (0.3, True)):
        model = convert(network(), 4).to(accelerator)
        with torch.autocast(accelerator.type, torch.bfloat16, enabled=enabled):
            y = model(picture().to(accelerator))
        y.float().square().mean().backward()
        torch.testing.assert_close(y.double().cpu(), right, rtol=0, atol=tolerance)
        assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
        assert model[1].running_mean.dtype == torch.float32 and model[1].running_mean.any()


def test_many_small_ghosts_of_many_channels(accelerator):
    """512 ghosts of 64 channels are 32,768 channels of one call."""
    layer = GhostBatchNorm2d(64, 2, dtype=torch.float32)
    x = torch.randn(1024, 64, 2, 2, generator=torch.Generator().manual_seed(0))
    y = layer.to(accelerator)(x.to(accelerator)).cpu()
    right = torch.cat([F.batch_norm(part.double(), None, None, training=True) for part in x.split(2)])
    torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-4)


def test_ghosts_inside_a_gradscaler_step(accelerator):
    model = nn.Sequential(nn.Linear(6, 8), GhostBatchNorm1d(8, 4), nn.ReLU(), nn.Linear(8, 1)).to(accelerator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(accelerator.type, init_scale=2.0**8)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).to(accelerator)
    before = model[0].weight.detach().clone()
    with torch.autocast(accelerator.type, torch.float16 if accelerator.type == "cuda" else torch.bfloat16):
        loss = (model(x).squeeze(1) - x.sum(1)).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**8 and not torch.equal(model[0].weight, before)


def test_the_kinds_change_on_the_device(accelerator):
    model = network().double().to(accelerator)
    x = picture().double().to(accelerator)
    plain = copy.deepcopy(model)(x)
    if accelerator.type == "cuda":  # synchronised layers of one process are plain ones
        close(set_batchnorm_kind(copy.deepcopy(model), "sync")(x), plain)
    split = set_batchnorm_kind(model, "split", 4)(x)
    assert float((split - plain).detach().abs().max()) > 1e-3
    model.load_state_dict(network().double().state_dict(), strict=False)
    close(set_batchnorm_kind(model, "plain")(x), plain)
