"""What VRGD refuses: arguments, and steps that miss their groups."""

import math

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.vrgd.multiplier import multiplier
from batchlab.optim.vrgd.optimizers import VRLAMB, VRSGD, VRAdam
from batchlab.optim.vrgd.vrgd import VRGradient


def test_refusals():
    w = nn.Parameter(torch.ones(3))
    for bad in (0, 1):
        with pytest.raises(InputError, match=f"the multiplier needs at least two groups, got {bad}"):
            VRGradient([w], groups=bad)
    with pytest.raises(InputError, match="groups must be an integer of at least 2, got 2.5"):
        VRGradient([w], groups=2.5)
    for gamma in (0, -0.1, 1.5, math.nan):
        for make in (VRGradient, VRSGD):
            with pytest.raises(InputError, match=r"gamma must lie in \(0, 1\), got"):
                make([w], gamma=gamma)
        with pytest.raises(InputError, match=r"gamma must lie in \(0, 1\), got"):
            multiplier(torch.ones(2, 3), gamma=gamma)
    with pytest.raises(InputError, match="cap must be finite and > 0, got 0"):
        VRGradient([w], cap=0)
    with pytest.raises(InputError, match=r"ema must lie in \(0, 1\), got 1"):
        VRGradient([w], ema=1)
    with pytest.raises(InputError, match=r"beta3 must lie in \(0, 1\), got 1"):
        VRAdam([w], beta3=1)
    with pytest.raises(InputError, match='second_moment must be "scaled" or "raw", got \'both\''):
        VRLAMB([w], lr=0.1, second_moment="both")
    with pytest.raises(InputError, match="process_group must be a torch.distributed.ProcessGroup that this rank is in"):
        VRGradient([w], process_group="all")
    with pytest.raises(InputError, match="params must name each parameter once"):
        VRGradient([w, w])
    with pytest.raises(InputError, match="params must be an optimizer, or tensors"):
        VRGradient([])
    with pytest.raises(InputError, match="VRGD takes real parameters, got turns of torch.complex64"):
        VRGradient([("turns", nn.Parameter(torch.ones(2, dtype=torch.complex64)))])
    with pytest.raises(InputError, match="examples must name each of the 2 groups, got 3"):
        multiplier(torch.ones(2, 4), [1, 2, 3])


def test_steps_that_miss_their_groups_are_refused():
    w = nn.Parameter(torch.ones(3))
    optimizer = VRSGD([("w", w)], lr=0.1, groups=3)
    with pytest.raises(
        InputError, match=r"needs at least two groups, got 0: call add_group\(\) after the backward pass"
    ):
        optimizer.step()
    with pytest.raises(InputError, match="add_group found no gradient: call it after each micro-batch's backward pass"):
        optimizer.add_group()
    w.grad = torch.ones(3)
    with pytest.raises(InputError, match=r"w has a gradient of no group: call add_group\(\)"):
        optimizer.step()
    optimizer.add_group()
    with pytest.raises(InputError, match="needs at least two groups, got 1"):
        optimizer.step()
    w.grad = torch.ones(3)
    with pytest.raises(InputError, match="examples must be given for all groups of a step, or for none"):
        optimizer.add_group(examples=4)
    with pytest.raises(InputError, match="examples must be finite and > 0, got 0"):
        optimizer.add_group(examples=0)
    optimizer.add_group()
    with pytest.raises(InputError, match="the step must have groups=3 groups, got 2 over all ranks"):
        optimizer.step()
    assert torch.equal(w, torch.ones(3))
    optimizer.zero_grad()
    assert optimizer.gradient.added == 0
    for _ in range(3):
        w.grad = torch.ones(3)
        optimizer.add_group(examples=2.5)
    optimizer.step()
    assert not torch.equal(w, torch.ones(3))
    for message in ("w has a gradient of no group", "needs at least two groups, got 0"):
        with pytest.raises(InputError, match=message):
            optimizer.step()
        optimizer.zero_grad()
