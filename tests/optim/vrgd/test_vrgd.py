"""VRGradient in a loop: parameters left out, half precision, loss scales, its report and its state."""

import copy
import math

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.vrgd.multiplier import multiplier
from batchlab.optim.vrgd.optimizers import VRSGD, VRAdam
from batchlab.optim.vrgd.vrgd import VRGradient
from batchlab.testing.optimizers import same
from tests.optim.vrgd.groups import GAMMA, group_gradients, randn, weights


def test_a_parameter_that_a_group_leaves_out_counts_as_zero():
    found = []
    for zeros in (False, True):
        w, other = nn.Parameter(torch.zeros(30).double()), nn.Parameter(torch.zeros(2).double())
        vr = VRGradient([("w", w), ("other", other)])
        for index, g in enumerate(randn(8, 30, seed=5)):
            w.grad = g if index in (2, 3, 6) else torch.zeros_like(g) if zeros else None
            other.grad = torch.ones(2).double()
            vr.add_group(examples=index + 1)
        vr.finish()
        found.append(w.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    assert found[0].any()


def test_the_report_says_what_r_was():
    gradients = randn(8, 40, seed=6)
    w, still = nn.Parameter(torch.zeros(40).double()), nn.Parameter(torch.zeros(3))
    optimizer = VRSGD([("w", w), ("still", still)], lr=1.0)
    for g in gradients:
        w.grad = g / 8
        optimizer.add_group()
    optimizer.step()
    r = multiplier(gradients)
    found = optimizer.report()
    assert found.keys() == {"w"} and still.grad is None
    assert found["w"] == pytest.approx({"multiplier": r.mean().item(), "at_gamma": (r == GAMMA).double().mean().item()})
    torch.testing.assert_close(w.detach(), -r * gradients.mean(0), rtol=1e-12, atol=1e-15)


def test_half_precision_is_rounded_once():
    gradients = randn(8, 200, seed=7).bfloat16()
    w = nn.Parameter(torch.zeros(200, dtype=torch.bfloat16))
    vr = VRGradient([w])
    for g in gradients:
        w.grad = g.clone()
        vr.add_group()
    vr.finish()
    expected = (multiplier(gradients.double()) * gradients.double().sum(0)).bfloat16()
    assert w.grad.dtype == torch.bfloat16
    torch.testing.assert_close(w.grad, expected, rtol=2**-8, atol=0)
    assert (w.grad == expected).double().mean() > 0.99


def test_a_gradient_that_is_not_finite_stays_so_and_leaves_the_momentum_of_r():
    w = nn.Parameter(torch.zeros(30).double())
    optimizer = VRAdam([w], lr=0.1)
    for bad in (None, math.nan, math.inf):
        for index, g in enumerate(randn(8, 30, seed=8)):
            w.grad = g.clone()
            if bad is not None and index == 3:
                w.grad[5] = bad
            optimizer.add_group()
        optimizer.finish()
        if bad is None:
            kept = copy.deepcopy(optimizer.state[w])
        else:
            assert not w.grad[5].isfinite()
        optimizer.zero_grad()
    assert torch.equal(kept["multiplier_avg"], optimizer.state[w]["multiplier_avg"])
    assert kept["multiplier_weight"] == optimizer.state[w]["multiplier_weight"] == pytest.approx(0.1)


def test_with_a_gradient_scaler():
    """finish, unscale, clip, step: the scale leaves no trace, and an overflow skips the step."""
    ends = []
    for scaled in (False, True):
        parameters = [nn.Parameter(torch.tensor(w).float()) for w in weights()]
        optimizer = VRAdam(parameters, lr=0.01, second_moment="raw")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for t in (0, 1, 2):
            for index, gradients in enumerate(group_gradients([p.detach().numpy() for p in parameters], t)):
                loss = sum((p * torch.tensor(g).float()).sum() for p, g in zip(parameters, gradients, strict=True))
                loss = loss * (math.inf if t == 1 and scaled and index == 4 else 1.0)
                scaler.scale(loss).backward()
                optimizer.add_group()
            if t == 1 and not scaled:
                optimizer.zero_grad()
                continue
            optimizer.finish()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append([p.detach() for p in parameters])
    same(ends[1], ends[0], 1e-5)


def test_the_momentum_of_r_goes_round():
    def steps(parameter, optimizer, vr, seeds):
        for seed in seeds:
            for g in randn(8, 30, seed=seed):
                parameter.grad = g.clone()
                vr.add_group()
            vr.finish()
            optimizer.step()

    w = nn.Parameter(torch.zeros(30).double())
    optimizer = torch.optim.SGD([w], lr=0.1)
    vr = VRGradient(optimizer, ema=0.9)
    steps(w, optimizer, vr, range(3))
    v = nn.Parameter(w.detach().clone())
    resumed = torch.optim.SGD([v], lr=0.1)
    fresh = VRGradient(resumed, ema=0.9)
    fresh.load_state_dict(copy.deepcopy(vr.state_dict()))
    steps(w, optimizer, vr, range(3, 6))
    steps(v, resumed, fresh, range(3, 6))
    assert torch.equal(w, v)
    kept = vr.state_dict()
    assert kept["0"].keys() == {"multiplier_avg", "multiplier_weight"}
    fresh.load_state_dict(VRGradient(resumed, ema=0.9).state_dict())
    assert fresh.state_dict() == {}  # of before the first step: no momentum of a later one is left
    with pytest.raises(InputError, match=r"the state of parameter 0 has the shape \(30,\), not \(4,\)"):
        VRGradient([nn.Parameter(torch.zeros(4))]).load_state_dict(kept)
    with pytest.raises(InputError, match="the state is of parameter '7', but there are 1 parameters"):
        fresh.load_state_dict({"7": {}})


def test_parameters_of_several_groups_are_told_apart():
    a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    gradient = VRGradient(torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1))
    for _ in range(2):
        a.grad, b.grad = torch.randn(2, 3)
        gradient.add_group()
    gradient.finish()
    assert list(gradient.report()) == ["parameter 0 of shape (3,)", "parameter 1 of shape (3,)"]
