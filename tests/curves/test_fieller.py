"""Fieller's ends against the definition, by brute force, and the rate at which they hold the ratio."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.special import stdtrit

from batchlab.curves.fieller import fieller

spread = st.floats(0.01, 0.5)


@given(x=st.floats(-10, 10), y=st.floats(0.2, 10), s_x=spread, s_y=spread, rho=st.floats(-0.9, 0.9))
def test_the_ends_are_where_the_definition_turns(x, y, s_x, s_y, rho):
    v_xx, v_yy, v_xy = (s_x * abs(x)) ** 2, (s_y * y) ** 2, rho * s_x * abs(x) * s_y * y
    assume(s_x * abs(x) > 1e-3)
    low, high = fieller(x, y, v_xx, v_xy, v_yy)
    assert low <= x / y <= high

    def excess(r):
        return (x - r * y) ** 2 - (v_xx - 2 * r * v_xy + r * r * v_yy)

    scale = v_xx + (x / y) ** 2 * v_yy
    width = high - low
    for end in (low, high):
        assert excess(end) == pytest.approx(0.0, abs=1e-8 * scale)
    assert excess((low + high) / 2) < 0 < excess(low - width) and excess(high + width) > 0


def test_the_interval_covers_at_its_rate():
    """2000 draws of 4 degrees of freedom; Binomial(2000, 0.95) lies within 4 standard errors, 0.0195, of 0.95."""
    rng = np.random.default_rng(0)
    t_sq, held = stdtrit(4, 0.975) ** 2, 0
    for _ in range(2000):
        pairs = rng.normal([3.0, 2.0], [0.5, 0.3], size=(5, 2))
        v = t_sq * np.cov(pairs.T) / 5
        low, high = fieller(*pairs.mean(0), v[0, 0], v[0, 1], v[1, 1])
        held += low <= 1.5 <= high
    assert abs(held / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_a_denominator_that_may_be_zero_bounds_nothing():
    assert fieller(1.0, 1.0, 0.1, 0.0, 1.0) == (-math.inf, math.inf)
    assert fieller(1.0, 1.0, 0.1, 0.0, math.inf) == (-math.inf, math.inf)
