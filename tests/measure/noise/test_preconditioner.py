"""The noise scale in Adam's geometry."""

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.measure.noise.noise_pair import unbiased_pair
from batchlab.measure.noise.preconditioner import Preconditioner


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def _losses(model, x, y):
    return [
        (model(part).squeeze(1) - target).square().mean() for part, target in zip(x.split(4), y.split(4), strict=True)
    ]


def _gradient(model, loss):
    return [g.clone() for g in torch.autograd.grad(loss, list(model.parameters()))]


def _amsgrad(parameters, lr):
    """β₂ = 0.5, so that the largest mean of squares is not the last."""
    return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.5), amsgrad=True)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop, _amsgrad])
def test_pairs_are_those_of_the_rescaled_gradient(make):
    """Naive: g̃ = g/√P by hand, and the plain pair of g̃."""
    generator = torch.Generator().manual_seed(1)
    model = _model()
    optimizer = make(model.parameters(), lr=1e-2)
    noise = GradientNoise(model, weighting="preconditioned", optimizer=optimizer)
    for step in range(5):
        x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
        y = torch.randn(16, generator=generator, dtype=torch.float64)
        expected = None
        if step:
            key = {torch.optim.RMSprop: "square_avg", _amsgrad: "max_exp_avg_sq"}.get(make, "exp_avg_sq")
            v = [optimizer.state[p][key] for p in model.parameters()]
            seen = {torch.optim.RMSprop: 1.0, _amsgrad: 1 - 0.5**step}.get(make, 1 - 0.999**step)
            root = torch.cat([(part / seen).sqrt().flatten() for part in v])
            scale = (root + 0.1 * root.square().mean().sqrt()).rsqrt()
            pieces = [torch.cat([g.flatten() for g in _gradient(model, loss)]) * scale for loss in _losses(model, x, y)]
            whole = sum(pieces) / 4
            expected = unbiased_pair(sum((g @ g).item() for g in pieces) / 4, (whole @ whole).item(), 4, 16)
        optimizer.zero_grad()
        for part_x, part_y in zip(x.split(4), y.split(4), strict=True):
            with noise.micro_batch(4):
                ((model(part_x).squeeze(1) - part_y).square().mean() / 4).backward()
        noise.step(grad_sq_norm=123.0)
        assert (noise.pair is None) == (expected is None)
        if expected is not None:
            assert noise.pair == pytest.approx(expected, rel=1e-9)
        optimizer.step()
    assert noise.statistics.count == 4 and noise.estimate().method.startswith(
        "tr(P⁻¹Σ)/(GᵀP⁻¹G) from micro-batch norms"
    )


def test_equal_second_moments_give_the_plain_noise_scale():
    """P a multiple of the identity changes both parts alike: the ratio is B_simple's."""
    generator = torch.Generator().manual_seed(1)
    model = _model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    sum(p.sum() for p in model.parameters()).backward()  # every coordinate's gradient is 1
    optimizer.step()
    optimizer.zero_grad()
    plain = GradientNoise(model, ema=None)
    rescaled = GradientNoise(model, ema=None, weighting="preconditioned", optimizer=optimizer)
    for _ in range(4):
        x, y = torch.randn(16, 5, generator=generator).double(), torch.randn(16, generator=generator).double()
        model.zero_grad()
        for loss in _losses(model, x, y):
            with plain.micro_batch(4), rescaled.micro_batch(4):
                (loss / 4).backward()
        estimates = plain.step(), rescaled.step()
    assert estimates[0].value == pytest.approx(estimates[1].value, rel=1e-9)


def test_bad_input_is_named():
    model = _model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(InputError, match='weighting must be "none", or "preconditioned" with an optimizer'):
        GradientNoise(model, weighting="preconditioned")
    with pytest.raises(InputError, match='weighting must be "none", or "preconditioned" with an optimizer'):
        GradientNoise(model, optimizer=sgd)
    with pytest.raises(InputError, match="damping must be > 0, got 0"):
        Preconditioner(sgd, list(model.parameters()), damping=0)
    with pytest.raises(InputError, match="does not hold 2 of the model's 4 parameters"):
        Preconditioner(torch.optim.Adam(model[0].parameters()), list(model.parameters()))
    with pytest.raises(InputError, match="as Adam does; SGD keeps none"):
        Preconditioner(sgd, list(model.parameters()))
    adamax = torch.optim.Adamax(model.parameters())
    model(torch.ones(1, 5).double()).sum().backward()
    adamax.step()
    with pytest.raises(InputError, match="keeps no mean of squared gradients"):
        Preconditioner(adamax, list(model.parameters())).refresh()
