"""LearnedOptimizer against a naive loop over elements, closed-form networks, and its own promises."""

import copy
import importlib.util
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.learned import learned
from batchlab.optim.learned.features import FEATURES, INPUTS, TAUS, factored_dims, pieces
from batchlab.optim.learned.learned import LearnedOptimizer
from batchlab.optim.learned.weights import (
    PYLO_DELTAS,
    SHIPPED,
    OptimizerWeights,
    fresh_weights,
    load_weights,
    save_weights,
)
from batchlab.testing.optimizers import compiled_equals_the_loop

SHAPES = [(7,), (5, 3), (4, 3, 3, 3), (6, 6), ()]
SCRIPTS = Path(__file__).parents[3] / "scripts"


def parameters(shapes=SHAPES, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(0.3 * torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def give_gradients(held, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for p in held:
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


def after(held, steps=4, **options):
    """The weights after some steps."""
    optimizer = LearnedOptimizer(held, **{"weights": fresh_weights(0)} | options)
    for step in range(steps):
        give_gradients(held, step)
        optimizer.step()
    return [p.detach().clone() for p in held]


def constant(d, q, hidden=4):
    """A network that says the same of all elements."""
    zeros = {"w0": torch.zeros(INPUTS, hidden), "b0": torch.zeros(hidden)}
    return zeros | {"w1": torch.zeros(hidden, 2), "b1": torch.tensor([d, q])}


def passing(index):
    """A network whose direction is input `index`: relu(x) - relu(-x)."""
    w0 = torch.zeros(INPUTS, 2)
    w0[index] = torch.tensor([1.0, -1.0])
    return {"w0": w0, "b0": torch.zeros(2), "w1": torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), "b1": torch.zeros(2)}


class Naive:
    """The method on one array, feature by feature over its elements' places, with its own factoring by means."""

    def __init__(self, w, layers, betas):
        self.w, self.layers, self.betas, self.t = w.copy(), layers, betas, 0
        self.m, self.v = [np.zeros_like(w) for _ in range(3)], np.zeros_like(w)
        self.full = [None] * 3  # the factored averages are linear: kept as averages of broadcast means

    def inputs(self, g):
        b, w = self.betas, self.w
        self.m = [beta * m + (1 - beta) * g for beta, m in zip(b[:3], self.m, strict=True)]
        self.v = b[3] * self.v + (1 - b[3]) * g * g
        root = 1 / np.sqrt(self.v + 1e-6)
        rows, columns, fac_g, fac_m = [], [], [], []
        order = sorted(range(w.ndim), key=lambda d: w.shape[d])  # stable, as the sheet asks
        for i, beta in enumerate(b[4:]):
            means = [g * g + 1e-30] * 2
            if w.ndim > 1:
                means = [np.broadcast_to(means[0].mean(d, keepdims=True), w.shape) for d in (order[-1], order[-2])]
            old = self.full[i] or (0.0, 0.0)
            row, column = (beta * o + (1 - beta) * mean for o, mean in zip(old, means, strict=True))
            self.full[i] = (row, column)
            if w.ndim > 1:
                row_mean = row.mean(order[-2], keepdims=True)
                by = 1 / np.sqrt(np.maximum(row / (row_mean + 1e-9), 1e-9)) / np.sqrt(np.maximum(column, 1e-9))
                by_m = by
            else:
                by, by_m = 1 / np.sqrt(np.maximum(row + 1e-9, 1e-9)), (row + 1e-6) ** -0.5
            rows, columns = [*rows, row], [*columns, column]
            fac_g, fac_m = [*fac_g, g * by], [*fac_m, self.m[i] * by_m]
        found = [g, w, *self.m, self.v, *(m * root for m in self.m), root, *fac_g, *rows, *columns]
        found += [1 / np.sqrt(r + 1e-8) for r in (*rows, *columns)] + fac_m
        divided = [f / math.sqrt(1e-5 + sum(x * x for x in f.flat) / f.size) for f in found]
        times = [np.full_like(w, math.tanh(self.t / tau - 1)) for tau in TAUS]
        self.t += 1
        return [*divided, *times]

    def step(self, g, *, step_mult=0.01, exp_mult=0.001):
        x = np.stack(self.inputs(g)).reshape(INPUTS, -1)
        for index, (weight, bias) in enumerate(zip(self.layers[::2], self.layers[1::2], strict=True)):
            x = weight @ x + bias[:, None]
            x = np.maximum(x, 0) if index < len(self.layers) // 2 - 1 else x
        self.w -= (x[0] * np.exp(exp_mult * x[1]) * step_mult).reshape(self.w.shape)


def naive(parameter, weights):
    layers = [each.double().numpy() for each in weights.layers]
    betas = OptimizerWeights((), weights.deltas.double()).betas().numpy()
    return Naive(np.atleast_1d(parameter.detach().numpy()), layers, betas)


def test_a_hundred_steps_equal_the_naive_loop():
    weights, held = fresh_weights(3, hidden=5), parameters()
    weights.deltas.copy_(torch.tensor(sum(PYLO_DELTAS.values(), ())))
    loops, optimizer = [naive(p, weights) for p in held], LearnedOptimizer(held, weights=weights)
    for step in range(100):
        give_gradients(held, step, scale=10.0 ** (-(step % 4)))
        optimizer.step()
        for p, loop in zip(held, loops, strict=True):
            loop.step(p.grad.numpy().reshape(loop.w.shape))
    for p, loop in zip(held, loops, strict=True):
        np.testing.assert_allclose(p.detach().numpy().reshape(loop.w.shape), loop.w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 4, 3)])
def test_each_of_the_39_inputs_stands_in_its_place(shape):
    """A network that passes input i on moves the weights by 0.01 of it: order, division and time."""
    for index in range(INPUTS):
        [p] = parameters([shape], seed=1)
        optimizer, loop = LearnedOptimizer([p], lr=0.0, weights=passing(index)), None
        loop = naive(p, optimizer.weights)
        for step in range(3):
            give_gradients([p], step)
            expected = loop.inputs(p.grad.numpy())
            optimizer.param_groups[0]["lr"] = 1.0 if step == 2 else 0.0
            before = p.detach().clone()
            optimizer.step()
        moved = (before - p.detach()).numpy() / 0.01
        np.testing.assert_allclose(moved, expected[index], rtol=0, atol=1e-11, err_msg=f"input {index}")
    assert FEATURES == 28 and INPUTS == 39


@pytest.mark.parametrize("d, q, moved", [(1.0, 0.0, 0.01), (1.0, math.log(2) / 0.001, 0.02), (-3.0, 0.0, -0.03)])
def test_a_constant_network_moves_every_weight_alike(d, q, moved):
    held = parameters()
    before = [p.detach().clone() for p in held]
    ends = after(held, 1, weights=constant(d, q), lr=0.5)
    for start, end in zip(before, ends, strict=True):
        torch.testing.assert_close(start - end, torch.full_like(end, 0.5 * moved), rtol=1e-6, atol=0)


def test_decay_comes_after_the_step_and_takes_the_rate():
    [p] = parameters([(3, 2)])
    before = p.detach().clone()
    [end] = after([p], 1, weights=constant(1.0, 0.0), lr=0.5, weight_decay=0.1)
    torch.testing.assert_close(end, (before - 0.005) * 0.95, rtol=1e-12, atol=0)


def test_the_gradients_scale_is_hardly_seen_above_its_floor():
    """Features of degree one: RMS 1 to 10 changes them by under 1e-5·2; at 1e-4 the 1e-5 is a thousand times g²."""

    def seen(c):
        [p] = parameters([(16, 8)])
        before = p.detach().clone()
        optimizer = LearnedOptimizer([p], weights=passing(0))
        give_gradients([p], 0)
        p.grad *= c / p.grad.square().mean().sqrt()
        g = p.grad / c
        optimizer.step()
        return (before - p.detach()) / 0.01 / g

    assert (seen(10.0) - seen(1.0)).abs().max() < 1e-4
    torch.testing.assert_close(seen(1e-4), torch.full((16, 8), (1e-8 / (1e-5 + 1e-8)) ** 0.5, dtype=torch.float64))


def test_the_decays_of_pylo():
    deltas = torch.tensor(sum(PYLO_DELTAS.values(), ()), dtype=torch.float64)
    start = [0.9, 0.99, 0.999, 0.999, 0.9, 0.99, 0.999]
    expected = [1 - math.exp(10 * (math.log(1 - b) / 10 + d)) for b, d in zip(start, deltas.tolist(), strict=True)]
    found = OptimizerWeights((), deltas).betas().tolist()
    assert found == pytest.approx(expected, abs=1e-14)
    rounded = [0.5420, 0.9584, 0.9980, 0.99889, 0.3562, 0.99663, 0.99946]  # the paper's code, to the digits known
    assert found == pytest.approx(rounded, abs=5e-5)
    clipped = OptimizerWeights((), torch.tensor([9.0, -9.0, 0, 0, 0, 0, 0])).betas()
    assert clipped[0] == 0 and clipped[1] == 1


def test_squares_and_ties_take_the_last_dimensions():
    assert factored_dims((6, 6)) == (0, 1)
    assert factored_dims((3, 9, 3, 9)) == (1, 3)
    assert factored_dims((2,) * 20) == (18, 19)  # numpy's default sort is not stable here


def test_a_transposed_weight_takes_the_transposed_step():
    [wide] = parameters([(3, 8)])
    tall = nn.Parameter(wide.detach().t().clone())
    optimizers = [LearnedOptimizer([p], weights=fresh_weights(0)) for p in (wide, tall)]
    for step in range(5):
        give_gradients([wide], step)
        tall.grad = wide.grad.t().clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(wide.detach().t(), tall.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_change_no_bit(dtype, monkeypatch):
    """The network never sees more than a chunk, and sums do not depend on it."""
    monkeypatch.setitem(learned.BLOCK, "cpu", 64)  # as if these tensors were large
    widths = []

    def watched(layers, x):
        widths.append(x.shape[1])
        return learned_network(layers, x)

    learned_network = learned.network
    monkeypatch.setattr(learned, "network", watched)
    shapes = [(301,), (13, 11), (2, 150), (3, 4, 5, 3), (9, 1), ()]
    whole = after(parameters(shapes, dtype=dtype), 3, chunk=10_000)
    for chunk in (7, 64, 100, 299):
        widths.clear()
        for ours, theirs in zip(after(parameters(shapes, dtype=dtype), 3, chunk=chunk), whole, strict=True):
            assert torch.equal(ours, theirs), f"chunk {chunk}, shape {tuple(ours.shape)}"
        assert max(widths) <= chunk


CUT = [((7,), 3), ((2, 150), 7), ((3, 4, 5, 7), 30), ((5, 3), 100), ((), 1), ((4, 0), 1)]


@pytest.mark.parametrize("shape, most", CUT)
def test_pieces_make_up_the_tensor_once(shape, most):
    counted, sizes = torch.zeros(shape), []
    for piece in pieces(shape, most):
        part = counted[piece] if piece else counted
        part += 1
        sizes.append(part.numel())
    assert (counted == 1).all() and max(sizes) <= most


def test_numbers_are_vectors_of_one():
    torch.testing.assert_close(after(parameters([()]))[0].reshape(1), after(parameters([(1,)]))[0], rtol=0, atol=0)


def test_time_counts_on_after_a_load():
    """A network that sees but the feature of τ = 3 goes on from the saved step."""
    held = parameters([(4, 2)])
    optimizer = LearnedOptimizer(held, weights=passing(FEATURES + 1))
    moves = []
    for step in range(4):
        if step == 2:
            state = optimizer.state_dict()
            optimizer = LearnedOptimizer(held, weights=passing(FEATURES + 1))
            optimizer.load_state_dict(state)
        before = held[0].detach().clone()
        give_gradients(held, step)
        optimizer.step()
        moves.append((before - held[0].detach()).mean().item() / 0.01)
    assert moves == pytest.approx([math.tanh(t / 3 - 1) for t in range(4)], abs=1e-6)


def test_each_tensors_gradient_is_clipped_alone():
    """As torch's clip_grad_norm_ on one parameter at a time."""
    clipped, by_hand = parameters(), parameters()
    ours = LearnedOptimizer(clipped, weights=fresh_weights(0), max_grad_norm=0.5)
    theirs = LearnedOptimizer(by_hand, weights=fresh_weights(0))
    for step in range(3):
        give_gradients(clipped, step)
        give_gradients(by_hand, step)
        for p in by_hand:
            nn.utils.clip_grad_norm_(p, 0.5)
        ours.step()
        theirs.step()
    for a, b in zip(clipped, by_hand, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_half_precision_is_computed_in_float32_and_rounded_once():
    fine = parameters([(6, 4)], dtype=torch.float32)
    coarse = [nn.Parameter(p.detach().bfloat16()) for p in fine]
    fine[0].data.copy_(coarse[0].float())
    for p in (fine[0], coarse[0]):
        p.grad = torch.ones(6, 4, dtype=p.dtype) * 0.5
        LearnedOptimizer([p], weights=fresh_weights(0)).step()
    assert torch.equal(coarse[0].detach(), fine[0].detach().bfloat16())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused_by_name_and_nothing_moves(value):
    held = parameters([(3, 2), (2,)])
    optimizer = LearnedOptimizer([("body.weight", held[0]), ("body.bias", held[1])], weights=fresh_weights(0))
    twin = parameters([(3, 2), (2,)])
    other = LearnedOptimizer(twin, weights=fresh_weights(0))
    for step in range(2):
        give_gradients(held, step)
        give_gradients(twin, step)
        if step == 1:
            held[1].grad[0] = value
            with pytest.raises(InputError, match=r"the gradient of body\.bias must be finite"):
                optimizer.step()
            give_gradients(held, step)
        optimizer.step()
        other.step()
    for a, b in zip(held, twin, strict=True):
        assert torch.equal(a, b)


def test_a_state_of_other_weights_is_refused():
    [p] = parameters([(2,)])
    saved = LearnedOptimizer([p], weights=fresh_weights(0)).state_dict()
    LearnedOptimizer([p], weights=fresh_weights(0)).load_state_dict(saved)
    with pytest.raises(InputError, match="give LearnedOptimizer the weights it was saved with"):
        LearnedOptimizer([p], weights=fresh_weights(1)).load_state_dict(saved)


def test_a_copy_goes_on_with_the_same_network():
    held = parameters([(3, 2)])
    optimizer = LearnedOptimizer(held, weights=fresh_weights(4))
    give_gradients(held, 0)
    optimizer.step()
    copied, twin = copy.deepcopy((optimizer, held))
    for each, ps in ((optimizer, held), (copied, twin)):
        give_gradients(ps, 1)
        each.step()
    assert torch.equal(held[0], twin[0])


def test_the_layouts_hold_the_same_network(tmp_path):
    """PyLO's file, JAX's nested tree and its arrays give one network; a round trip through a file loses nothing."""
    weights = fresh_weights(5)
    scaled = OptimizerWeights(weights.layers, weights.deltas, 0.02, 0.003, {"by": "me"})
    save_weights(tmp_path / "ours.safetensors", scaled)
    back = load_weights(tmp_path / "ours.safetensors")
    assert back.digest == weights.digest and (back.step_mult, back.exp_mult, back.about["by"]) == (0.02, 0.003, "me")
    names = ["input", "linear_0", "output"]
    pairs = list(zip(weights.layers[::2], weights.layers[1::2], strict=True))
    plain, tree = {}, {}
    for index, (name, (weight, bias)) in enumerate(zip(names, pairs, strict=True)):
        plain |= {f"network.{name}.weight": weight, f"network.{name}.bias": bias}
        tree |= {f"w{index}": weight.T.numpy(), f"b{index}": bias.numpy()}
    save_file(plain, tmp_path / "pylo.safetensors")
    np.savez(tmp_path / "jax.npz", **{f"nn/~/{name}": each for name, each in tree.items()})
    zeros = {"momentum_decays": np.zeros(3), "rms_decays": np.zeros(1), "adafactor_decays": np.zeros(3)}
    pylo, arrays = load_weights(tmp_path / "pylo.safetensors"), load_weights(tmp_path / "jax.npz")
    nested = load_weights({"nn": {"~": tree}} | zeros)
    for each in (pylo, nested, arrays):
        assert all(torch.equal(a, b) for a, b in zip(each.layers, weights.layers, strict=True))
    assert nested.digest == weights.digest
    assert pylo.deltas.tolist() == arrays.deltas.tolist() == pytest.approx(sum(PYLO_DELTAS.values(), ()))


def test_wrong_weights_are_refused(tmp_path):
    [p] = parameters([(2,)])
    make = partial(LearnedOptimizer, [p])
    with pytest.raises(InputError, match=r"weights must be layers of 39 inputs.*\(32, 39\).*w0 \(39, 32\).*\(4, 28\)"):
        make(weights=constant(1.0, 0.0) | {"w0": torch.zeros(28, 4)})
    with pytest.raises(InputError, match=r"weights must be layers of 39 inputs.*got \[\]"):
        make(weights={"other": torch.zeros(3)})
    with pytest.raises(InputError, match="weights must be finite"):
        make(weights=constant(math.nan, 0.0))
    with pytest.raises(InputError, match="rms_decays must hold 1 numbers, got 2"):
        make(weights=constant(1.0, 0.0) | {"rms_decays": torch.zeros(2)})
    with pytest.raises(InputError, match=r"weights\['b0'\] must be an array of numbers"):
        make(weights=constant(1.0, 0.0) | {"b0": "zeros"})
    with pytest.raises(InputError, match="does not exist"):
        make(weights=tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights here")
    with pytest.raises(InputError, match=r"weights must be a \.safetensors or \.npz file"):
        make(weights=tmp_path / "text.safetensors")
    save_weights(tmp_path / "scale.safetensors", OptimizerWeights(fresh_weights(0).layers, torch.zeros(7), -1.0))
    with pytest.raises(InputError, match=r"step_mult must be .*, got -1\.0"):
        make(weights=tmp_path / "scale.safetensors")


def test_without_weights_the_error_says_how_to_have_them(monkeypatch, tmp_path):
    monkeypatch.setattr("batchlab.optim.learned.weights.SHIPPED", tmp_path / "gone.safetensors")
    with pytest.raises(InputError, match=r"scripts/meta_train_optimizer\.py.*nothing is downloaded"):
        LearnedOptimizer(parameters([(2,)]))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"step_mult": 0.0}, "step_mult must be finite and > 0, got 0.0"),
        ({"exp_mult": -0.1}, "exp_mult must be >= 0"),
        ({"weight_decay": math.nan}, "weight_decay must be >= 0, got nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be finite and > 0"),
        ({"weight_decay": 1.0}, "weight_decay must be below 1/lr"),
        ({"chunk": 0}, "chunk must be an integer of at least 1, got 0"),
        ({"chunk": 2.5}, "chunk must be an integer of at least 1, got 2.5"),
    ],
)
def test_refusals(options, word):
    with pytest.raises(InputError, match=word):
        LearnedOptimizer(parameters([(2,)]), weights=fresh_weights(0), **options)


def test_the_weights_that_ship_say_how_they_were_made():
    weights = load_weights(None)
    assert [tuple(each.shape) for each in weights.layers] == [(32, 39), (32,), (32, 32), (32,), (2, 32), (2,)]
    assert "evolution strategies" in weights.about["trained_by"] and "digits" in weights.about["trained_on"]
    assert float(weights.about["held_out_meta_loss"]) < float(weights.about["held_out_meta_loss_at_start"])
    assert SHIPPED.stat().st_size < 20_000


def script(name):
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_meta_training_runs_the_shipped_rule():
    """Its batched runs equal LearnedOptimizer's, task by task, each with its own network."""
    train, tasks = script("meta_train_optimizer"), script("optimizer_tasks")
    like = train.first_weights(0)
    noise = torch.randn(2, 2409, generator=torch.Generator().manual_seed(0))
    layers, deltas = train.unflat(train.flat(like) + 0.05 * noise, like)
    drawn = tasks.draw_tasks(tasks.Kind("digits", 16, 10, (32,), "tanh", 16), 2, 20, 5)
    inner = train.Inner(drawn, 1)
    inner.run(layers, train.betas(deltas), 20)
    for i in range(2):
        held = [nn.Parameter(w[i].clone()) for w in drawn.weights]
        optimizer = LearnedOptimizer(held, weights=OptimizerWeights(tuple(each[i] for each in layers), deltas[i]))
        for step in range(20):
            _, grads = tasks.gradients(drawn, [torch.stack([p.detach()] * 2) for p in held], step)
            for p, g in zip(held, grads, strict=True):
                p.grad = g[i]
            optimizer.step()
        for p, w in zip(held, inner.weights, strict=True):
            torch.testing.assert_close(p.detach(), w[i], rtol=0, atol=2e-6)


def test_the_outer_gradient_is_that_of_evolution_strategies(monkeypatch):
    """Of a meta-loss linear in θ it is aᵀε·ε over pairs; persistent: of part k, ε_k against the sum of ε so far."""
    train = script("meta_train_optimizer")
    like, a = train.first_weights(0), torch.linspace(-1, 1, 2409)
    theta = train.flat(like)

    class Linear:
        def __init__(self, tasks, copies):
            pass

        def run(self, layers, decays, steps):
            shifts = (1 - decays).log() - torch.tensor([0.1, 0.01, 0.001, 0.001, 0.1, 0.01, 0.001]).log()
            return (torch.cat([*(each.flatten(1) for each in layers), shifts], 1) @ a)[None].expand(steps, -1)

    monkeypatch.setattr(train, "Inner", Linear)
    monkeypatch.setattr(train, "scaled", lambda found, tasks: found.mean(0))
    found = train.outer_gradient(theta, like, 0, pairs=3, sigma=0.01, steps=4, part=2)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, 2409, generator=generator), torch.randn(3, 2409, generator=generator)
    expected = [((first @ a)[:, None] * first).mean(0), ((second @ a)[:, None] * (first + second)).mean(0)]
    for (gradient, _), right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=0, atol=2e-2 * right.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_weights_that_ship_beat_the_best_rate_of_sgd_on_held_out_tasks(seed):
    """The mean loss over 100 steps, of four kinds with four tasks each; SGD takes its best of five rates by kind."""
    train, tasks, weights = script("meta_train_optimizer"), script("optimizer_tasks"), load_weights(None)
    ours, theirs = [], []
    for place in range(4):
        number = tasks.JUDGED_FROM + 500_000 + 1000 * seed + place
        drawn = tasks.draw_tasks(tasks.draw_kind(number), 4, 100, number)
        layers = [each.expand(4, *each.shape) for each in weights.layers]
        found = train.Inner(drawn, 1).run(layers, train.betas(weights.deltas.expand(4, -1)), 100)
        ours.append(train.scaled(found, drawn).mean().item())
        runs = []
        for rate in (0.03, 0.1, 0.3, 1.0, 3.0):
            held, losses = [nn.Parameter(w.clone()) for w in drawn.weights], []
            sgd = torch.optim.SGD(held, lr=rate)
            for step in range(100):
                loss, grads = tasks.gradients(drawn, held, step)
                losses.append(loss)
                for p, g in zip(held, grads, strict=True):
                    p.grad = g
                sgd.step()
            runs.append(train.scaled(torch.stack(losses), drawn).mean().item())
        theirs.append(min(runs))
    assert sum(ours) < sum(theirs), f"{ours} against {theirs}"


@pytest.mark.slow
def test_the_compiled_rule():
    compiled_equals_the_loop(partial(LearnedOptimizer, weights=fresh_weights(0)))
