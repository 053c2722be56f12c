"""Meta-training runs the shipped rule, and what it made beats SGD on held-out tasks."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from batchlab.optim.learned.learned import LearnedOptimizer
from batchlab.optim.learned.weights import OptimizerWeights, load_weights

SCRIPTS = Path(__file__).parents[3] / "scripts"


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
