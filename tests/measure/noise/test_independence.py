"""The curve of 1/E|g_b|²: against its naive form, of gradients whose dependence is known, and of a real net."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure import IndependenceCurve, gradient_independence_curve


def gaussian(number, size, seed=0):
    return torch.randn(number, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(gradients):
    """Mean |g_b|² over the blocks of b that have a neighbour to pair with, for the pairs (b/2, b)."""
    found = []
    for b in (2**k for k in range(1, 40) if len(gradients) // 2**k >= 8):
        blocks = gradients[: len(gradients) // b * b].reshape(-1, b, gradients.shape[1])
        halves = blocks.reshape(len(blocks), 2, b // 2, -1).mean(2).square().sum(2).mean()
        means = blocks.mean(1).square().sum(1).mean()
        found.append((blocks.square().sum(2).mean() / means, halves / means))
    return torch.tensor(found, dtype=torch.float64)


@given(number=st.integers(16, 100), size=st.integers(1, 5), seed=st.integers(0, 2**20))
def test_it_is_its_naive_form(number, size, seed):
    gradients = gaussian(number, size, seed) + 0.3
    curve = gradient_independence_curve(gradients)
    found = [(i.value, g.value) for i, g in zip(curve.inverse[1:], curve.gains, strict=True)]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), naive(gradients), rtol=1e-12, atol=0)
    assert curve.examples == number and curve.inverse[0].value == 1
    assert curve.batch_sizes == tuple(2**k for k in range(len(curve.inverse))) and number // curve.batch_sizes[-1] >= 8
    assert IndependenceCurve.from_json(curve.to_json()) == curve


def sparse_views(number, parameters=4000, share=0.05, seed=0):
    """Sheet 36, check 3: each view touches 5 % of the parameters, whose scales are log-normal."""
    draw = np.random.default_rng(seed)
    scale = np.exp(draw.normal(size=parameters))
    for _ in range(number):
        yield scale * draw.normal(size=parameters) * (draw.random(parameters) < share)


def test_independent_sparse_gradients_double_at_each_doubling():
    """Intervals of 99.9 % each: ten of them miss once in 100 samples. A gain of 1.7 would be found out."""
    curve = gradient_independence_curve(map(torch.from_numpy, sparse_views(1024)), coverage=0.999)
    assert curve.batch_sizes == (1, 2, 4, 8, 16, 32, 64, 128) and curve.plateau is None
    for gain in curve.gains[:5]:
        assert 1.7 < gain.low <= 2 <= gain.high, curve.gains
    for size, inverse in zip(curve.batch_sizes[1:6], curve.inverse[1:6], strict=True):
        assert inverse.low <= size <= inverse.high, curve.inverse


def test_one_gradient_that_all_share_is_flat():
    """Sheet 36, check 4: the control."""
    curve = gradient_independence_curve(torch.linspace(-1, 2, 7, dtype=torch.float64).expand(128, 7))
    assert [each.value for each in curve.inverse] == pytest.approx([1] * 5, rel=1e-12)
    assert curve.plateau == 1


def test_views_of_one_place_are_flat_up_to_their_number():
    """Runs of eight views that share a gradient, anew for each run: flat up to 8, and growing again beyond."""
    curve = gradient_independence_curve(gaussian(256, 50).repeat_interleave(8, 0), coverage=0.999)
    assert [each.value for each in curve.inverse[:4]] == pytest.approx([1] * 4, rel=1e-12)
    assert curve.plateau == 1
    assert curve.gains[3].low <= 2 <= curve.gains[3].high < 2.4


def test_the_plateau_is_where_the_noise_scale_is():
    """|G|² = 1, tr(Σ) = 16: V = 1 + 16/b, and the gain at b, (1 + 16/b)/(1 + 8/b), is 1.5 at 8 and 1.33 at 16."""
    gradients = 4 / math.sqrt(200) * gaussian(8192, 200) + 1 / math.sqrt(200)
    curve = gradient_independence_curve(gradients, coverage=0.999)
    for size, gain in zip(curve.batch_sizes[:-1], curve.gains, strict=False):
        truth = (1 + 16 / size) / (1 + 8 / size)
        assert gain.low <= truth <= gain.high, (size, gain)
    assert curve.gains[3].low > math.sqrt(2) > curve.gains[4].high and curve.plateau == 16


def test_a_gain_holds_the_truth_at_its_stated_rate():
    """600 samples of 64 gradients of 6 coordinates: 90 % within four standard errors, 0.049: 85 % would fail."""
    within = 0
    for sample in gaussian(600 * 64, 6).reshape(600, 64, 6):
        gain = gradient_independence_curve(sample, coverage=0.9).gains[1]
        within += gain.low <= 2 <= gain.high
    assert abs(within / 600 - 0.9) < 4 * math.sqrt(0.9 * 0.1 / 600), within / 600


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.rare, self.never = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return (self.rare if x[0, 0] > 0.5 else self.used)(x).square().mean()


def test_a_nets_gradients_in_buffers_that_are_used_again():
    """Some parameters without a gradient at first, one at all examples; `.grad` filled in place."""
    torch.manual_seed(0)
    model, data = Net().double(), gaussian(50, 4)

    def examples():
        for x in data:
            model.zero_grad(set_to_none=False)
            model(x[None]).backward()
            yield [p.grad for p in model.parameters()]

    curve = gradient_independence_curve(examples())
    values = [(i.value, g.value) for i, g in zip(curve.inverse[1:], curve.gains, strict=True)]
    wanted = naive(torch.stack([_by_parameter(model, x) for x in data]))
    torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), wanted, rtol=1e-12, atol=0)


def _by_parameter(model, x):
    model.zero_grad(set_to_none=True)
    model(x[None]).backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def test_half_precision_is_summed_in_float32():
    gradients = (gaussian(64, 30) + 1).bfloat16()
    found, wanted = (gradient_independence_curve(each) for each in (gradients, gradients.double()))
    assert [each.value for each in found.inverse] == pytest.approx([each.value for each in wanted.inverse], rel=1e-5)


def test_gradients_that_vanish_tell_nothing():
    curve = gradient_independence_curve(torch.zeros(32, 3))
    assert curve.plateau is None and math.isnan(curve.gains[0].value)


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ([], "gradients must be at least 16, for two sizes of batch, got 0"),
        (torch.ones(15, 2), "gradients must be at least 16, for two sizes of batch, got 15"),
        ([torch.ones(2), torch.tensor([1.0, math.nan])], "gradient 2 is not finite"),
        (torch.ones(16, 2).long(), "gradient 1 must be of real floating-point numbers, got torch.int64"),
        ([torch.ones(2), torch.ones(3)], r"gradients must all be of the same shapes, got \[\(2,\)\] and \[\(3,\)\]"),
        ([[torch.ones(2)], [torch.ones(2), None]], "gradients must all be of the same shapes"),
    ],
)
def test_what_is_wrong_is_named(gradients, message):
    with pytest.raises(InputError, match=message):
        gradient_independence_curve(gradients)


def test_coverage_is_a_share():
    with pytest.raises(InputError, match=r"coverage must lie in \(0, 1\), got 95"):
        gradient_independence_curve(torch.ones(16, 2), coverage=95)
