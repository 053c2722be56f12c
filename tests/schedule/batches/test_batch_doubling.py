"""Doublings, and the noise floor that they lower, by simulation. On a language model: test_batch_doubling_learning."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.schedule.batches.batch_doubling import (
    BatchDoubling,
    doubling_gain,
    equivalent_lr,
    falcon2_doubling,
    noise_floor,
    temperature,
)


def test_the_published_doublings():
    doubling = falcon2_doubling([1, 2, 3, 4], multiple_of=128)
    assert [size for _, size in doubling.changes()] == [2048, 4096, 8192, 16384, 32768]
    assert 32768 * 2048 == 67_108_864  # 67.1 million tokens an update, from 4.2 million
    # four doublings are a cut of the rate by 4 in the report's reading, η/√B, and by 16 for SGD
    for reading, cut in (("adam", 4.0), ("sgd", 16.0)):
        now, then = temperature(1.0, 32768, reading=reading), temperature(1.0, 2048, reading=reading)
        assert then / now == pytest.approx(cut)


@given(batch=st.floats(1.0, 1e6), noise=st.floats(1e-3, 1e9))
def test_a_doubling_is_worth_between_one_update_and_two(batch, noise):
    gain = doubling_gain(batch, noise)
    assert 1 - 1e-12 <= gain <= 2 + 1e-12
    assert gain == pytest.approx(2 * (batch + noise) / (2 * batch + noise), rel=1e-9)


def descend(lr, batch, *, curvature=1.0, sigma=1.0, steps, chains, x=None, seed=0):
    """Mean excess loss λx²/2 over steps and chains of x' = (1 - ηλ)x - ηξσ/√B; and the last x."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(chains, dtype=torch.float64) if x is None else x
    total = 0.0
    for _ in range(steps):
        noise = torch.randn(chains, generator=generator, dtype=torch.float64)
        x = (1 - lr * curvature) * x - lr * sigma * noise / batch**0.5
        total += float(curvature * x.square().mean() / 2)
    return total / steps, x


def test_the_noise_floor_is_what_a_simulation_finds():
    """2e5 updates in 1,000 chains of 200 after 200 to settle: relative standard error about √(2·19/2e5) = 1.4 %."""
    found = {}
    for seed, batch in enumerate((8, 16, 32)):
        _, x = descend(0.1, batch, steps=200, chains=1000, seed=seed)
        found[batch], _ = descend(0.1, batch, steps=200, chains=1000, x=x, seed=seed + 100)
        assert found[batch] == pytest.approx(noise_floor(0.1, batch, curvature=1.0, variance=1.0), rel=0.03)
    assert found[8] / found[16] == pytest.approx(2.0, abs=0.06)
    scaled, _ = descend(0.4, 8, curvature=3.0, sigma=2.0, steps=400, chains=1000, seed=5)
    assert scaled == pytest.approx(noise_floor(0.4, 8, curvature=3.0, variance=4.0), rel=0.03)


def test_a_doubling_drops_the_loss_as_the_equivalent_cut_of_the_rate_does():
    _, x = descend(0.1, 8, steps=200, chains=2000)
    doubled, _ = descend(0.1, 16, steps=200, chains=2000, x=x, seed=1)
    lr = equivalent_lr(0.1, 2, curvature=1.0)
    _, settled = descend(lr, 8, steps=200, chains=2000, seed=2)
    cut, _ = descend(lr, 8, steps=200, chains=2000, x=settled, seed=3)
    assert lr == pytest.approx(0.05128, abs=5e-6)
    assert doubled / noise_floor(0.1, 16, curvature=1.0, variance=1.0) == pytest.approx(1.0, abs=0.05)
    assert cut == pytest.approx(doubled, rel=0.05)


@given(lr=st.floats(1e-4, 1.9), ratio=st.floats(0.2, 50.0), curvature=st.floats(1e-3, 1.0))
def test_the_equivalent_rate_has_the_larger_batchs_floor(lr, ratio, curvature):
    other = equivalent_lr(lr, ratio, curvature=curvature)
    assert 0 < other * curvature < 2
    at = noise_floor(other, 64, curvature=curvature, variance=2.0)
    assert at == pytest.approx(noise_floor(lr, 64 * ratio, curvature=curvature, variance=2.0), rel=1e-6)
    assert equivalent_lr(lr, ratio) == pytest.approx(lr / ratio)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BatchDoubling(8, [10, 5]), r"double_at must rise from one to the next, got \[10, 5\]"),
        (lambda: BatchDoubling(8, [0]), "double_at must be an integer of at least 1, got 0"),
        (lambda: BatchDoubling(8, [5], factor=1), "factor must be an integer of at least 2, got 1"),
        (lambda: BatchDoubling(9, [5], multiple_of=8), "sizes must be multiples of multiple_of 8, got 9"),
        (lambda: falcon2_doubling([1, 2]), "double_at must hold four points, got 2"),
        (lambda: noise_floor(2.0, 8, curvature=1.0, variance=1.0), "lr must be below 2/curvature = 2, .* got 2.0"),
        (lambda: equivalent_lr(0.1, 0), "batch_ratio must be finite and > 0, got 0"),
        (lambda: equivalent_lr(0.1, 2, curvature=math.nan), "curvature must be >= 0 and below 2/lr = 20, got nan"),
        (lambda: temperature(0.1, 8, reading="lion"), 'reading must be "adam" or "sgd", got \'lion\''),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_other_libraries_integers_do_not_overflow():
    assert BatchDoubling(np.uint8(100), np.array([10, 20])).changes() == [(0, 100), (10, 200), (20, 400)]
    with pytest.raises(InputError, match="double_at must be several integers, one after the other, got 100"):
        BatchDoubling(4, 100)
