"""LAMB does what the paper says of it, and its recipe gives the paper's rates and warm-ups."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.lamb import LAMB, lamb_schedule
from tests.optim.problem import STEPS, after, close, weights


def test_every_step_has_the_length_of_the_rate():
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(7, 5, generator=generator, dtype=torch.float64))
    optimizer = LAMB([w], lr=0.01, weight_decay=0.3)
    for t in range(20):
        before = w.detach().clone()
        w.grad = 10.0 ** (t % 7 - 3) * torch.randn(7, 5, generator=generator, dtype=torch.float64)
        with optimizer.watching():
            optimizer.step()
        assert (w.detach() - before).norm() / before.norm() == pytest.approx(0.01, rel=1e-12)
        found = optimizer.report()["parameter 0 of shape (7, 5)"]
        assert found["update_ratio"] == pytest.approx(0.01, rel=1e-12)
        assert found["weight_norm"] == pytest.approx(float(before.norm()), rel=1e-12)
        assert found["trust_ratio"] > 0


def test_without_eps_it_is_free_of_the_gradients_scale():
    def run(scale, eps):
        return after(partial(LAMB, lr=1.0, eps=eps, weight_decay=0.1, exclude_vectors=False), scale=scale)

    close(run(1e5, 0.0), run(1.0, 0.0), 1e-9)
    assert max(abs(a - b).max() for a, b in zip(run(1e-7, 1e-6), run(1.0, 1e-6), strict=True)) > 1e-3


def test_without_adaptation_it_is_adamw():
    """All tensors as vectors: a ratio of 1 and no decay."""

    def flat(make):
        parameters = [nn.Parameter(torch.tensor(w).flatten()) for w in weights()]
        optimizer = make(parameters)
        generator = torch.Generator().manual_seed(1)
        for _ in range(STEPS):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
        return [p.detach() for p in parameters]

    close(flat(partial(LAMB, lr=0.01, eps=1e-8)), flat(partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0)))


def test_the_limits_of_the_ratio():
    w, g = torch.full((2, 2), 4.0, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)

    def moved(**settings):
        parameter = nn.Parameter(w.clone())
        parameter.grad = g.clone()
        LAMB([parameter], lr=0.1, eps=0.0, **settings).step()
        return (w - parameter.detach())[0, 0].item()

    assert moved() == pytest.approx(0.4)
    assert moved(max_ratio=1.0) == pytest.approx(0.1)
    assert moved(clamp=(0.0, 6.0)) == pytest.approx(0.3)  # |w| = 8 counts as 6
    assert moved(clamp=[0.0, 6.0]) == moved(clamp=(0.0, 6.0))  # as a plan in JSON has it


def test_the_global_clip_is_over_all_tensors():
    """It changes what the moments hold by one factor; the first step, free of the scale, is the same."""
    settings = {"lr": 0.01, "eps": 0.0}
    parameters = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))]
    for p in parameters:
        p.grad = torch.full_like(p, 10.0)
    optimizer = LAMB(parameters, max_grad_norm=1.0, **settings)
    optimizer.step()
    first = optimizer.state[parameters[0]]["exp_avg"][0, 0].item()
    assert first == pytest.approx(0.1 * 10.0 / (10.0 * math.sqrt(7)), rel=1e-6)
    assert parameters[0].grad[0, 0] == 10.0  # the gradient itself is left alone


def test_a_tensor_that_starts_at_zero_moves():
    w = nn.Parameter(torch.zeros(2, 2))
    w.grad = torch.ones(2, 2)
    LAMB([w], lr=0.1).step()
    assert w.detach().eq(w[0, 0].detach()).all() and w[0, 0].item() == pytest.approx(-0.1, rel=1e-5)


def test_the_recipe_is_the_papers():
    for k, batch, warmup in ((3.0, 512, 1 / 320), (2.5, 1024, 1 / 160), (2.0, 2048, 1 / 80), (0.0, 32768, 1 / 5)):
        found = lamb_schedule(batch)
        assert found.lr == pytest.approx(5 / (2**k * 1000), rel=1e-12)
        assert found.warmup == pytest.approx(warmup, rel=1e-12)
    with pytest.raises(InputError, match="batch 200000 would need 1.22 of the run to warm up"):
        lamb_schedule(200_000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas must be 2 numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": -1e-6}, "eps must be finite and >= 0, got -1e-06"),
        ({"clamp": (2.0, 1.0)}, r"clamp must be \(low, high\) with 0 <= low < high"),
        ({"clamp": 1.0}, r"clamp must be \(low, high\) with 0 <= low < high, got 1.0"),
        ({"betas": ("0.9", "0.99")}, r"betas must be 2 numbers in \[0, 1\), got \('0.9', '0.99'\)"),
        ({"max_ratio": 0.0}, "max_ratio must be finite and > 0, got 0.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be finite and > 0, got 0.0"),
        ({"state_dtype": torch.float16}, 'state_dtype must be None, torch.float32, torch.bfloat16 or "8bit"'),
    ],
)
def test_bad_numbers_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        LAMB([nn.Parameter(torch.ones(2, 2))], lr=0.1, **settings)


def test_the_state_in_fewer_bits():
    """bfloat16 keeps the squares in float32; the weights end near those of the full state."""

    def run(state_dtype):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(64, 64))
        optimizer = LAMB([w], lr=0.01, state_dtype=state_dtype)
        for _ in range(20):
            w.grad = torch.randn(64, 64) + 0.5
            optimizer.step()
        return w.detach(), optimizer.state[w]

    full, low = run(None), run(torch.bfloat16)
    assert (low[1]["exp_avg"].dtype, low[1]["exp_avg_sq"].dtype) == (torch.bfloat16, torch.float32)
    gap = (low[0] - full[0]).norm() / full[0].norm()
    assert 0 < gap < 5e-3


def test_half_precision_weights_are_updated_in_float32():
    """A sum of many steps below half a unit in the last place of bfloat16 would be lost in the state, were it half."""
    w = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = LAMB([w], lr=1e-2)
    for _ in range(3):
        w.grad = torch.full_like(w, 0.1)
        optimizer.step()
    assert optimizer.state[w]["exp_avg"].dtype == torch.float32
    expected = 0.1 * (1 - 0.9**3)
    np.testing.assert_allclose(
        optimizer.state[w]["exp_avg"].numpy(), float(torch.tensor(0.1).bfloat16()) * expected / 0.1, rtol=1e-5
    )
