"""AGVM on a GPU: the CPU's shares of noise, factors and weights; its state through files of the other device."""

import pytest
import torch

from batchlab.optim.agvm.agvm import AGVM
from batchlab.optim.agvm.half_gradients import CHUNK, dot_products
from tests.optim.agvm.two_heads import OPTIMIZERS, batch, cut, in_halves, loss, parts, two_heads, weights
from tests.optim.on_device import through_file

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
MAKE = OPTIMIZERS | {"fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True)}


def made(name, device, dtype=torch.float64):
    model = two_heads(dtype=dtype).to(device)
    return AGVM(MAKE[name](parts(model)), start=1, interval=2, alpha=0.5), model


def run(agvm, model, steps, dtype=torch.float64):
    device = next(model.parameters()).device
    for step in steps:
        found = in_halves(agvm, model, [each.to(device) for each in batch(step, dtype)])
    return found


@pytest.mark.parametrize("name", MAKE)
def test_the_steps_are_those_of_the_cpu(name, accelerator):
    (agvm, model), (expected, twin) = made(name, accelerator), made(name, CPU)
    ours, theirs = run(agvm, model, range(6)), run(expected, twin, range(6))
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-10)
    assert agvm.phis == pytest.approx(expected.phis, rel=1e-8) and min(agvm.phis) > 0.05
    assert agvm.factors == pytest.approx(expected.factors, rel=1e-9) and set(agvm.factors) != {1.0}


@pytest.mark.parametrize("name", MAKE)
def test_a_state_goes_to_the_device_and_back(name, accelerator):
    whole = run(*made(name, CPU), range(6))
    agvm, model = made(name, CPU)
    run(agvm, model, range(2))
    for steps, device in ((range(2, 4), accelerator), (range(4, 6), CPU)):
        resumed, moved = made(name, device)
        moved.load_state_dict(through_file(model.state_dict(), where=device))
        resumed.load_state_dict(through_file(agvm.state_dict()))
        last = run(resumed, moved, steps)
        agvm, model = resumed, moved
    torch.testing.assert_close(last, whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision(amp, accelerator):
    """A loss scale of 2^10 leaves no trace in φ, in Adam's form too, nor in the weights."""
    ends = []
    for scale in (2.0**10, 1.0):
        agvm, model = made("adamw", accelerator, torch.float32)
        scaler = torch.amp.GradScaler(accelerator.type, init_scale=scale, enabled=scale > 1)
        for step in range(4):
            agvm.zero_grad()
            for name, half in zip("AB", cut([each.to(accelerator) for each in batch(step)], 2), strict=True):
                with agvm.half(name, loss_scale=scaler.get_scale()):
                    with torch.autocast(accelerator.type, getattr(torch, amp)):
                        value = loss(model, *half)
                    scaler.scale(value).backward()
            scaler.step(agvm)
            scaler.update()
        ends.append((agvm.phis, weights(model)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=2e-2)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-2, atol=2e-3)


def test_products_over_chunks(accelerator):
    """Of more numbers than one chunk holds: exact sums of whole numbers."""
    a = torch.arange(CHUNK + 5, device=accelerator, dtype=torch.float32).remainder(3)
    b = torch.arange(CHUNK + 5, device=accelerator, dtype=torch.float32).remainder(2)
    expected = [(x.double() * y.double()).sum().item() for x, y in ((a, a), (a, b), (b, b))]
    assert dot_products(a, b).tolist() == expected
