"""The median's interval covers at its stated rate."""

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.measure.order import median_interval


@pytest.mark.parametrize("n", [3, 6, 11, 40])
def test_covers_at_the_stated_rate(n):
    draws = np.random.default_rng(0).lognormal(size=(4000, n))
    estimates = [median_interval(row.tolist()) for row in draws]
    stated = estimates[0].coverage
    covered = np.mean([each.low <= 1.0 <= each.high for each in estimates])
    assert abs(covered - stated) < 4 * (stated * (1 - stated) / 4000) ** 0.5 + 1e-9
    assert stated >= 0.95 or n < 6


def test_one_and_none():
    one = median_interval([2.0])
    assert (one.value, one.low, one.high) == (2.0, 0.0, float("inf"))
    with pytest.raises(InputError, match="samples must be one or more finite numbers"):
        median_interval([])
    with pytest.raises(InputError, match="samples must be one or more finite numbers"):
        median_interval([1.0, float("nan")])
    with pytest.raises(InputError, match=r"coverage must lie in \(0, 1\), got 95"):
        median_interval([1.0, 2.0], coverage=95)
