"""AGVM against its definition in a plain loop: the rates in a step, and what it must leave alone."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from batchlab.optim.agvm.agvm import AGVM
from batchlab.optim.agvm.module_groups import groups_by_module
from batchlab.optim.came import CAME
from tests.optim.agvm.given_gradients import F64, give, halves_of, pair
from tests.optim.agvm.two_heads import OPTIMIZERS, batch, cut, in_halves, loss, parts, two_heads, weights


def test_rates_are_put_back_and_schedulers_see_the_base():
    """A scheduler on AGVM, on the wrapped optimizer and on a bare one write the same rates."""

    def rates(wrap, on_wrapped):
        model = two_heads()
        bare = OPTIMIZERS["sgd"](parts(model))
        optimizer = AGVM(bare, start=0, interval=1, alpha=0.2) if wrap else bare
        scheduler = OneCycleLR(bare if on_wrapped else optimizer, max_lr=[0.3, 0.1, 0.2], total_steps=12)
        seen = []
        for step in range(10):
            if wrap:
                in_halves(optimizer, model, batch(step))
            else:
                loss(model, *batch(step)).backward()
                optimizer.step()
            seen.append([group["lr"] for group in bare.param_groups])
            scheduler.step()
        if wrap:
            assert len(set(optimizer.factors)) == 3
        return seen

    expected = rates(False, True)
    assert rates(True, True) == expected
    assert rates(True, False) == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_all_factors_one_it_is_the_wrapped_optimizer(name):
    """alpha = 1 only watches: the weights are the bare optimizer's bit by bit on the mean of the halves."""
    ours, theirs = two_heads(dtype=F64), two_heads(dtype=F64)
    agvm = AGVM(OPTIMIZERS[name](parts(ours)), alpha=1.0, start=3, interval=2)
    bare = OPTIMIZERS[name](parts(theirs))
    for step in range(12):
        in_halves(agvm, ours, batch(step, dtype=F64))
        bare.zero_grad()
        for half in cut(batch(step, dtype=F64), 2):
            (loss(theirs, *half) / 2).backward()
        bare.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
            assert torch.equal(p, q)
    assert agvm.factors == (1.0, 1.0, 1.0) and all(0 < phi < 2 for phi in agvm.phis)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_its_definition_in_a_plain_loop(name):
    """100 steps in float64: a bare optimizer whose rates a loop multiplies, divided back by hand."""
    ours, naive = two_heads(dtype=F64), two_heads(dtype=F64)
    agvm = AGVM(OPTIMIZERS[name](parts(ours)), start=10, interval=3, alpha=0.6)
    bare, factors = OPTIMIZERS[name](parts(naive)), [1.0] * 3
    for step in range(100):
        in_halves(agvm, ours, batch(step, dtype=F64))
        halves = [
            torch.autograd.grad(loss(naive, *half), list(naive.parameters())) for half in cut(batch(step, dtype=F64), 2)
        ]
        if step >= 10 and step % 3 == 0:
            factors = _smoothed(factors, _phis(bare, naive, halves, name), 0.6)
        for p, a, b in zip(naive.parameters(), *halves, strict=True):
            p.grad = (a + b) / 2
        base = [group["lr"] for group in bare.param_groups]
        for group, f in zip(bare.param_groups, factors, strict=True):
            group["lr"] *= f
        bare.step()
        for group, lr in zip(bare.param_groups, base, strict=True):
            group["lr"] = lr
        torch.testing.assert_close(weights(ours), weights(naive), rtol=1e-12, atol=1e-12)
    assert agvm.factors == pytest.approx(factors, rel=1e-9)
    assert max(abs(f - 1) for f in factors) > 0.01


def _phis(bare, model, halves, name):
    found, place = [], 0
    for group in bare.param_groups:
        vectors = []
        for half in halves:
            terms = []
            for p, g in zip(group["params"], half[place : place + len(group["params"])], strict=True):
                if name == "adamw":
                    g = g / ((0.999 * bare.state[p]["exp_avg_sq"] + 0.001 * g**2).sqrt() + 1e-8)
                terms.append(g.flatten())
            vectors.append(torch.cat(terms))
        place += len(group["params"])
        found.append(1 - F.cosine_similarity(*vectors, dim=0, eps=0.0).item())
    return found


def _smoothed(factors, phis, alpha):
    ratios = [min(max((phis[0] + 1e-6) / (phi + 1e-6), 0.5), 10.0) for phi in phis]
    return [alpha * f + (1 - alpha) * ratio**0.5 for f, ratio in zip(factors, ratios, strict=True)]


def test_adams_first_step_compares_with_no_state_yet():
    """v = 0: G/(√(1 - β₂)·|G| + ε), nearly the sign; the release fails here."""
    model = two_heads(dtype=F64)
    agvm = AGVM(OPTIMIZERS["adamw"](parts(model)), start=0)
    halves = [torch.autograd.grad(loss(model, *h), list(model.parameters())) for h in cut(batch(0, dtype=F64), 2)]
    a, b = (torch.cat([g.flatten() for g in half[:4]]) for half in halves)
    a, b = (g / (0.001**0.5 * g.abs() + 1e-8) for g in (a, b))
    in_halves(agvm, model, batch(0, dtype=F64))
    assert agvm.phis[0] == pytest.approx(1 - F.cosine_similarity(a, b, dim=0).item(), rel=1e-9)


def test_a_loss_scale_is_taken_out_of_adams_comparison():
    found = []
    for scale in (1.0, 2.0**14):
        model = two_heads(dtype=F64)
        agvm = AGVM(OPTIMIZERS["adamw"](parts(model)), start=0, interval=1)
        for step in range(3):
            agvm.zero_grad()
            for name, half in zip("AB", cut(batch(step, dtype=F64), 2), strict=True):
                with agvm.half(name, loss_scale=scale):
                    (loss(model, *half) * scale).backward()
            for p in model.parameters():
                p.grad /= scale
            agvm.step()
        found.append(agvm.phis)
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_micro_batches_in_a_half_and_the_order_of_halves_change_nothing():
    found = []
    for order, pieces in (("AB", 1), ("AB", 4), ("BA", 2)):
        model = two_heads(dtype=F64)
        agvm = AGVM(OPTIMIZERS["sgd"](parts(model)), start=0, interval=2)
        for step in range(6):
            halves = dict(zip("AB", cut(batch(step, dtype=F64), 2), strict=True))
            agvm.zero_grad(set_to_none=step % 2 == 0)
            for name in order:
                with agvm.half(name):
                    for piece in cut(halves[name], pieces):
                        (loss(model, *piece) / pieces).backward()
            agvm.step()
        found.append(weights(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=1e-10, atol=1e-12)


def test_steps_that_do_not_measure_need_no_halves_and_closures_are_called_once():
    def trained(plain):
        model = two_heads(dtype=F64)
        agvm = AGVM(OPTIMIZERS["sgd"](parts(model)), start=1, interval=3)
        for step in range(8):
            data, calls = batch(step, dtype=F64), []

            def closure(data=data, calls=calls, agvm=agvm, model=model):
                agvm.zero_grad()
                calls.append(1)
                if plain and not agvm.due():
                    value = loss(model, *data)
                    value.backward()
                    return value
                for name, half in zip("AB", cut(data, 2), strict=True):
                    with agvm.half(name):
                        value = loss(model, *half)
                        value.backward()
                return value

            assert agvm.step(closure).item() > 0 and calls == [1]
        return weights(model)

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-10, atol=1e-12)


def test_frozen_modules_and_zero_gradients_are_left_out():
    model = two_heads()
    model.left.requires_grad_(False)
    agvm = AGVM(OPTIMIZERS["sgd"](parts(model)), start=0, interval=1, alpha=0.0)
    before = weights(model.left)
    in_halves(agvm, model, batch(0))
    trunk, left, right = agvm.report()
    assert math.isnan(left.phi) and left.factor == 1.0 and torch.equal(weights(model.left), before)
    assert 0 < trunk.phi < 2 and right.factor != 1.0 and (left.name, left.lr) == ("left", 0.2)

    modules, agvm = pair(interval=1, alpha=0.0)
    give(agvm, modules, halves_of(0.4, 0.1))
    kept = agvm.factors
    give(agvm, modules, [[[1.0, 0, 0], [0.0, 0, 0]], [[1.0, 0, 0], [0.0, 1, 0]]])
    assert agvm.factors == kept and math.isnan(agvm.phis[1]) and agvm.skipped == 0
    give(agvm, modules, [[[0.0, 0, 0], [1.0, 0, 0]], [[1.0, 0, 0], [0.0, 1, 0]]])
    assert agvm.factors == kept and agvm.skipped == 1


def test_a_tensor_rate_is_the_same_tensor_after_the_step():
    model = two_heads()
    rate = torch.tensor(0.01)
    adam = torch.optim.AdamW(parts(model), lr=rate, foreach=False, capturable=False)
    agvm = AGVM(adam, start=0, alpha=0.0)
    held = [group["lr"] for group in agvm.param_groups]
    in_halves(agvm, model, batch(0))
    assert all(group["lr"] is lr for group, lr in zip(agvm.param_groups, held, strict=True))
    assert rate.item() == pytest.approx(0.01)


def test_a_step_that_fails_puts_the_rates_back():
    modules, agvm = pair(alpha=0.0)
    agvm.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        give(agvm, modules, halves_of(0.4, 0.1))
    assert [group["lr"] for group in agvm.param_groups] == [1.0, 1.0]
    assert agvm.due()


def test_groups_may_be_added_and_schedulers_work_without_warning(recwarn):
    modules, agvm = pair(interval=1)
    late = nn.Parameter(torch.zeros(3, dtype=F64))
    scheduler = StepLR(agvm, 1)
    give(agvm, modules, halves_of(0.4, 0.1))
    scheduler.step()
    agvm.add_param_group({"params": [late], "lr": 2.0})
    assert agvm.factors[2] == 1.0 and math.isnan(agvm.phis[2])
    give(agvm, (*modules, late), halves_of(0.4, 0.1, 0.2))
    assert len(agvm.phis) == 3 and agvm.optimizer.param_groups[2]["lr"] == 2.0 and not recwarn.list


def test_factored_second_moments_are_no_preconditioner():
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)})
    optimizer = AGVM(CAME(groups_by_module(model, ["a", "b"]), lr=0.01), start=0, interval=1)
    for _ in range(3):
        optimizer.zero_grad()
        for half in "AB":
            with optimizer.half(half):
                model["b"](model["a"](torch.randn(4, 3))).square().mean().backward()
        optimizer.step()
    assert all(0 < phi < 2 for phi in optimizer.phis)
