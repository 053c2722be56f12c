"""MKOR's whole steps against naive loops and its base alone."""

import functools
import math

import pytest
import torch
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.optim.mkor.mkor import MKOR
from tests.optim.mkor.small_mlp import DOUBLE, batch, close, flat, made, mlp, run, take_step


def naive(
    steps, *, lr=0.1, momentum=0.9, gamma=0.95, inv_freq=10, warmup_steps=0, eps=math.inf, zeta=0.9, released=False
):
    """MKOR on `mlp` in dense float64 algebra: factors inverted whole, every mean a loop."""
    params = [p.detach().clone().requires_grad_() for p in mlp().parameters()]
    momenta = [torch.zeros_like(p) for p in params]
    inverses = [[torch.eye(n + 1, dtype=DOUBLE), torch.eye(m, dtype=DOUBLE)] for n, m in ((5, 7), (7, 3))]
    updates = 0
    for step in range(steps):
        x, y = batch(step)
        h = x @ params[0].T + params[1]
        hidden = h.tanh()
        z = hidden @ params[2].T + params[3]
        loss = F.cross_entropy(z, y)
        *grads, gh, gz = torch.autograd.grad(loss, [*params, h, z])
        if step % inv_freq == 0 or step < warmup_steps:
            for pair, inputs, outputs in zip(inverses, (x, hidden), (gh, gz), strict=True):
                one = torch.ones(len(x), 1, dtype=DOUBLE)
                a, g = torch.cat([inputs.detach(), one], 1), len(x) * outputs
                if released:
                    a, g = a.clamp(-100, 100), g.clamp(-100, 100)
                for index, v in enumerate(sum(rows) / len(rows) for rows in (a, g)):
                    eye = torch.eye(len(v), dtype=DOUBLE)
                    if released and updates > 0:
                        inverse = torch.linalg.inv(gamma * pair[index] + (1 - gamma) * eye)
                        pair[index] = torch.linalg.inv(inverse + torch.outer(v, v))
                    elif not released:
                        if pair[index].abs().max() > eps:
                            pair[index] = zeta * pair[index] + (1 - zeta) * eye
                        dense = torch.linalg.inv(pair[index])
                        pair[index] = torch.linalg.inv(gamma * dense + (1 - gamma) * torch.outer(v, v))
            updates += 1
        for layer, (A, G) in enumerate(inverses):
            weight, bias = grads[2 * layer], grads[2 * layer + 1]
            whole = torch.cat([weight, bias[:, None]], 1)
            D = G @ whole @ A
            ratio = whole.norm() / D.norm()
            if released:
                ratio = (weight.norm() + bias.norm()) / (D[:, :-1].norm() + D[:, -1].norm())
            for place, part in ((2 * layer, D[:, :-1]), (2 * layer + 1, D[:, -1])):
                momenta[place] = momentum * momenta[place] + ratio * part
                params[place] = (params[place] - lr * momenta[place]).detach().requires_grad_()
    return [p.detach() for p in params]


@pytest.mark.parametrize(
    "settings",
    [
        {"inv_freq": 10},
        {"inv_freq": 7, "warmup_steps": 12, "gamma": 0.8},
        {"inv_freq": 1, "eps": 3.0, "zeta": 0.7},
        {"inv_freq": 3, "variant": "released"},
    ],
)
def test_a_hundred_steps_are_those_of_a_naive_loop(settings):
    model = mlp()
    optimizer = made(model, **{"eps": math.inf} | settings)
    kept = dict(settings)
    released = kept.pop("variant", "exact") == "released"
    close(run(model, optimizer, 100), naive(100, released=released, **kept))
    stabilised = sum(row.stabilised for row in optimizer.report())
    assert stabilised == 4 if released else (stabilised > 0) == ("zeta" in settings)


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_with_identity_factors_it_is_its_base_in_every_bit(base):
    make = {"SGD": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), "AdamW": torch.optim.AdamW}[base]
    plain, model = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    other, optimizer = make(plain.parameters()), MKOR(model, make(model.parameters()), inv_freq=1000)
    state = optimizer.state_dict()
    state["mkor"]["steps"] = 1  # no update is due any more
    for name, sizes in (("0", (6, 7)), ("2", (8, 3))):
        state["mkor"]["layers"][name] |= {"A": torch.eye(sizes[0]), "G": torch.eye(sizes[1])}
    optimizer.load_state_dict(state)
    for step in range(20):
        x, y = batch(step)
        for net, opt in ((plain, other), (model, optimizer)):
            opt.zero_grad()
            F.cross_entropy(net(x.float()), y).backward()
            opt.step()
    assert optimizer._layers[0].A is not None
    assert torch.equal(flat(model.parameters()), flat(plain.parameters()))


def test_every_step_keeps_each_layers_norm():
    model = mlp()
    optimizer = made(model, inv_freq=1, lr=0.05)
    changed = 0
    for step in range(30):
        optimizer.zero_grad()
        x, y = batch(step)
        F.cross_entropy(model(x), y).backward()
        layers = [model[0], model[2]]
        before = [flat((layer.weight.grad, layer.bias.grad)) for layer in layers]
        optimizer.step()
        for grad, layer in zip(before, layers, strict=True):
            after = flat((layer.weight.grad, layer.bias.grad))
            assert after.norm().item() == pytest.approx(grad.norm().item(), rel=1e-12)
            changed += not torch.allclose(after, grad, rtol=1e-3)
    assert changed == 60


@pytest.mark.parametrize("cut", [(2, 2, 2, 2), (1, 4, 3)])
@pytest.mark.parametrize("variant", ["exact", "printed"])
def test_micro_batches_change_nothing(cut, variant):
    runs = []
    for sizes in (cut, (8,)):
        model = mlp()
        optimizer = made(model, inv_freq=2, variant=variant)
        runs.append(run(model, optimizer, 20, cut=sizes))
    close(*runs)


def test_a_zero_gradient_moves_nothing_and_nan_stays_nan():
    model = mlp()
    optimizer = made(model, inv_freq=1)
    (model(batch(0)[0]) * 0.0).sum().backward()
    before = flat(model.parameters()).clone()
    optimizer.step()
    assert torch.equal(flat(model.parameters()), before)
    optimizer.zero_grad()
    (model(batch(0)[0]) * math.nan).sum().backward()
    optimizer.step()
    assert flat(model.parameters()).isnan().all()


def test_a_pass_that_is_not_finite_leaves_the_factors_of_a_loop_that_skips_it():
    """Such a loop may clear the gradients of the model alone, so that the next step finds what the pass left."""
    model = mlp()
    optimizer = made(model, inv_freq=1)
    run(model, optimizer, 2)
    F.cross_entropy(model(batch(2)[0] * math.nan), batch(2)[1]).backward()
    model.zero_grad()
    x, y = batch(3)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert [row.updates for row in optimizer.report()] == [2, 2]
    run(model, optimizer, 2)
    assert [row.updates for row in optimizer.report()] == [4, 4] and flat(model.parameters()).isfinite().all()


def test_closures_schedulers_and_groups_are_the_bases_own():
    model = mlp()
    base = torch.optim.SGD([{"params": model[0].parameters()}, {"params": [model[2].weight], "lr": 0.2}], lr=0.1)
    optimizer = MKOR(model, base, inv_freq=1)
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 1, gamma=0.5) for each in (optimizer, base)]
    x, y = batch(0)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    wanted = F.cross_entropy(model(x), y)
    assert torch.equal(optimizer.step(closure), wanted)
    for scheduler in schedulers:
        scheduler.step()
    assert [group["lr"] for group in base.param_groups] == [0.025, 0.05]
    assert optimizer.state is base.state
    bias = model[2].bias.detach().clone()
    optimizer.add_param_group({"params": [model[2].bias], "lr": 0.3})
    assert base.param_groups[-1]["lr"] == 0.3
    optimizer.step(closure)
    assert not torch.equal(model[2].bias, bias)
    base.load_state_dict(base.state_dict())
    assert optimizer.param_groups is base.param_groups


def test_bfloat16_weights_and_float16_factors_train():
    model = mlp(dtype=torch.bfloat16)
    optimizer, losses = made(model, inv_freq=1, factor_dtype=torch.float16), []
    x, y = batch(0)
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.bfloat16()).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert optimizer._layers[0].A.dtype == torch.float16 and model[0].weight.dtype == torch.bfloat16


def test_a_scaled_loss_is_undone_and_a_skipped_step_forgotten():
    plain, model = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    other, optimizer = (made(net, inv_freq=1, factor_dtype=torch.float32) for net in (plain, model))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for step in range(10):
        x, y = batch(step)
        optimizer.zero_grad()
        optimizer.loss_scale = scaler.get_scale()
        blown = math.inf if step == 4 else 1.0
        scaler.scale(F.cross_entropy(model(x.float()), y) * blown).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 4:
            other.zero_grad()
            F.cross_entropy(plain(x.float()), y).backward()
            other.step()
    close(list(model.parameters()), list(plain.parameters()), 1e-5)
    assert optimizer.steps == 9


def test_after_so_many_steps_the_base_goes_on_alone():
    model, other = mlp(), mlp()
    optimizer, endless = made(model, switch=5), made(other)
    assert torch.equal(flat(run(model, optimizer, 5)), flat(run(other, endless, 5)))
    assert optimizer.second_order
    run(model, optimizer, 15, start=5)
    run(other, endless.base, 15, start=5)
    assert not optimizer.second_order and optimizer._layers[0].A is None
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))


def test_with_the_knee_the_loss_is_watched():
    model = mlp()
    optimizer = made(model, switch="knee")
    x, y = batch(0)
    with pytest.raises(InputError, match=r'switch="knee" needs the loss: call observe\(loss\) before step, or give it'):
        take_step(model, optimizer, 0)
    for _ in range(2000):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.observe(loss)
        optimizer.step()
        if not optimizer.second_order:
            break
    assert 50 < optimizer.steps < 2000
    state = optimizer.state_dict()
    restored = made(mlp(), switch="knee")
    restored.load_state_dict(state)
    assert not restored.second_order and restored.state_dict()["mkor"]["knee"] == state["mkor"]["knee"]


@pytest.mark.slow  # torch loads its compiler
def test_compiled_models_train_the_same():
    model, other = mlp(), mlp()
    optimizer, plain = made(model, inv_freq=2), made(other, inv_freq=2)
    compiled = torch.compile(model, backend="eager")
    close(run(compiled, optimizer, 4), run(other, plain, 4))
