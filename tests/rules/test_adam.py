"""Adam moved with the batch: the exact rescaling of its step, composition, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.rules import adam_for_batch
from batchlab.rules.adam import scale_beta, scale_eps


@given(st.floats(0.5, 0.9999), st.floats(0.1, 50.0), st.floats(0.1, 50.0))
def test_moving_twice_is_moving_once(beta, first, second):
    start = adam_for_batch(1e-3, (0.9, beta), 1e-8, kappa=first)
    twice = adam_for_batch(*start, kappa=second)
    once = adam_for_batch(1e-3, (0.9, beta), 1e-8, kappa=first * second)
    assert twice.learning_rate == pytest.approx(once.learning_rate, rel=1e-12)
    assert twice.betas == pytest.approx(once.betas, rel=1e-9)
    assert twice.eps == pytest.approx(once.eps, rel=1e-12)


def test_identity():
    assert adam_for_batch(1e-3, kappa=1) == (1e-3, (0.9, 0.999), 1e-8)


@given(st.floats(0.0, 1.0), st.sampled_from(["half_life", "sde"]))
def test_a_factor_of_one_changes_no_bit(beta, rule):
    assert scale_beta(beta, 1, beta_rule=rule) == beta


def test_published_values():
    """Sheet 36, check 1, for 16 views."""
    rate, (first, second), eps = adam_for_batch(1e-3, (0.9, 0.999), 1e-15, kappa=16)
    assert (rate, eps) == pytest.approx((4e-3, 2.5e-16), rel=1e-12)
    assert (round(first, 5), round(second, 5)) == (0.18530, 0.98412)


@given(st.floats(0.999, 0.99999), st.floats(0.5, 4.0))
def test_the_two_beta_rules_agree_to_first_order(beta, kappa):
    exact, first_order = (scale_beta(beta, kappa, beta_rule=rule) for rule in ("half_life", "sde"))
    assert abs(exact - first_order) <= (kappa * (1 - beta)) ** 2


def test_eps_is_exact_for_zero_mean_gradients():
    """√κ·ḡ/(√(v/κ) + ε/√κ) with ḡ the mean of κ gradients is Σg/(√v + ε)."""
    generator = torch.Generator().manual_seed(0)
    kappa, eps, v = 16, 0.3, 2.0
    gradients = torch.randn(kappa, generator=generator, dtype=torch.float64)
    moved = math.sqrt(kappa) * gradients.mean() / (math.sqrt(v / kappa) + scale_eps(eps, kappa))
    separate = (gradients / (math.sqrt(v) + eps)).sum()
    torch.testing.assert_close(moved, separate, rtol=1e-12, atol=0)


def test_refused_not_clipped():
    with pytest.raises(InputError, match=r"kappa\*\(1 - beta\) must be at most 1, got 16\*\(1 - 0.9\)"):
        scale_beta(0.9, 16, beta_rule="sde")
    with pytest.raises(InputError, match=r"beta must lie in \[0, 1\], got nan"):
        scale_beta(math.nan, 2)
    with pytest.raises(InputError, match="kappa must be finite and > 0, got 0"):
        adam_for_batch(1e-3, kappa=0)
    for bad in ((0.9,), (0.9, 0.99, 0.999), 0.9, None):
        with pytest.raises(InputError, match=r"betas must be two numbers in \[0, 1\], got "):
            adam_for_batch(1e-3, bad, kappa=2)
    with pytest.raises(InputError, match='beta_rule must be "half_life" or "sde", got'):
        scale_beta(0.9, 2, beta_rule="linear")
    with pytest.raises(InputError, match="eps must be >= 0, got -1"):
        scale_eps(-1, 2)
