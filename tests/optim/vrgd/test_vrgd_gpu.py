"""VRGD on a GPU: the multiplier of the CPU, its momentum through files, loss scales, a process group of one rank."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim import VRLAMB, VRSGD, VRAdam
from batchlab.optim.vrgd.multiplier import multiplier
from batchlab.optim.vrgd.vrgd import VRGradient
from batchlab.testing.optimizers import same
from tests.optim.on_device import mesh_on, through_file
from tests.optim.vrgd.groups import SIZES, group_gradients, naive_multiplier, weights

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


def tensors(arrays, device, dtype=torch.float64):
    return [torch.tensor(each, dtype=dtype).to(device) for each in arrays]


def gradients_after(vr, parameters, t, scale=1.0):
    """`.grad` after a step's groups, whose sizes differ; the weights stay."""
    for size, found in zip(SIZES, group_gradients(weights(), t), strict=True):
        for p, g in zip(parameters, found, strict=True):
            p.grad = torch.tensor(g * size / sum(SIZES) * scale).to(p)
        vr.add_group(examples=size)
    vr.finish()
    return [p.grad.clone() for p in parameters]


def test_the_multiplier_is_the_definitions(accelerator):
    found = group_gradients(weights(), 0)
    for index in range(3):
        stacked = [each[index] for each in found]
        r = multiplier(torch.tensor(np.stack(stacked)).to(accelerator), SIZES)
        assert r.device.type == accelerator.type
        np.testing.assert_allclose(r.cpu().numpy(), naive_multiplier(stacked, SIZES)[0], rtol=1e-10)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_gradients_are_those_of_the_cpu_and_the_momentum_changes_devices(ema, accelerator):
    here = [nn.Parameter(each) for each in tensors(weights(), CPU)]
    there = [nn.Parameter(each) for each in tensors(weights(), accelerator)]
    ours, theirs = VRGradient(there, ema=ema), VRGradient(here, ema=ema)
    for t in range(3):
        same(gradients_after(ours, there, t), gradients_after(theirs, here, t), 1e-10)
    told = theirs.report()
    for name, values in ours.report().items():
        assert values == pytest.approx(told[name], rel=1e-10)
    back, over = VRGradient(here, ema=ema), VRGradient(there, ema=ema)
    back.load_state_dict(through_file(ours.state_dict()))
    over.load_state_dict(through_file(theirs.state_dict()))
    expected = gradients_after(theirs, here, 3)
    same(gradients_after(over, there, 3), expected, 1e-10)
    same(gradients_after(back, here, 3), expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_scale_stays_in_the_gradient_alone(dtype, accelerator):
    plain, scaled = ([nn.Parameter(each) for each in tensors(weights(), accelerator, dtype)] for _ in range(2))
    ours = gradients_after(VRGradient(scaled), scaled, 0, scale=2.0**10)
    expected = gradients_after(VRGradient(plain), plain, 0)
    assert all(each.dtype == dtype for each in ours)
    same([each / 2.0**10 for each in ours], expected, 1e-6)


def test_a_process_group_of_one_rank_changes_nothing(accelerator):
    held = [nn.Parameter(each) for each in tensors(weights(), accelerator)]
    expected = gradients_after(VRGradient(held), held, 0)
    with mesh_on(accelerator):
        same(gradients_after(VRGradient(held, process_group=dist.group.WORLD), held, 0), expected, 1e-12)


@pytest.mark.parametrize("kind", [VRSGD, VRAdam, VRLAMB])
def test_a_gradient_scaler_and_half_precision_passes(kind, accelerator):
    """`finish` before `unscale_`; a step that overflows leaves no group behind."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(accelerator)
    optimizer = kind(model.parameters(), lr=0.01, groups=4)
    scaler = torch.amp.GradScaler(accelerator.type, init_scale=2.0**10)

    def take(step, spoilt=False):
        optimizer.zero_grad()
        x = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(step)).to(accelerator)
        for part in x:
            with torch.autocast(accelerator.type, torch.float16):
                loss = (model(part) - part[:, :2]).square().mean() / 4
            scaler.scale(loss).backward()
            if spoilt:
                model[0].weight.grad[0, 0] = torch.inf
            optimizer.add_group()
        optimizer.finish()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return [p.detach().clone() for p in model.parameters()]

    first = take(0)
    same(take(1, spoilt=True), first)
    assert scaler.get_scale() == 2.0**9
    assert all((a != b).any() for a, b in zip(take(2), first, strict=True))
    optimizer.zero_grad()
    with pytest.raises(InputError, match="at least two groups"):
        optimizer.step()
