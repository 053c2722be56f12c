"""MKOR against means by hand, naive loops, its base alone, and SGD on digits."""

import copy
import functools
import gc
import itertools
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from batchlab.core.errors import InputError
from batchlab.optim.mkor.factors import (
    input_sums,
    output_sum,
)
from batchlab.optim.mkor.mkor import MKOR

DOUBLE = torch.float64


def drawn(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def mlp(seed=0, sizes=(5, 7, 3), dtype=DOUBLE):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b, dtype=dtype) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1])


def made(model, lr=0.1, momentum=0.9, **settings):
    settings = {"factor_dtype": DOUBLE} | settings
    return MKOR(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum), **settings)


def batch(step, rows=8, width=5, classes=3):
    return drawn(rows, width, seed=step), torch.arange(rows).add(step).remainder(classes)


def take_step(model, optimizer, step, cut=(8,)):
    """One update of the batch `step` of 8, in micro-batches of the sizes `cut`, whose losses sum to the mean."""
    optimizer.zero_grad()
    x, y = batch(step)
    for part, target in zip(x.split(cut), y.split(cut), strict=True):
        (F.cross_entropy(model(part), target) * len(part) / len(x)).backward()
    optimizer.step()


def run(model, optimizer, steps, start=0, **how):
    for step in range(start, start + steps):
        take_step(model, optimizer, step, **how)
    return [p.detach().clone() for p in model.parameters()]


# What the hooks see


def by_hand(layer, x):
    """ā and ḡ of a layer in a loss that is a mean over rows, from saved tensors and autograd alone."""
    output = layer(x)
    (g,) = torch.autograd.grad(output.sin().sum() / (output.numel() / layer.weight.shape[0]), output)
    if isinstance(layer, nn.Linear):
        a, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    else:
        a, g = patches(layer, x), g.movedim(1, -1).reshape(-1, g.shape[1])
    assert len(a) == len(g)
    return a, torch.stack([len(g) * row for row in g]).mean(0)


def patches(layer, x):
    """Each patch that a filter is laid on, read off by what a convolution with one-hot filters gives."""
    size = layer.weight[0].numel()
    probe = nn.Conv2d(
        layer.in_channels, size, layer.kernel_size, layer.stride, layer.padding, layer.dilation, bias=False,
        padding_mode=layer.padding_mode, dtype=DOUBLE,
    )  # fmt: skip
    probe.weight.data = torch.eye(size, dtype=DOUBLE).reshape(size, *layer.weight.shape[1:])
    return probe(x).detach().movedim(1, -1).reshape(-1, size)


LAYERS = {
    "rows": (lambda: nn.Linear(5, 4, dtype=DOUBLE), (6, 5)),
    "tokens": (lambda: nn.Linear(5, 4, bias=False, dtype=DOUBLE), (6, 3, 5)),
    "maps of rows": (lambda: nn.Linear(5, 4, dtype=DOUBLE), (6, 3, 2, 5)),
    "images": (lambda: nn.Conv2d(2, 4, 3, padding=1, stride=2, dtype=DOUBLE), (6, 2, 7, 5)),
    "dilated": (lambda: nn.Conv2d(2, 4, (3, 2), dilation=2, padding="same", bias=False, dtype=DOUBLE), (6, 2, 7, 5)),
    "reflected": (lambda: nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="reflect", dtype=DOUBLE), (6, 2, 7, 5)),
    "circular": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", dtype=DOUBLE), (6, 2, 7, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cut", [(6,), (1, 2, 3)])
def test_means_are_those_taken_by_hand(name, cut):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), drawn(*shape)
    rows, g_mean = by_hand(layer, x)
    optimizer = made(layer)
    for part in x.split(cut):
        output = layer(part)
        (output.sin().sum() / (output.numel() / layer.weight.shape[0]) * len(part) / len(x)).backward()
    (passes,) = [one.take() for one in optimizer._layers]
    assert passes.inputs.rows == len(rows)
    close(passes.inputs.total / passes.inputs.rows, rows.mean(0))
    close(passes.inputs.energy, rows.square().sum())
    close(passes.output, g_mean)
    if layer.bias is not None:
        close(passes.output, layer.bias.grad)


def test_a_convolution_of_one_pixel_is_a_linear_layer():
    linear, conv = nn.Linear(5, 4, dtype=DOUBLE), nn.Conv2d(5, 4, 1, dtype=DOUBLE)
    conv.weight.data, conv.bias.data = linear.weight.data.clone()[..., None, None], linear.bias.data.clone()
    images = drawn(6, 5, 3, 2)
    tokens = images.flatten(2).mT
    for layer, x in ((linear, tokens), (conv, images)):
        optimizer = made(layer, inv_freq=1)
        for _ in range(5):
            optimizer.zero_grad()
            layer(x).sin().mean().backward()
            optimizer.step()
    close(conv.weight[..., 0, 0], linear.weight)


class Twice(nn.Module):
    """One layer called twice, on inputs of different lengths."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, dtype=DOUBLE)

    def forward(self, x, way=lambda layer, x: layer(x)):
        return way(self.layer, way(self.layer, x).relu_()[:3])


def recomputed(layer, x, reentrant):
    return checkpoint(layer, x, use_reentrant=reentrant)


@pytest.mark.parametrize("way", [None, True, False])
def test_a_layer_called_twice_counts_all_its_rows(way):
    """Also where its passes are checkpointed, and so made twice."""
    model, x = Twice(), drawn(8, 4).requires_grad_()
    optimizer = made(model)
    with torch.no_grad():
        model(x)
    how = {} if way is None else {"way": functools.partial(recomputed, reentrant=way)}
    model(x, **how).square().sum().backward()
    (passes,) = [layer.take() for layer in optimizer._layers]
    second = model.layer(x).relu()[:3].detach()
    assert passes.inputs.rows == 8 + 3
    close(passes.inputs.total, x.detach().sum(0) + second.sum(0))
    close(passes.output, model.layer.bias.grad)


def test_an_input_given_by_name_and_a_single_row_are_seen():
    layer = nn.Linear(4, 2, dtype=DOUBLE)
    optimizer = made(layer)
    layer(input=drawn(4)).sum().backward()
    (passes,) = [one.take() for one in optimizer._layers]
    assert passes.inputs.rows == 1
    image = nn.Conv2d(1, 2, 2, dtype=DOUBLE)
    assert input_sums(image, drawn(1, 3, 3), DOUBLE).rows == 4
    assert output_sum(image, drawn(2, 2, 2), DOUBLE).shape == (2,)


def test_what_a_discarded_pass_told_is_forgotten():
    model = mlp()
    optimizer, other = made(model), made(twin := mlp())
    F.cross_entropy(model(drawn(8, 5, seed=9) * math.inf), batch(0)[1]).backward()
    assert torch.equal(torch.cat([p.flatten() for p in run(model, optimizer, 3)]), flat(run(twin, other, 3)))


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


# Whole steps


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


def test_frozen_late_and_foreign_layers_are_left_to_whom_they_belong():
    model = mlp(sizes=(5, 6, 6, 3))
    model[0].requires_grad_(False)
    base = torch.optim.SGD(model[2].parameters(), lr=0.1)
    optimizer = MKOR(model, base, factor_dtype=DOUBLE, inv_freq=1)
    assert optimizer.left_to_base == {"0": "its weight is not in base", "4": "its weight is not in base"}
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    foreign = model[4].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[4].weight.grad, foreign) and model[0].weight.grad is None
    optimizer.add_param_group({"params": [*model[4].parameters(), *model[0].parameters()]})
    model[4].bias.requires_grad_(False)
    optimizer.zero_grad()
    model[4].bias.grad = None
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    foreign = model[4].weight.grad.clone()
    optimizer.step()
    assert optimizer.left_to_base == {"0": "its weight is frozen"}
    assert [(row.name, row.updates) for row in optimizer.report()] == [("0", 0), ("2", 2), ("4", 1)]
    changed = model[4].weight.grad
    assert changed.norm().item() == pytest.approx(foreign.norm().item()) and not torch.allclose(changed, foreign)


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


# MKOR-H


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


# State


@pytest.mark.parametrize("variant", ["exact", "released"])
def test_state_goes_round_and_training_goes_on_the_same(variant):
    settings = {"inv_freq": 3, "gamma": 0.9, "variant": variant, "eps": 4.0}
    model = mlp()
    optimizer = made(model, **settings)
    run(model, optimizer, 10)
    resumed = mlp(seed=1)
    resumed.load_state_dict(model.state_dict())
    other = made(resumed)  # with other settings: the saved ones win
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(flat(run(model, optimizer, 10, start=10)), flat(run(resumed, other, 10, start=10)))
    assert other.report() == optimizer.report()


def test_state_is_plain_and_goes_through_a_checkpoint(tmp_path):
    model = mlp()
    optimizer = made(model, eps=math.inf)
    run(model, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    other = made(mlp())
    other.load_state_dict(loaded)
    assert other.eps == math.inf and torch.equal(other._layers[1].G, optimizer._layers[1].G)


def test_state_of_another_model_is_refused():
    optimizer = made(mlp())
    with pytest.raises(InputError, match="state_dict has no 'mkor': give one of a base alone to base.load_state_dict"):
        optimizer.load_state_dict(optimizer.base.state_dict())
    deeper, wider = mlp(sizes=(5, 6, 6, 3)), mlp(sizes=(5, 8, 3))
    with pytest.raises(InputError, match=r"state_dict must be of the same layers, not in both are \['4'\]"):
        optimizer.load_state_dict(made(deeper).state_dict())
    other = made(wider)
    run(wider, other, 1)
    with pytest.raises(InputError, match=r"state's factor G of layer '0' must be of shape \(7, 7\), got \(8, 8\)"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer._layers[0].A is None


# Lives and deaths


def test_hooks_go_with_the_optimizer_and_keep_nothing_alive():
    model = mlp()
    optimizer = made(model)
    assert len(model[0]._forward_hooks) == 1
    gone = weakref.ref(optimizer)
    copied = copy.deepcopy(model)
    copied(batch(0)[0]).sum().backward()
    assert optimizer._layers[0].take().inputs.rows == 0
    del optimizer
    gc.collect()
    assert gone() is None and not model[0]._forward_hooks
    closed = made(model)
    run(model, closed, 2)
    closed.close()
    assert not model[0]._forward_hooks
    other = copy.deepcopy(model)
    base = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    base.load_state_dict(copy.deepcopy(closed.base.state_dict()))
    assert torch.equal(flat(run(model, closed, 3)), flat(run(other, base, 3)))


def test_a_copy_is_refused_and_named_groups_work():
    model = mlp()
    optimizer = MKOR(model, torch.optim.AdamW(model.named_parameters()))
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    run(model, optimizer, 2)
    with pytest.raises(TypeError, match="MKOR cannot be copied or pickled, it has hooks on a model: use state_dict"):
        copy.deepcopy(optimizer)


def test_passes_that_no_hook_saw_are_told_of():
    model = mlp()
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer = made(model)
    with pytest.raises(InputError, match="no pass through a layer was seen, but there are gradients: make MKOR before"):
        optimizer.step()


@pytest.mark.slow  # torch loads its compiler
def test_compiled_models_train_the_same():
    model, other = mlp(), mlp()
    optimizer, plain = made(model, inv_freq=2), made(other, inv_freq=2)
    compiled = torch.compile(model, backend="eager")
    close(run(compiled, optimizer, 4), run(other, plain, 4))


# Bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gamma": 1.0}, r"gamma must lie in \(0, 1\), got 1.0"),
        ({"gamma": 0}, r"gamma must lie in \(0, 1\), got 0"),
        ({"inv_freq": 0}, "inv_freq must be an integer of at least 1, got 0"),
        ({"inv_freq": 2.5}, "inv_freq must be an integer of at least 1, got 2.5"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer of at least 0, got -1"),
        ({"eps": 0.0}, "eps must be > 0, infinity for never, got 0.0"),
        ({"eps": math.nan}, "eps must be > 0, infinity for never, got nan"),
        ({"zeta": 1.5}, r"zeta must lie in \[0, 1\], got 1.5"),
        ({"factor_dtype": torch.int8}, "factor_dtype must be a floating-point dtype of torch, got torch.int8"),
        ({"variant": "paper"}, r"variant must be one of \['exact', 'printed', 'released'\], got 'paper'"),
        ({"switch": "never"}, 'switch must be "none", "knee" or a number of steps of at least 1, got \'never\''),
        ({"switch": 0}, 'switch must be "none", "knee" or a number of steps of at least 1, got 0'),
        ({"ignore": ["1.x"]}, r"ignore must hold layers of the model or their names, as \['', '0', .*got '1.x'"),
        ({"ignore": [nn.Linear(1, 1)]}, "ignore must hold layers of the model or their names"),
        ({"ignore": [""]}, "model and base share no layer to precondition; left to base: {'0': 'in ignore', '2': 'in"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        made(mlp(), **settings)


def test_bases_that_cannot_work_are_refused():
    model = mlp()
    with pytest.raises(InputError, match="base must be a torch.optim.Optimizer, got list"):
        MKOR(model, list(model.parameters()))
    with pytest.raises(InputError, match="base must step without a closure, got LBFGS"):
        MKOR(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(InputError, match="base must have differentiable=False"):
        MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True))


class Mixed(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.conv = nn.Conv2d(2, 4, 1, groups=2)
        self.norm = nn.LayerNorm(4)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.tied = nn.Linear(4, 10)
        self.tied.weight = self.embed.weight
        self.head = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
        self.body = nn.Linear(4, 4)


def test_layers_without_support_are_left_to_the_base_with_a_note():
    optimizer = made(model := Mixed(), ignore=["head", model.normed])
    assert optimizer.left_to_base == {
        "embed": "Embedding is neither Linear nor Conv2d",
        "conv": "its filters are in 2 groups",
        "norm": "LayerNorm is neither Linear nor Conv2d",
        "normed": "in ignore",
        "normed.parametrizations.weight": "in ignore",
        "tied": "its weight or bias is also that of 'embed'",
        "head.0": "in ignore",
        "head.1": "in ignore",
    }
    assert made(model).left_to_base["normed"] == "its weight or bias is parametrised"
    assert [row.name for row in optimizer.report()] == ["body"]


def test_gradients_and_weights_that_cannot_be_preconditioned_are_refused_by_name():
    model = mlp()
    optimizer = made(model)
    run(model, optimizer, 1)
    model[2].weight.grad = model[2].weight.grad.to_sparse()
    with pytest.raises(
        InputError, match=r"the gradient of 2.weight is sparse, MKOR needs dense ones: put '2' in ignore"
    ):
        optimizer.step()
    with pytest.raises(InputError, match="the weight of layer '' is complex, MKOR needs real ones"):
        made(nn.Linear(2, 2, dtype=torch.complex64))
    optimizer.loss_scale, optimizer.inv_freq = 0.0, 1
    with pytest.raises(InputError, match="loss_scale must be finite and > 0, got 0.0"):
        model(batch(0)[0])
    lazy = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    with pytest.raises(InputError, match="layer '0' is lazy: run one forward pass before MKOR is made"):
        MKOR(lazy, torch.optim.SGD(lazy[1].parameters(), lr=0.1))


# Learning


def test_the_report_tells_inputs_of_zero_mean():
    model = nn.Sequential(nn.LayerNorm(32, elementwise_affine=False), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = made(model, factor_dtype=torch.float32)
    model(drawn(512, 32).float()).square().mean().backward()
    optimizer.step()
    normed, rectified = optimizer.report()
    assert 0.2 / 512 < normed.mean_share < 5 / 512 and rectified.mean_share > 0.2


def digits_loss(seed, rate, make):
    """The training loss after 100 steps of 512 of an MLP 64-128-64-10, momentum 0.9."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = make(model, torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9))
    draw = torch.Generator().manual_seed(seed)
    for _ in range(100):
        rows = torch.randint(len(x), (512,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item()


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_on_digits_it_halves_the_loss_of_its_base(rate):
    ours = sorted(digits_loss(seed, rate, MKOR) for seed in range(3))
    plain = sorted(digits_loss(seed, rate, lambda _, base: base) for seed in range(3))
    assert ours[1] <= 0.5 * plain[1], (ours, plain)
