"""φ, the targets and their moving average, mostly from gradients given by hand."""

import math

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.agvm.agvm import noise_share, rate_targets
from batchlab.optim.agvm.half_gradients import CHUNK, dot_products
from tests.optim.agvm.given_gradients import F64, give, halves_of, pair


def test_equal_halves_have_no_noise_and_opposite_ones_cancel():
    g = [torch.randn(3, dtype=F64), torch.randn(3, dtype=F64) * 1e-9]
    modules, agvm = pair(alpha=0.0, interval=1)
    give(agvm, modules, [g, g])
    assert (agvm.phis, agvm.factors) == ((0.0, 0.0), (1.0, 1.0))
    give(agvm, modules, [g, [-each for each in g]])
    assert (agvm.phis, agvm.factors) == ((2.0, 2.0), (1.0, 1.0))


@pytest.mark.parametrize(("sigma", "expected"), [(0.05, 0.0588), (0.15, 0.360), (0.5, 0.862)])
def test_phi_is_the_share_of_noise_in_half_the_batch(sigma, expected):
    """g with |g|² = 1 in 2,000 dimensions and noise of Σσ² = s/n = 2000σ²/80: φ ≈ (s/n)/(|g|² + s/n), over 20 draws."""
    generator = torch.Generator().manual_seed(0)
    share = 2000 * sigma**2 / 80
    assert share / (1 + share) == pytest.approx(expected, abs=1e-3)
    g = torch.randn(2000, generator=generator, dtype=F64)
    g /= g.norm()
    found = []
    for _ in range(20):
        a, b = (g + sigma / 80**0.5 * torch.randn(2000, generator=generator, dtype=F64) for _ in range(2))
        found.append(noise_share(*dot_products(a, b).tolist()))
    assert sum(found) / 20 == pytest.approx(share / (1 + share), rel=0.1)


def test_dot_products_are_those_of_float64_over_all_chunks():
    a, b = torch.randn(2, 2 * CHUNK + 7)
    expected = torch.stack([a.double() @ a.double(), a.double() @ b.double(), b.double() @ b.double()])
    torch.testing.assert_close(dot_products(a, b), expected, rtol=1e-12, atol=1e-9)


def test_the_target_is_clamped_and_the_noisier_module_gets_less():
    assert rate_targets([1e-2, 1e2 + 1], eps=1e-9)[1] == math.sqrt(0.5)
    assert rate_targets([1.0, 1e-4])[1] == math.sqrt(10)
    assert rate_targets([0.3, 0.6, 0.2], anchor=2, eps=1e-12) == pytest.approx([(2 / 3) ** 0.5, 0.5**0.5, 1.0])
    assert rate_targets([0.4, 0.1], clamp=(0.9, 1.1))[1] == math.sqrt(1.1)
    (noisy,) = rate_targets([0.2, 0.3])[1:]
    assert noisy < 1


def test_factors_are_a_moving_average_of_the_targets():
    """μ = 2 at each measurement: f after k of them is 2 - 0.97^k; between them it stays."""
    modules, agvm = pair(interval=3, start=2)
    measured = 0
    for step in range(30):
        measured += agvm.due()
        give(agvm, modules, halves_of(0.4, 0.1 - 0.75e-6))  # (φ₁ + ε)/(φ₂ + ε) = 4
        assert agvm.factors == pytest.approx((1.0, 2 - 0.97**measured), rel=1e-9), step
    assert measured == 9


def test_measuring_steps_are_those_of_start_and_interval():
    modules, agvm = pair(interval=5, start=7)
    due = []
    for step in range(22):
        due += [step] if agvm.due() else []
        give(agvm, modules, halves_of(0.4, 0.1))
    assert due == [10, 15, 20]
    agvm.interval = 2
    assert agvm.due()


def test_a_parameter_with_a_gradient_in_one_half_alone_counts_as_zero_in_the_other():
    modules, agvm = pair(interval=1)
    late = nn.Parameter(torch.zeros(3, dtype=F64))
    agvm.param_groups[1]["params"].append(late)
    give(agvm, (*modules, late), [[[1.0, 0, 0], [1.0, 0, 0], None], [[1.0, 0, 0], [1.0, 0, 0], [0.0, 2.0, 0]]])
    assert agvm.phis[1] == pytest.approx(1 - 1 / 5**0.5)
    assert late.grad.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_measured_and_not_hidden(bad):
    modules, agvm = pair(interval=1, alpha=0.0)
    give(agvm, modules, halves_of(0.4, 0.1))
    before = agvm.factors
    halves = halves_of(0.4, 0.1)
    halves[1][1][2] = bad
    give(agvm, modules, halves)
    assert agvm.factors == before and agvm.skipped == 1
    assert not modules[1].detach().isfinite().all()


def test_half_precision_is_compared_in_float64():
    modules, agvm = pair(dtype=torch.bfloat16, interval=1, alpha=0.0)
    give(agvm, modules, [[[1e-20, 0, 0], [1.0, 0, 0]], [[1e-20, 1e-20, 0], [1.0, 0, 0]]])
    assert agvm.phis == pytest.approx((1 - 0.5**0.5, 0.0), abs=1e-12)
    assert agvm.factors[1] == math.sqrt(10)


@pytest.mark.parametrize(("anchor", "words"), [(5, "a place among the 2 phis, from 0, got 5"), (-1, "an integer")])
def test_an_anchor_that_is_no_group_is_refused(anchor, words):
    with pytest.raises(InputError, match=f"anchor must be {words}"):
        rate_targets([0.1, 0.2], anchor=anchor)
