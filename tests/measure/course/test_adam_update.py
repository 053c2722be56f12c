"""The closed forms against simulation, and the bound against gradients that reach it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.measure.course.adam_update import (
    autocorrelated_variance,
    expected_variance,
    update_bound,
    update_density,
    white_variance,
)

BETAS = st.tuples(st.floats(0, 0.99), st.floats(0.01, 0.9999))


def _update(gradients, betas):
    m = v = 0.0
    for g in gradients:
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    t = len(gradients)
    return m / (1 - betas[0] ** t) / math.sqrt(v / (1 - betas[1] ** t))


@given(betas=BETAS, t=st.integers(1, 60))
def test_the_bound_is_reached_by_its_own_gradients_and_by_no_others(betas, t):
    bound = update_bound(betas, t)
    reaching = [(betas[0] / betas[1]) ** (t - 1 - k) for k in range(t)]
    if max(reaching) < 1e60 and min(reaching) > 1e-60:
        assert _update(reaching, betas) == pytest.approx(bound, rel=1e-6)
    generator = torch.Generator().manual_seed(t)
    for _ in range(5):
        others = torch.randn(t, generator=generator, dtype=torch.float64).exp().tolist()
        assert abs(_update(others, betas)) <= bound * (1 + 1e-9)


def test_the_bound_in_its_limits():
    assert update_bound((0.0, 0.999), 1e4) == pytest.approx(1 / math.sqrt(0.001), rel=1e-4)
    assert update_bound((0.9, 0.81), 50) == pytest.approx(
        0.1 / (1 - 0.9**50) * math.sqrt((1 - 0.81**50) / 0.19 * 50), rel=1e-6
    )
    assert update_bound((0.5, 0.0), 3) == math.inf and update_bound((0.99, 0.5), 1e6) == math.inf


def test_variances_meet_where_they_must():
    assert autocorrelated_variance(0.9, 0.0) == white_variance(0.9) == expected_variance(1, math.inf)
    assert autocorrelated_variance(0.9, 1.0) == pytest.approx(1) and expected_variance(1, 0) == 1.0
    assert white_variance(0.0) == 1.0
    assert expected_variance(400, 400) == pytest.approx((1 + 1 / 19) / 2)
    values = [expected_variance(2**k, 100) for k in range(20)]
    assert values == sorted(values)


def test_densities_have_the_area_of_what_they_show():
    u = torch.tensor([-2.0, -0.9, 0.1, 0.1, 0.2, 0.95, 1.4, 3.0])
    edges, density, reference = update_density(u, 0.9, bins=30)
    assert len(edges) == 31 and edges[0] == -1.5 and edges[-1] == 1.5
    assert sum(density) * 0.1 == pytest.approx(6 / 8)
    assert sum(y for _, y in reference) * 0.015 == pytest.approx(1, rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(100_000, generator=generator) / 19**0.5
    _, found, _ = update_density(wide, 0.9, bins=300)
    assert max(found) == pytest.approx(math.sqrt(19 / (2 * math.pi)), rel=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: white_variance(1.0), r"beta1 must lie in \[0, 1\), got 1.0"),
        (lambda: autocorrelated_variance(0.9, 1.5), r"lag1 must lie in \[-1, 1\], got 1.5"),
        (lambda: expected_variance(0, 1), "batch_size must be finite and > 0, got 0"),
        (lambda: expected_variance(1, math.nan), "noise_scale must be >= 0, got nan"),
        (lambda: update_density(torch.ones(0), 0.9), "u must be one or more finite numbers, got 0"),
        (lambda: update_density(torch.ones(3), 0.9, bins=0), "bins must be at least 1"),
        (lambda: update_bound((0.9, 0.999), 0), "t must be at least 1, got 0"),
        (lambda: update_bound((0.9, 1.0), 5), r"beta2 must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
