"""Adam's rule where it is exact: independent sparse gradients; and where it is not: one gradient that all share.

Sheet 36 (Zhao et al. 2024, arXiv 2406.18533), checks 3 and 4, with torch's Adam in float64.
"""

import math

import numpy as np
import pytest
import torch

from batchlab.rules import adam_for_batch

PARAMETERS, WARMUP, MEASURED = 4000, 4096, 256
RATE, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-15


@pytest.fixture(scope="module", params=[0, 1, 2], ids=lambda seed: f"seed{seed}")
def views(request):
    """Gradients of single views: each touches 5 % of the parameters, whose scales are log-normal."""
    draw = np.random.default_rng(request.param)
    scale = np.exp(draw.normal(size=PARAMETERS))
    number = WARMUP + MEASURED
    touched = draw.random((number, PARAMETERS), dtype=np.float32) < 0.05
    return torch.from_numpy(draw.standard_normal((number, PARAMETERS), dtype=np.float32) * touched * scale)


def travelled(gradients, batch, settings):
    """The sum of Adam's updates over the last 256 views, from mean gradients of `batch` of them."""
    rate, betas, eps = settings
    weights = torch.nn.Parameter(torch.zeros(gradients.shape[1], dtype=torch.float64))
    optimizer = torch.optim.Adam([weights], lr=rate, betas=betas, eps=eps)
    for number, block in enumerate(gradients.split(batch)):
        if number * batch == len(gradients) - MEASURED:
            start = weights.detach().clone()
        weights.grad = block.double().mean(0)
        optimizer.step()
    return weights.detach() - start


def compared(gradients, batch):
    """Ratio of norms and cosine to batch 1: by the rule, with √b·η alone, η as it was, and b·η."""
    base = travelled(gradients, 1, (RATE, BETAS, EPS))
    rates = {"root alone": RATE * math.sqrt(batch), "constant": RATE, "linear": RATE * batch}
    settings = {"rule": adam_for_batch(RATE, BETAS, EPS, kappa=batch)}
    settings |= {name: (rate, BETAS, EPS) for name, rate in rates.items()}
    found = {name: travelled(gradients, batch, each) for name, each in settings.items()}
    return {
        name: ((moved.norm() / base.norm()).item(), (moved @ base / moved.norm() / base.norm()).item())
        for name, moved in found.items()
    }


def test_independent_sparse_gradients(views):
    """Measured for b = 4 by the sheet: 1.00, 0.50, 2.00; cosines 0.999 and 0.966."""
    found = compared(views, 4)
    assert abs(found["rule"][0] - 1) < 0.05 and found["rule"][1] > 0.99, found
    assert found["constant"][0] < 0.6 and found["linear"][0] > 1.8, found
    assert found["root alone"][1] == pytest.approx(0.966, abs=0.005), found


@pytest.mark.parametrize("batch", [4, 16])
def test_one_gradient_that_all_views_share(batch):
    """b equal updates of η each: √b·η falls short by √b, and b·η keeps step."""
    shared = torch.linspace(-1, 2, 50, dtype=torch.float64).expand(WARMUP + MEASURED, 50)
    found = compared(shared, batch)
    assert found["rule"] == pytest.approx((batch**-0.5, 1), rel=1e-6)
    assert found["linear"] == pytest.approx((1, 1), rel=1e-6)
