"""MKOR on a GPU: the CPU's steps in each variant, coarse factors, loss scales, its state through files."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.optim.mkor.mkor import MKOR
from tests.optim.mkor.small_mlp import batch, close, flat, made, mlp
from tests.optim.on_device import mesh_on, through_file

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
SETTINGS = {"inv_freq": 2, "gamma": 0.9}


def run(model, optimizer, steps, width=5):
    held = next(model.parameters())
    for step in steps:
        optimizer.zero_grad()
        x, y = batch(step, width=width)
        loss = F.cross_entropy(model(x.to(held)), y.to(held.device))
        loss.backward()
        if optimizer.switch == "knee":
            optimizer.observe(loss)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def images():
    torch.manual_seed(0)
    layers = [nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 4, 2, padding=1, padding_mode="circular"), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)).double()


@pytest.mark.parametrize("variant", ["exact", "released", "printed"])
@pytest.mark.parametrize("layers", ["linear", "conv"])
def test_the_steps_are_those_of_the_cpu(variant, layers, accelerator):
    make, width = (mlp, 5) if layers == "linear" else (images, 9)
    ends, told = [], []
    for device in (accelerator, CPU):
        model = make().to(device)
        optimizer = made(model, variant=variant, **SETTINGS)
        ends.append(flat(run(model, optimizer, range(6), width)).cpu())
        told.append(optimizer.report())
    close(*ends, 1e-9)
    for ours, theirs in zip(*told, strict=True):
        assert ours.updates == theirs.updates == 3 and ours.stabilised == theirs.stabilised
        assert ours[1:4] == pytest.approx(theirs[1:4], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_coarse_factors(dtype, accelerator):
    ends = []
    for device in (accelerator, CPU):
        model = mlp(dtype=torch.float32).to(device)
        optimizer = made(model, factor_dtype=dtype, **SETTINGS)
        ends.append(flat(run(model, optimizer, range(4))).cpu())
        factors = [layer["A"] for layer in optimizer.state_dict()["mkor"]["layers"].values()]
        assert {each.dtype for each in factors} == {dtype} and {each.device.type for each in factors} == {device.type}
    close(*ends, {torch.float16: 5e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype])


def test_a_state_goes_to_the_device_and_back(accelerator):
    whole = mlp()
    expected = flat(run(whole, made(whole, **SETTINGS), range(6)))
    model = mlp()
    optimizer = made(model, **SETTINGS)
    run(model, optimizer, range(2))
    for steps, device in ((range(2, 4), accelerator), (range(4, 6), CPU)):
        moved = mlp().to(device)
        moved.load_state_dict(through_file(model.state_dict(), where=device))
        resumed = made(moved, **SETTINGS)
        resumed.load_state_dict(through_file(optimizer.state_dict()))
        last = flat(run(moved, resumed, steps))
        model, optimizer = moved, resumed
    close(last, expected, 1e-9)
    assert [row.stabilised for row in optimizer.report()] == [0, 0]


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision_and_a_loss_scale(amp, accelerator):
    """The scale leaves no trace in the factors; what an overflowed pass told is forgotten."""
    ends = []
    for scale in (2.0**8, 1.0):
        model = mlp(dtype=torch.float32).to(accelerator)
        optimizer = made(model, factor_dtype=torch.float32, **SETTINGS)
        scaler = torch.amp.GradScaler(accelerator.type, init_scale=scale, enabled=scale > 1)
        for step in range(4):
            optimizer.zero_grad()
            optimizer.loss_scale = scaler.get_scale()
            x, y = batch(step)
            with torch.autocast(accelerator.type, amp):
                loss = F.cross_entropy(model(x.to(accelerator, torch.float32)), y.to(accelerator))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.steps == 4 and all(row.updates == 2 for row in optimizer.report())
        ends.append(flat(p.detach() for p in model.parameters()))
    close(*ends, 1e-2)
    optimizer.zero_grad()
    assert all(layer._passes is None for layer in optimizer._layers)


@pytest.mark.parametrize("switch", [2, "knee"])
def test_mkor_h(switch, accelerator):
    model = mlp().to(accelerator)
    optimizer = made(model, switch=switch, **SETTINGS)
    run(model, optimizer, range(4))
    assert optimizer.second_order == (switch == "knee")


def test_a_model_under_fsdp(accelerator):
    from torch.distributed.fsdp import fully_shard

    alone = mlp().to(accelerator)
    expected = flat(run(alone, made(alone, **SETTINGS), range(4)))
    with mesh_on(accelerator) as mesh:
        model = mlp().to(accelerator)
        fully_shard(model, mesh=mesh)
        optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **SETTINGS)
        for step in range(4):
            optimizer.zero_grad()
            x, y = batch(step)
            F.cross_entropy(model(x.to(accelerator)), y.to(accelerator)).backward()
            optimizer.step()
        found = flat([p.detach().full_tensor() for p in model.parameters()])
    close(found, expected, 1e-5)  # factors in float32, those beside it in float64
