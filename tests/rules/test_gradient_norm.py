"""The size of a batch's gradient: its law, its limits, and a sample that has it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.rules import gradient_norm

sizes = st.floats(0.1, 1e7)
noises = st.floats(1e-3, 1e9) | st.just(math.inf)


@given(sizes, sizes, sizes, noises)
def test_moving_twice_is_moving_once(a, b, c, noise):
    def ratio(start, end):
        return gradient_norm.norm_ratio(start, end, noise_scale=noise)

    assert ratio(a, b) * ratio(b, c) == pytest.approx(ratio(a, c), rel=1e-12)
    assert ratio(a, a) == 1.0


@given(sizes, sizes)
def test_limits(a, b):
    far, near = max(a, b) * 1e12, min(a, b) * 1e-12
    assert gradient_norm.norm_ratio(a, b, noise_scale=far) == pytest.approx(math.sqrt(a / b), rel=1e-9)
    assert gradient_norm.norm_ratio(a, b, noise_scale=math.inf) == math.sqrt(a / b)
    assert gradient_norm.norm_ratio(a, b, noise_scale=near) == pytest.approx(1.0, rel=1e-9)


def test_gaussian_gradients_have_it():
    """|G|² = 5, tr(Σ) = 20 over 20 coordinates: noise scale 4. Mean squared norms of batches of 2 and 16, 4 s.e."""
    draw = torch.randn(4000, 16, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    small, big = draw[:, :2].mean(1).square().sum(1), draw.mean(1).square().sum(1)
    found = (big.mean() / small.mean()).item()
    error = math.hypot(*(float(x.std() / len(x) ** 0.5 / x.mean()) for x in (small, big)))
    assert 4 * error < 0.05
    assert found == pytest.approx(gradient_norm.norm_ratio(2, 16, noise_scale=4) ** 2, rel=4 * error)


def test_clipping_threshold_follows():
    assert gradient_norm.scale_clip_norm(2.0, 100, 400, noise_scale=math.inf) == 1.0
    assert gradient_norm.scale_clip_norm(1.0, 256, 8192, noise_scale=1024) == pytest.approx(math.sqrt(1.125 / 5))


def test_errors_name_what_is_wrong():
    for bad in (0.0, -1.0, math.nan, None, "a"):
        with pytest.raises(InputError, match="noise_scale must be > 0, got "):
            gradient_norm.norm_ratio(1, 2, noise_scale=bad)
    with pytest.raises(InputError, match="batch_size must be finite and > 0, got inf"):
        gradient_norm.norm_ratio(1, math.inf, noise_scale=1)
    with pytest.raises(InputError, match="clip_norm must be finite and > 0, got 0"):
        gradient_norm.scale_clip_norm(0, 1, 2, noise_scale=1)
