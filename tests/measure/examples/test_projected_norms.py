"""Norms from random projections are right on average, vary as they say, and repeat."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.measure.examples.example_norms import ExampleNorms
from batchlab.measure.examples.factors import matrix_factors
from batchlab.measure.examples.projected_norms import Projections, projected_squares
from batchlab.measure.noise.gradient_noise import GradientNoise
from tests.measure.examples.naive import make_job, tensors_of, watched_norms


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("rows", "columns"), [(8, 5), (5, 8)])
def test_orthogonal_signs_give_the_norm_itself(rows, columns):
    """With H Hᵀ = 8 I the mean of |hᵀG|² over the eight columns h of H is |G|², for each of two blocks."""
    left, right = _random(3, 2, 6, rows), _random(3, 2, 6, columns, seed=1)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    signs = torch.kron(two, torch.kron(two, two)).expand(2, 8, 8)
    want = (left.mT @ right).square().sum((1, 2, 3))
    torch.testing.assert_close(projected_squares(left, right, signs), want, rtol=1e-12, atol=0)


def test_the_sum_over_examples_varies_as_the_closed_form_says():
    """Var uᵀMu = 2(|M|² - Σ M_ii²) for signs u, over k; within four standard errors of the sample variance."""
    left, right, k, draws = _random(4, 1, 3, 6), _random(4, 1, 3, 5, seed=1), 2, 4000
    projections, piece = Projections(k), matrix_factors(left[:, 0], right[:, 0])
    gradients = (left.mT @ right)[:, 0]
    m = (gradients @ gradients.mT).sum(0)
    sums = []
    for number in range(draws):
        projections.begin(number)
        sums.append(projected_squares(left, right, projections.signs(piece, left)).sum())
    sums = torch.stack(sums)
    deviations = (sums - m.trace()).square()
    assert abs(sums.mean() - m.trace()) < 4 * sums.std() / draws**0.5
    want = 2 * (m.square().sum() - m.diagonal().square().sum()) / k
    assert abs(deviations.mean() - want) < 4 * deviations.std() / draws**0.5 < 0.2 * want


@pytest.mark.parametrize("name", ["gpt", "conv"])
def test_they_are_right_on_average(name):
    """One projection, 200 passes: each parameter's Σ|g_i|² within four standard errors, and all of it within 10 %."""
    model, loss, batch = make_job(name)
    model, batch = model.double(), [x.double() if x.is_floating_point() else x for x in batch]
    want = watched_norms(copy.deepcopy(model), loss, batch).by_parameter
    norms, sums = ExampleNorms(model, projections=1), []
    for _ in range(200):
        model.zero_grad()
        with norms.watch(len(tensors_of(batch)[0])) as record:
            loss(model, batch).backward()
        sums.append({name: part.sum() for name, part in record.by_parameter.items()})
    projected = {name for name, rule in record.rules.items() if rule == "projected"}
    assert len(projected) >= (2 if name == "gpt" else 1)
    for name, exact in want.items():
        found = torch.stack([each[name] for each in sums])
        if name not in projected:
            torch.testing.assert_close(found, exact.sum().expand_as(found), rtol=1e-10, atol=0)
            continue
        error = found.std() / len(found) ** 0.5
        assert abs(found.mean() - exact.sum()) < 4 * error
        assert found.std() > 0.01 * exact.sum()  # it was an estimate indeed
    whole = torch.stack([sum(each.values()) for each in sums])
    total = sum(part.sum() for part in want.values())
    assert abs(whole.mean() - total) < 4 * whole.std() / len(whole) ** 0.5 < 0.1 * total


def test_layers_that_see_an_example_once_stay_exact():
    model, loss, batch = make_job("mlp")
    want = watched_norms(copy.deepcopy(model), loss, batch)
    record = watched_norms(model, loss, batch, projections=4)
    assert set(record.rules.values()) <= {"ghost", "instantiated"}
    assert torch.equal(record.sq_norms(), want.sq_norms())


def test_the_gradient_keeps_every_bit():
    model, loss, batch = make_job("gpt")
    plain = copy.deepcopy(model)
    loss(plain, batch).backward()
    watched_norms(model, loss, batch, projections=2)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


class _Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 40), nn.LayerNorm(40), nn.Linear(40, 6)

    def forward(self, x):
        return self.last(self.norm(self.first(x).tanh()))


def _step(noise, model, seed):
    x = _random(8, 24, 6, seed=seed).float()
    model.zero_grad()
    with noise.micro_batch(8):
        F.mse_loss(model(x), x.flip(2)).backward()
    noise.step()
    return noise.pair


@pytest.mark.parametrize("method", ["per_example", "norm_layers"])
def test_a_measurement_that_goes_on_from_its_state_draws_what_it_would_have_drawn(method):
    torch.manual_seed(0)
    model = _Positions()
    whole = GradientNoise(model, method, projections=1)
    pairs = [_step(whole, model, seed) for seed in range(6)]
    whole.close()
    first = GradientNoise(model, method, projections=1)
    assert [_step(first, model, seed) for seed in range(3)] == pairs[:3]
    state = first.state_dict()
    first.close()
    second = GradientNoise(model, method, projections=1)
    second.load_state_dict(state)
    assert [_step(second, model, seed) for seed in range(3, 6)] == pairs[3:]
    again = GradientNoise(model, method, projections=1)
    assert [_step(again, model, 3)] != pairs[3:4], "the draws do not depend on the number of the pass"


def test_by_default_single_examples_are_exact_and_calibration_is_not():
    torch.manual_seed(0)
    model = _Positions()
    exact, projected, default = (
        _step(GradientNoise(model, projections=k, **ways), model, 0)
        for k, ways in (
            (0, {"method": "norm_layers"}),
            (1, {"method": "norm_layers"}),
            (None, {"method": "per_example"}),
        )
    )
    assert default == pytest.approx(exact, rel=1e-6) and projected.trace != pytest.approx(exact.trace, rel=1e-4)


def test_bad_input_is_refused():
    model = nn.Linear(2, 2)
    for wrong in (-1, 1.5, True):
        with pytest.raises(InputError, match="projections must be an integer"):
            GradientNoise(model, "per_example", projections=wrong)
    with pytest.raises(InputError, match='projections need method "per_example" or "norm_layers", got \'micro_batch\''):
        GradientNoise(model, projections=4)
