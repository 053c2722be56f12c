"""The sums over coordinates that the monitor reads, which add over parts, and the update that is none."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from batchlab.measure.course.adam_update import UpdateSums, adam_update, update_sums


@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=40),
    cut=st.integers(0, 40),
    eps=st.sampled_from([0.0, 1e-8, 0.5]),
)
def test_moments_are_those_of_the_coordinates_and_add_over_parts(values, cut, eps):
    u = torch.tensor(values, dtype=torch.float64)
    root, g, p = u.abs() + 0.25, u.flip(0) + 1, u.square() - 1
    active = torch.ones_like(u, dtype=torch.bool)
    cut = min(cut, len(u))
    parts = update_sums(u, root, g, p, active, eps, [cut, len(u) - cut]).tolist()
    sums = UpdateSums(*parts[0]).plus(parts[1])
    (alone,) = update_sums(u, root, g, p, active, eps, [len(u)]).tolist()
    assert list(sums) == pytest.approx(alone, rel=1e-9, abs=1e-9)
    x = np.array(values)
    assert sums.n == len(x) and sums.rms == pytest.approx(math.sqrt((x**2).mean()), abs=1e-9)
    assert sums.variance == pytest.approx(x.var(), rel=1e-7, abs=1e-9)
    assert sums.high == (np.abs(x) > 0.8).sum() and sums.below == (np.abs(x) + 0.25 < eps).sum()
    if x.var() > 1e-2 * (x**2).mean() > 0:
        central = x - x.mean()
        b = ((central**3).mean() ** 2 / x.var() ** 3 + 1) / ((central**4).mean() / x.var() ** 2)
        assert sums.sarle == pytest.approx(b, rel=1e-6) and 0 < b <= 1 + 1e-9
        assert sums.cosine == pytest.approx(F.cosine_similarity(u, g, dim=0).item(), rel=1e-7, abs=1e-9)


def test_two_points_make_sarles_coefficient_one():
    u = torch.tensor([0.3] * 7 + [-0.9] * 5, dtype=torch.float64)
    sums = UpdateSums(*update_sums(u, u.abs(), u, u, u != 0, 1e-8, [12]).tolist()[0])
    assert sums.sarle == pytest.approx(1, rel=1e-9) and sums.lag1 == pytest.approx(1, rel=1e-12)


def test_a_zero_epsilon_is_no_update_where_there_is_no_gradient():
    u, root = adam_update(torch.zeros(2), torch.zeros(2), (0.9, 0.99), 0.0, 1)
    assert u.tolist() == [0.0, 0.0] and root.tolist() == [0.0, 0.0]
