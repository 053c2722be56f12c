"""r in closed form, its rules where the variance is 0, its bias, and what it tells apart."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard, distribute_tensor

from batchlab.core.errors import InputError
from batchlab.measure.noise.signal_to_noise import gsnr


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_two_groups_in_closed_form():
    a, b = draws(2, 5, 7)
    torch.testing.assert_close(gsnr(torch.stack([a, b])), ((a + b) / (a - b)).square(), rtol=1e-12, atol=0.0)


@given(k=st.integers(2, 9), seed=st.integers(0, 1000))
def test_it_is_numpys_mean_and_variance(k, seed):
    g = draws(k, 11, seed=seed)
    expected = g.numpy().mean(0) ** 2 / g.numpy().var(0)
    np.testing.assert_allclose(gsnr(g).numpy(), expected, rtol=1e-10)


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_ragged_groups_are_weighted(sizes, seed):
    """As if each group stood there so many times: the same weighted mean and variance."""
    g = draws(len(sizes), 6, seed=seed)
    repeated = g.repeat_interleave(torch.tensor(sizes), 0)
    torch.testing.assert_close(gsnr(g, sizes), gsnr(repeated), rtol=1e-9, atol=1e-12)


def test_identical_groups_have_no_noise():
    g = torch.tensor([1.0, 0.0, -3.0, 1e-8]).expand(5, 4)
    for found in (gsnr(g), gsnr(g, normalise=True)):
        assert found.tolist() == [math.inf, 0.0, math.inf, math.inf]
    half = torch.tensor([[1.0, 2.0], [1.0, 4.0]])
    assert gsnr(half, normalise=True).tolist() == [math.inf, 1.0]
    assert gsnr(torch.zeros(3, 4), normalise=True).tolist() == [0.0] * 4


@given(power=st.integers(-40, 40), factor=st.floats(0.5, 2.0), seed=st.integers(0, 1000))
def test_the_scale_of_the_gradients_changes_nothing(power, factor, seed):
    g = draws(4, 9, seed=seed)
    torch.testing.assert_close(gsnr(g * factor * 2.0**power), gsnr(g), rtol=1e-12, atol=0.0)


def test_half_precision_is_computed_in_float32():
    """Mean 1 and deviations of a few bf16 steps: E g² - gbar² in bf16 would be 0 or negative."""
    g = (1 + 0.05 * draws(8, 1000)).bfloat16()
    torch.testing.assert_close(gsnr(g), gsnr(g.double()).float(), rtol=1e-4, atol=0.0)
    assert gsnr(g).dtype == torch.float32


@pytest.mark.parametrize("k", [4, 8, 32])
def test_the_bias_of_few_groups_is_as_stated_and_is_taken_out(k):
    """R = 0.25 of a group's mean, 400,000 coordinates: four standard errors of the mean are under 0.03.

    r has no finite mean at k = 4 and no finite variance up to 5: there its median is compared with the law of F.
    """
    truth, n = 0.25, 400_000
    raw, fair = gsnr(0.5 + draws(k, n, seed=k)), gsnr(0.5 + draws(k, n, seed=k), unbiased=True)
    torch.testing.assert_close(fair, ((k - 3) * raw - 1) / k, rtol=1e-12, atol=1e-12)
    if k > 4:
        error = float(fair.std()) / math.sqrt(n)
        assert abs(float(fair.mean()) - truth) < 4 * error < 0.03
        assert abs(float(raw.mean()) - (k * truth + 1) / (k - 3)) < 4 * float(raw.std()) / math.sqrt(n)
        assert float(raw.mean()) - truth > 8 * error
    else:  # raw = F/(k - 1), F non-central with k·R
        from scipy.stats import ncf

        assert float(raw.median()) == pytest.approx(ncf.median(1, k - 1, k * truth) / (k - 1), rel=0.02)


def test_signal_is_told_from_noise():
    """1,000 coordinates, 100 of mean 1 and 900 of 0, unit noise, k = 8, the paper's multiplier clamp(r, 0.1, 1)."""
    kept = []
    for seed in range(20):
        g = draws(8, 1000, seed=seed)
        g[:, :100] += 1
        multiplier = gsnr(g, normalise=True).clamp(0.1, 1)
        kept.append((float(multiplier[:100].mean()), float(multiplier[100:].mean())))
    signal, noise = np.mean(kept, axis=0)
    assert signal > 0.85 and noise < 0.5
    assert min(s for s, _ in kept) > max(n for _, n in kept)


def test_cockpits_ratio_is_ours_for_groups_of_one_example_but_for_its_epsilon():
    """MeanGSNR: g²/(N·Σgᵢ² - g² + 1e-5), with gᵢ each example's share of the mean gradient g."""
    examples = draws(32, 50)
    for scale, agree in ((10.0, True), (1e-3, False)):
        shares = scale * examples / 32
        mean = shares.sum(0)
        cockpit = mean**2 / (32 * (shares**2).sum(0) - mean**2 + 1e-5)
        ours = gsnr(scale * examples)
        assert torch.allclose(cockpit, ours, rtol=1e-6) == agree
        assert agree or float((cockpit / ours).median()) < 0.2  # there the epsilon, not the noise, divides


@pytest.mark.parametrize(
    ("gradients", "options", "message"),
    [
        (torch.ones(1, 3), {}, r"gradients needs at least two groups along its first dimension, got shape \(1, 3\)"),
        ([torch.ones(3)], {}, "gradients must be one tensor, stacked along its first dimension, got "),
        (torch.tensor(1.0), {}, r"at least two groups .* got shape \(\)"),
        (torch.ones(3, 2, dtype=torch.long), {}, "gradients must be real floating-point numbers, got torch.int64"),
        (torch.ones(3, 2), {"unbiased": True}, "an unbiased ratio needs at least 4 groups, got 3"),
        (torch.ones(4, 2), {"unbiased": True, "normalise": True}, "cannot be normalised to a mean of 1"),
        (torch.ones(4, 2), {"examples": [1, 2]}, "examples must name each of the 4 groups, got 2"),
        (torch.ones(2, 2), {"examples": [1, 0]}, "examples must be an integer of at least 1, got 0"),
    ],
)
def test_bad_input_is_named(gradients, options, message):
    with pytest.raises(InputError, match=message):
        gsnr(gradients, **options)


def test_spread_gradients_are_refused(mesh_of_one):
    with pytest.raises(InputError, match="gradients must be a plain tensor, got a DTensor"):
        gsnr(distribute_tensor(draws(4, 3), mesh_of_one, [Shard(1)]))
