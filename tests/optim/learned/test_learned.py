"""LearnedOptimizer against a naive loop over elements, networks of a known output, and its own promises."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.learned.features import FEATURES, INPUTS, TAUS
from batchlab.optim.learned.learned import LearnedOptimizer
from batchlab.optim.learned.weights import PYLO_DELTAS, OptimizerWeights, fresh_weights
from batchlab.testing.optimizers import compiled_equals_the_loop
from tests.optim.learned.parameters import after, constant, give_gradients, parameters, passing


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


@pytest.mark.parametrize(
    "options, word",
    [
        ({"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
        ({"step_mult": 0.0}, "step_mult must be finite and > 0, got 0.0"),
        ({"exp_mult": -0.1}, "exp_mult must be finite and >= 0"),
        ({"weight_decay": math.nan}, "weight_decay must be finite and >= 0, got nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be finite and > 0"),
        ({"weight_decay": 1.0}, "weight_decay must be below 1/lr"),
        ({"chunk": 0}, "chunk must be an integer of at least 1, got 0"),
        ({"chunk": 2.5}, "chunk must be an integer of at least 1, got 2.5"),
    ],
)
def test_refusals(options, word):
    with pytest.raises(InputError, match=word):
        LearnedOptimizer(parameters([(2,)]), weights=fresh_weights(0), **options)


def test_a_rate_that_rises_too_far_beside_weight_decay_is_refused_before_anything_moves():
    (w,) = parameters([(2,)])
    optimizer = LearnedOptimizer([w], weights=fresh_weights(0), lr=0.1, weight_decay=0.5)
    w.grad, before = torch.ones_like(w), w.detach().clone()
    optimizer.param_groups[0]["lr"] = 2.0
    with pytest.raises(InputError, match="weight_decay must be below 1/lr.* got weight_decay=0.5 with lr=2.0"):
        optimizer.step()
    assert torch.equal(w, before) and optimizer.state[w]["step"] == 0


@pytest.mark.slow
def test_the_compiled_rule():
    compiled_equals_the_loop(partial(LearnedOptimizer, weights=fresh_weights(0)))
