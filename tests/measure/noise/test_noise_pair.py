"""The pure functions beneath: unbiased over many draws, ragged pieces too."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.measure.noise.noise_pair import noise_scale, unbiased_pair


def test_pairs_are_unbiased_and_a_mean_of_ratios_is_not():
    """Gaussian gradients, d = 200, b = 4, B = 64, 4000 repeats; truth |G|² = 1, tr(Σ) = 200.

    A ratio of such pairs has no mean at all (|G|²'s estimate passes through 0), so that averages of it stay wild.
    """
    rng, d, b, big = np.random.default_rng(0), 200, 4, 64
    mean = np.full(d, d**-0.5)
    pairs = []
    for _ in range(4000):
        pieces = mean + rng.normal(size=(big // b, d)) / math.sqrt(b)
        pairs.append(unbiased_pair((pieces**2).sum(1).mean(), (pieces.mean(0) ** 2).sum(), b, big))
    grad_sq, trace = np.array(pairs).T
    for sample, truth in ((grad_sq, 1.0), (trace, 200.0)):
        standard_error = sample.std() / math.sqrt(4000)
        assert abs(sample.mean() - truth) < 3 * standard_error < 0.05 * truth
    assert noise_scale(grad_sq.mean(), trace.mean()) == pytest.approx(200, rel=0.1)
    blocks = trace.reshape(40, 100), grad_sq.reshape(40, 100)
    off_mean_of_ratios = np.abs((blocks[0] / blocks[1]).mean(1) / 200 - 1) > 0.3
    off_ratio_of_means = np.abs(blocks[0].mean(1) / blocks[1].mean(1) / 200 - 1) > 0.3
    assert off_mean_of_ratios.sum() >= 10 and off_ratio_of_means.sum() == 0


def test_ragged_pieces_stay_unbiased_and_weighted_ones_vary_less():
    rng, sizes, d = np.random.default_rng(0), [1, 2, 5, 8], 50
    plain, weighted, total = [], [], sum(sizes)
    for _ in range(4000):
        pieces = [0.2 + rng.normal(size=d) / math.sqrt(n) for n in sizes]
        whole = sum(n * g for n, g in zip(sizes, pieces, strict=True)) / total
        norms = [g @ g for g in pieces]
        plain.append(unbiased_pair(np.mean(norms), whole @ whole, 1 / np.mean([1 / n for n in sizes]), total))
        weighted.append(unbiased_pair(np.average(norms, weights=sizes), whole @ whole, total / len(sizes), total))
    for pairs in (plain, weighted):
        for sample, truth in zip(np.array(pairs).T, (0.04 * d, d), strict=True):
            assert abs(sample.mean() - truth) < 4 * sample.std() / math.sqrt(4000) < 0.06 * truth
    assert min(trace for _, trace in weighted) > 0
    assert np.std(weighted, axis=0)[1] < 0.8 * np.std(plain, axis=0)[1]


def _digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data / 16.0), torch.tensor(data.target)


def test_the_spread_of_the_pieces_is_numpys_variance():
    """Digits cut into equal parts: mean|gᵢ|² - |g_B|² is the parts' variance, summed over coordinates."""
    x, y = _digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    parts = []
    noise = GradientNoise(model)
    for start in range(0, 1792, 256):
        with noise.micro_batch(256):
            before = [p.grad.clone() if p.grad is not None else 0 for p in model.parameters()]
            (nn.functional.cross_entropy(model(x[start : start + 256]), y[start : start + 256]) / 7).backward()
        parts.append(torch.cat([(p.grad - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]) * 7)
    noise.step()
    variance = np.var(torch.stack(parts).numpy(), axis=0).sum()
    assert noise.pair.trace * (1 / 256 - 1 / 1792) == pytest.approx(variance, rel=1e-10)
