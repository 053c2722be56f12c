"""The multiplier against its definition and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from batchlab.optim.vrgd.multiplier import add_group_, add_group_foreach_, multiplier
from batchlab.optim.vrgd.optimizers import VRSGD
from tests.optim.vrgd.groups import GAMMA, naive_multiplier, randn


@settings(max_examples=30)
@given(k=st.integers(2, 9), seed=st.integers(0, 2**31))
def test_the_multiplier_is_its_definition(k, seed):
    gradients, sizes = randn(k, 6, 5, seed=seed), (np.arange(k) % 3 + 1.0).tolist()
    expected, _ = naive_multiplier(gradients.numpy(), sizes)
    torch.testing.assert_close(multiplier(gradients, sizes), torch.tensor(expected), rtol=1e-10, atol=1e-12)


def test_two_groups_in_closed_form():
    """r = ((a + b)/(a - b))², over its mean; an upper limit holds before the mean is taken."""
    a, b = randn(2, 1000, seed=1)
    raw = ((a + b) / (a - b)) ** 2
    expected = (raw / raw.mean()).clamp(GAMMA, 1)
    torch.testing.assert_close(multiplier(torch.stack([a, b])), expected, rtol=1e-12, atol=1e-12)
    capped = raw.clamp(max=4.0)
    expected = (capped / capped.mean()).clamp(GAMMA, 1)
    torch.testing.assert_close(multiplier(torch.stack([a, b]), cap=4.0), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 3, 5, 8, 31])
def test_groups_that_agree_leave_the_base_optimizer(k, dtype):
    """var = 0 within rounding: r is 1 where gbar is not 0, and γ where it is; nothing is NaN."""
    g = randn(40, 50).to(dtype) * 1e-8
    g[:5] = 0
    expected = torch.ones_like(g).masked_fill(g == 0, GAMMA)
    assert torch.equal(multiplier(g.expand(k, 40, 50)), expected)
    ours, plain = nn.Parameter(torch.ones(40, 50, dtype=dtype)), nn.Parameter(torch.ones(40, 50, dtype=dtype))
    optimizer, base = VRSGD([ours], lr=1e7), torch.optim.SGD([plain], lr=1e7)
    for _ in range(k):
        for p in (ours, plain):
            p.grad = g.clone() if p.grad is None else p.grad + g
        optimizer.add_group()
    optimizer.step()
    base.step()
    assert torch.equal(ours, plain) and (ours != 1).any()


def test_one_group_that_agrees_stays_out_of_the_mean():
    gradients = randn(8, 30, seed=2)
    with_one = torch.cat([gradients, torch.full((8, 1), 3.0, dtype=torch.float64)], 1)
    found = multiplier(with_one)
    assert found[-1] == 1
    torch.testing.assert_close(found[:-1], multiplier(gradients), rtol=1e-12, atol=0)


def test_the_scale_of_a_tensor_leaves_r_alone():
    gradients = randn(8, 20, 30, seed=3)
    for c in (1e-12, 3.7, -1e9):
        torch.testing.assert_close(multiplier(gradients * c), multiplier(gradients), rtol=1e-12, atol=0)


def test_r_tells_signal_from_noise():
    """100 coordinates of mean 1 and 900 of mean 0, unit noise in each of 8 groups: 0.95 and 0.38 on average."""
    found = []
    for seed in range(20):
        gradients = randn(8, 1000, seed=seed)
        gradients[:, :100] += 1
        r = multiplier(gradients)
        found.append((r[:100].mean().item(), r[100:].mean().item()))
    signal, noise = np.array(found).T
    assert signal.min() > 0.85 and noise.max() < 0.5
    assert abs(signal.mean() - 0.95) < 0.02 and abs(noise.mean() - 0.38) < 0.02


def test_gradients_that_vanish_when_divided_or_squared_are_no_nan():
    gradients = torch.tensor([[1e-45, 1e-30, 1.0, -2.0], [0.0, 2e-30, 2.0, 1.0], [0.0, 3e-30, 3.0, 3.0]])
    assert (gradients.sum(0) != 0).all() and (gradients.sum(0) / 3)[0] == 0
    assert multiplier(gradients).tolist() == [pytest.approx(GAMMA), 1.0, 1.0, pytest.approx(GAMMA)]


def test_lists_take_the_loops_sums():
    gradients = randn(4, 3, 5, seed=4)
    one, lists = torch.zeros(2, 3, 5).double(), torch.zeros(2, 3, 5).double()
    for index, g in enumerate(gradients):
        add_group_(*one, g, examples=2.0, before=2.0 * index)
        add_group_foreach_([lists[0]], [lists[1]], [g], examples=2.0, before=2.0 * index)
    torch.testing.assert_close(lists, one, rtol=1e-14, atol=0)
