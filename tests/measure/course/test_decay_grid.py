"""The weight decay by a grid: planted bests, ridge regression's known optimum, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.core.job import Job
from batchlab.measure.course.decay_grid import GRID, choose_decay, weight_decay_grid
from tests.spine.jobs import toy_job

N, DIMENSIONS, NOISE = 24, 20, 0.5
CONSTANT = {"schedule": "constant", "device": "cpu"}


@pytest.mark.parametrize("planted", [2e-3, 7e-4, 2.5e-4, 4e-5, 1e-5])
def test_a_planted_best_is_enclosed_to_a_quarter_of_a_decade(planted):
    """A grid a decade apart, halved twice, leaves 10^(1/4) between trials."""
    tried = []

    def run(decay):
        tried.append(decay)
        return (math.log10(decay + 1e-12) - math.log10(planted)) ** 2

    found = choose_decay(run, (1e-2, 1e-3, 1e-4, 1e-5, 0.0))
    assert len(tried) == 7 and abs(math.log10(found.weight_decay / planted)) <= 0.25 + 1e-9
    assert found.at_edge == (found.weight_decay == 1e-5) is False or planted <= 1e-5
    assert [trial.weight_decay for trial in found.trials] == sorted(tried)


def test_the_papers_own_refinement():
    """Between 1e-4 and 1e-3 3.2e-4 is tried, and then 5.6e-4 or 1.8e-4."""
    for best, last in ((6e-4, 5.6e-4), (2e-4, 1.8e-4)):
        found = choose_decay(lambda decay, best=best: abs(math.log10(decay + 1e-9) - math.log10(best)))
        assert f"{found.weight_decay:.1e}" == f"{last:.1e}"


def test_edges_zero_and_divergence():
    assert choose_decay(lambda decay: -decay, (1e-4, 1e-3), refine=0).at_edge
    assert choose_decay(lambda decay: decay, (1e-4, 1e-3), refine=0).at_edge
    most = choose_decay(lambda decay: decay, (1e-4, 1e-3, 0.0))
    assert most.weight_decay == 0 and not most.at_edge
    assert [trial.weight_decay for trial in most.trials][1:3] == pytest.approx([1e-5, 1e-4 / 10**0.5])
    assert choose_decay(lambda decay: math.nan if decay else 1.0, GRID).weight_decay == 0
    assert choose_decay(lambda _: 1.0, GRID, refine=0).weight_decay == 1e-3  # of equal ones the larger
    assert choose_decay(lambda decay: decay, [0.1]).trials == ((0.1, 0.1),)
    with pytest.raises(InputError, match="the loss is not finite at any weight decay that was tried"):
        choose_decay(lambda _: math.inf, GRID)
    for values in ([], [-1.0], [math.inf], ["a"]):
        with pytest.raises(InputError, match="values must be weight decays, finite and >= 0"):
            choose_decay(lambda _: 0.0, values)


def ridge(seed):
    """y = Xw + noise, few examples; and the validation loss of the ridge solution by its closed form."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N + 500, DIMENSIONS, generator=generator, dtype=torch.float64)
    w = torch.randn(DIMENSIONS, generator=generator, dtype=torch.float64) / DIMENSIONS**0.5
    y = x @ w + NOISE * torch.randn(len(x), generator=generator, dtype=torch.float64)
    (xs, rest), (ys, held) = (t.split([N, 500]) for t in (x, y))

    def loss_at(decay):
        eye = torch.eye(DIMENSIONS, dtype=torch.float64)
        found = torch.linalg.solve(xs.T @ xs / N + decay * eye, xs.T @ ys / N)
        return (rest @ found - held).square().mean().item() / 2

    def model():
        layer = nn.Linear(DIMENSIONS, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(layer.weight)
        return layer

    job = Job(
        name="ridge",
        model=model,
        loss=lambda model, batch: (model(batch[0]).squeeze(1) - batch[1]).square().mean() / 2,
        train=list(zip(xs, ys, strict=True)),
        valid=list(zip(rest, held, strict=True)),
        optimizer="sgd",
    )
    return job, loss_at


@pytest.mark.parametrize("seed", range(3))
def test_ridge_regression_has_its_known_optimum(seed):
    """SGD's decay λ in the gradient of half the mean square leads to (XᵀX/n + λ)w = Xᵀy/n."""
    job, loss_at = ridge(seed)
    values = (1.0, 1e-1, 1e-2, 0.0)
    found = weight_decay_grid(job, learning_rate=0.3, batch_size=N, steps=600, values=values, **CONSTANT)
    for decay, loss in found.trials:
        assert loss == pytest.approx(loss_at(decay), rel=1e-3 if decay >= 1e-2 else 0.02)  # less decay, slower to come
    fine = min((10 ** (k / 40) for k in range(-160, 41)), key=loss_at)
    assert abs(math.log10(found.weight_decay / fine)) <= 0.25 + 1 / 40
    assert found.weight_decay == min((trial.weight_decay for trial in found.trials), key=loss_at)


def test_each_run_begins_alike_and_shared_updates_are_made_once():
    seen = []
    job = toy_job()

    def loss(model, batch):
        seen.append(model.training)
        return job.loss(model, batch)

    watched = toy_job(loss=loss)
    kept = torch.get_rng_state()
    settings = {
        "learning_rate": 0.01,
        "batch_size": 32,
        "steps": 10,
        "values": (0.1, 0.01),
        "refine": 0,
        "device": "cpu",
    }
    first = weight_decay_grid(watched, **settings)
    assert sum(seen) == 20 and torch.equal(torch.get_rng_state(), kept)
    assert first == weight_decay_grid(job, **settings)
    seen.clear()
    shared = weight_decay_grid(watched, **settings, shared=6)
    assert sum(seen) == 6 + 2 * 4 and shared.trials[0].loss != first.trials[0].loss
    assert shared.trials[1] == first.trials[1], "the larger is the middle of the two, which the shared updates have"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be finite and > 0, got 0.0"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"shared": 10}, "shared must lie in 0..9, below the steps, got 10"),
        ({"batch_size": 10**6}, "batch_size must lie in 1..256, the training examples"),
        ({"validation": 0}, "validation must lie in 1..40, the validation examples, got 0"),
        ({"schedule": "step"}, "schedule must be one of"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        weight_decay_grid(toy_job(), **{"learning_rate": 0.01, "steps": 10, "device": "cpu"} | changes)


@pytest.mark.parametrize("values", [np.array([1e-3, 1e-4]), torch.tensor([1e-3, 1e-4])])
def test_values_may_be_arrays(values):
    assert choose_decay(lambda decay: decay, values, refine=0).weight_decay == pytest.approx(1e-4)


def test_an_optimizer_without_a_momentum_is_told_what_to_give():
    job = toy_job(optimizer="adagrad_norm")
    with pytest.raises(InputError, match='cycles a momentum, which adagrad_norm has not: give schedule_settings={"mom'):
        weight_decay_grid(job, learning_rate=0.01, steps=4, device="cpu")
    settings = {"learning_rate": 0.01, "steps": 4, "values": (0.1,), "device": "cpu"}
    assert weight_decay_grid(job, **settings, schedule_settings={"momentum": None}).weight_decay == 0.1
