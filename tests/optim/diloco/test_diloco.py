"""DiLoCo in one process: its limits, its outer step by hand, clipping, closures, schedules and hooks."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchlab.optim.diloco.diloco import DiLoCo, pseudo_gradient
from batchlab.optim.diloco.replicas import clip_
from tests.optim.diloco.diloco_fixture import INNER, ByHand, backward, batch, network, train, weights


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("inner_steps", [1, 10])
def test_one_replica_with_a_plain_outer_step_is_its_inner_optimizer(name, inner_steps):
    """η = 1, μ = 0: to rounding, for θ - (θ - θ_m) rounds; so the inner state goes on across outer steps."""
    model, plain = network(), network()
    inner, alone = INNER[name](model.parameters()), INNER[name](plain.parameters())
    optimizer = DiLoCo(inner, inner_steps=inner_steps, outer_lr=1.0, outer_momentum=0.0)
    train(model, optimizer, 60)
    train(plain, alone, 60)
    assert optimizer.rounds == 60 // inner_steps and optimizer.position == 0
    assert (weights(model) - weights(plain)).abs().max() < 1e-14
    for mine, theirs in zip(inner.state.values(), alone.state.values(), strict=True):
        assert mine.keys() == theirs.keys() and mine
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", INNER)
def test_a_hundred_steps_by_hand(name, momentum):
    model = network()
    optimizer = DiLoCo(INNER[name](model.parameters()), inner_steps=7, outer_lr=0.6, outer_momentum=momentum)
    train(model, optimizer, 100)
    optimizer.synchronize()
    hand = ByHand(INNER[name], lr=0.6, momentum=momentum)
    hand.rounds([0], 0, 100, 7)
    assert optimizer.rounds == 15
    torch.testing.assert_close(weights(model), hand.theta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_outer_step_is_torch_sgd_on_the_pseudo_gradient(nesterov):
    """Five rounds, bit for bit."""
    model = network()
    optimizer = DiLoCo(INNER["adamw"](model.parameters()), inner_steps=3, outer_lr=0.7, nesterov=nesterov)
    theta = weights(model).requires_grad_()
    outer = torch.optim.SGD([theta], lr=0.7, momentum=0.9, nesterov=nesterov)
    for round_ in range(5):
        train(model, optimizer, 2, start=3 * round_)
        backward(model, *batch(0, 3 * round_ + 2))
        end, inner = copy.deepcopy((model, optimizer.inner))
        for copied, p in zip(end.parameters(), model.parameters(), strict=True):
            copied.grad = p.grad.clone()
        inner.step()  # the last of the round, without what follows it
        theta.grad = theta.detach() - weights(end)
        outer.step()
        optimizer.step()
        assert torch.equal(weights(model), theta.detach()), round_


def test_without_momentum_it_is_lookahead():
    """Slow weights φ ← φ + α(fast - φ) every k steps (Zhang et al. 2019)."""
    model, fast = network(), network()
    optimizer = DiLoCo(INNER["sgd"](model.parameters()), inner_steps=5, outer_lr=0.5, outer_momentum=0)
    inner, slow = INNER["sgd"](fast.parameters()), weights(fast)
    for step in range(40):
        train(fast, inner, 1, start=step)
        if step % 5 == 4:
            slow = slow + 0.5 * (weights(fast) - slow)
            nn.utils.vector_to_parameters(slow.clone(), fast.parameters())
    train(model, optimizer, 40)
    torch.testing.assert_close(weights(model), slow, rtol=1e-13, atol=1e-13)


@given(theta=st.floats(-1e3, 1e3), moved=st.floats(-10.0, 10.0))
def test_the_pseudo_gradient_points_where_a_subtracting_optimizer_follows(theta, moved):
    old = torch.tensor([theta], dtype=torch.float64)
    assert old - pseudo_gradient(old, old + moved) == pytest.approx(theta + moved, abs=1e-12)


def test_schedules_of_both_rates_are_read_at_each_step():
    model, optimizer = network(), None
    optimizer = DiLoCo(torch.optim.SGD(model.parameters(), lr=0.1), inner_steps=2, outer_lr=1.0, outer_momentum=0)
    inner_lr = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for step in range(2):
        backward(model, *batch(0, step))
        optimizer.step()
        inner_lr.step()
    assert optimizer.inner.param_groups[0]["lr"] == 0.025
    optimizer.outer.param_groups[0]["lr"] = 0.0
    before = weights(model)
    train(model, optimizer, 1)
    assert not torch.equal(weights(model), before)
    train(model, optimizer, 1)
    assert torch.equal(weights(model), before)  # an outer rate of 0 goes back


def test_a_closure_is_called_by_the_inner_optimizer_clipped_and_its_loss_returned():
    one, two = network(), network()
    first = DiLoCo(INNER["sgd"](one.parameters()), inner_steps=2, outer_lr=0.6, clip_norm=0.01)
    second = DiLoCo(INNER["sgd"](two.parameters()), inner_steps=2, outer_lr=0.6)
    for step in range(6):
        loss = first.step(lambda step=step: backward(one, *batch(0, step)))
        assert loss == backward(two, *batch(0, step))
        nn.utils.clip_grad_norm_(two.parameters(), 0.01)
        second.step()
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-12, atol=1e-14)


def test_clipping_is_torchs_over_all_tensors():
    gradients = [torch.randn(4, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    for most in (0.1, 100.0):
        mine, theirs = ([nn.Parameter(torch.zeros_like(g)) for g in gradients] for _ in range(2))
        for p, g in zip(mine + theirs, gradients * 2, strict=True):
            p.grad = g.clone()
        clip_([("", p) for p in mine], most)
        nn.utils.clip_grad_norm_(theirs, most)
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-14, atol=0)
    mine[0].grad[0, 0] = math.nan
    clip_([("", p) for p in mine], 1.0)
    assert all(p.grad.isnan().all() for p in mine)


def test_micro_batches_make_the_step_of_their_whole():
    x, y = batch(0, 0, examples=10)
    models = network(), network()
    for model, sizes in zip(models, ([10], [4, 4, 2]), strict=True):
        optimizer = DiLoCo(INNER["sgd"](model.parameters()), inner_steps=2, outer_lr=0.6)
        for _ in range(4):
            optimizer.zero_grad()
            for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
                ((model(a) - b).square().mean() * (len(a) / 10)).backward()
            optimizer.step()
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-12, atol=1e-14)


def test_any_shape_and_memory_order_will_do():
    parts = [nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(2, 2)]
    odd = [nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(3).double())]
    parameters = [p for part in parts for p in part.parameters()] + odd
    optimizer = DiLoCo(torch.optim.SGD(parameters, lr=0.1), inner_steps=1, outer_lr=0.5, outer_momentum=0)
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.05 * p.grad)


def test_hooks_and_profile_names_are_those_of_any_optimizer():
    model, calls = network(), []
    optimizer = DiLoCo(INNER["sgd"](model.parameters()), inner_steps=3, outer_lr=0.6)
    optimizer.register_step_post_hook(lambda *_: calls.append(optimizer.steps))
    train(model, optimizer, 3)
    assert calls == [1, 2, 3] and isinstance(optimizer, torch.optim.Optimizer)
    assert repr(optimizer).startswith("DiLoCo (\nParameter Group 0") and optimizer.bytes_sent == 0


def test_a_step_at_rate_0_without_a_gradient_is_a_step():
    """One replica may have a gradient of 0 where the others have none: all must count alike."""
    model = nn.Linear(2, 1)
    optimizer = DiLoCo(torch.optim.SGD(model.parameters(), lr=0.0), inner_steps=2, outer_lr=0.5)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert (optimizer.position, optimizer.rounds, optimizer.steps) == (1, 1, 3)
