"""A power law's line: known laws, Student's intervals against SciPy and by their coverage, and what it refuses."""

import math

import numpy as np
import pytest
from scipy import stats

from batchlab.core.errors import InputError
from batchlab.curves.log_line import LogLine

XS = [1.0, 2.0, 5.0, 10.0, 30.0, 100.0]


def scattered(seed, deviation=0.1):
    noise = np.random.default_rng(seed).normal(0, deviation, len(XS))
    return [3.0 * x**0.4 * math.exp(e) for x, e in zip(XS, noise, strict=True)]


def test_slope_and_interval_are_those_of_scipy():
    ys = scattered(0)
    line, peer = LogLine.through(XS, ys), stats.linregress(np.log(XS), np.log(ys))
    slope = line.exponent("by hand", 0.9)
    half = stats.t.ppf(0.95, len(XS) - 2) * peer.stderr
    assert slope.value == pytest.approx(peer.slope, rel=1e-12)
    assert (slope.low, slope.high) == pytest.approx((peer.slope - half, peer.slope + half), rel=1e-10)
    half = stats.t.ppf(0.975, len(XS) - 2) * peer.intercept_stderr
    one = line.at(1.0, "by hand")
    assert (one.low, one.high) == pytest.approx((math.exp(peer.intercept - half), math.exp(peer.intercept + half)))
    assert math.log(one.value) == pytest.approx(peer.intercept)


def test_intervals_cover_at_their_rate():
    """1000 draws at 90 %: four standard errors are 0.038."""
    inside = np.zeros(3)
    for seed in range(1000):
        line, new = LogLine.through(XS, scattered(seed)), np.random.default_rng(10_000 + seed).normal(0, 0.1)
        slope, mean = line.exponent("m", 0.9), line.at(300.0, "m", 0.9)
        point, truth = line.at(300.0, "m", 0.9, new_point=True), 3.0 * 300.0**0.4
        inside += [
            slope.low <= 0.4 <= slope.high,
            mean.low <= truth <= mean.high,
            point.low <= truth * math.exp(new) <= point.high,
        ]
    assert np.all(np.abs(inside / 1000 - 0.9) < 0.038), inside


def test_residuals_are_logarithms_about_the_line():
    ys = scattered(1)
    line = LogLine.through(XS, ys)
    assert line.residuals == pytest.approx([math.log(y / line.value(x)) for x, y in zip(XS, ys, strict=True)])
    assert sum(line.residuals) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("xs", "ys", "message"),
    [
        ([1, 2], [1, 2], "at least 3 points, got 2"),
        ([1, 2, 3], [1, 2], "of one length, got 3 and 2"),
        ([2, 2, 2], [1, 2, 3], "at least two different x, got only 2"),
        ([1, 2, 0], [1, 2, 3], "x must be finite and > 0, got 0"),
        ([1, 2, 3], [1, 2, math.nan], "y must be finite and > 0, got nan"),
    ],
)
def test_what_makes_no_line_is_refused(xs, ys, message):
    with pytest.raises(InputError, match=message):
        LogLine.through(xs, ys)
