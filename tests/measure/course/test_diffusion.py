"""Both laws from exact points; the slope's interval on paths whose errors are known; where nothing can be said."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.measure.course.diffusion import Diffusion, fit_diffusion, mean_slope

UPDATES = [t for t in range(1, 1001) if t == 1 or math.floor(20 * math.log10(t)) > math.floor(20 * math.log10(t - 1))]


@given(a=st.floats(0.1, 10.0), b=st.floats(0.01, 10.0))
def test_a_logarithm_is_recovered(a, b):
    law = fit_diffusion([(t, a + b * math.log(t)) for t in UPDATES])
    assert law.slope.value == pytest.approx(b, rel=1e-9) and law.intercept == pytest.approx(a, rel=1e-6, abs=1e-9)
    assert law.slope.high - law.slope.low < 1e-6 * b and law.r2 == pytest.approx(1.0)
    assert law.better == "logarithm" and law.power_r2 < 1 - 1e-6
    assert Diffusion.from_json(law.to_json()) == law


@given(scale=st.floats(0.01, 10.0), exponent=st.floats(0.05, 1.5))
def test_a_power_is_recovered(scale, exponent):
    law = fit_diffusion([(t, scale * t**exponent) for t in UPDATES])
    assert law.exponent.value == pytest.approx(exponent, rel=1e-5)
    assert law.scale == pytest.approx(scale, rel=1e-4) and law.power_r2 == pytest.approx(1.0)
    assert law.exponent.high - law.exponent.low < 1e-4
    assert law.better == "power"


def test_only_the_range_asked_for_is_fitted():
    points = [(t, math.log(t) if t <= 100 else 50.0) for t in UPDATES]
    law = fit_diffusion(points, low=3, high=100)
    assert (law.low, law.high) == (3, 100) and law.slope.value == pytest.approx(1.0)
    assert law.points == sum(3 <= t <= 100 for t in UPDATES)
    assert fit_diffusion(points, low=3).slope.value > 5


def path(rng, kind):
    """Errors along ln t: a random walk, one that forgets within half a factor e, or none that remembers."""
    steps = np.diff(np.log(UPDATES))
    if kind == "white":
        return 0.1 * rng.normal(size=len(UPDATES))
    if kind == "walk":
        return 0.2 * np.concatenate([[0.0], np.cumsum(rng.normal(size=len(steps)) * np.sqrt(steps))])
    errors = [rng.normal()]
    for step in steps:
        kept = math.exp(-step / 0.5)
        errors.append(kept * errors[-1] + math.sqrt(1 - kept**2) * rng.normal())
    return 0.2 * np.array(errors)


@pytest.mark.parametrize("kind", ["walk", "forgets", "white"])
def test_the_slopes_interval_covers_though_the_errors_are_a_path(kind):
    """300 seeds: Binomial(300, 0.95) lies above 272 with probability 0.999; a third of the width would lie below.

    The interval of least squares, as if the errors were independent, covers a walk at 18 %.
    """
    s, rng = np.log(UPDATES), np.random.default_rng(0)
    covered = narrow = naive = 0
    for _ in range(300):
        d = 10 + 3 * s + path(rng, kind)
        slope = fit_diffusion(list(zip(UPDATES, d, strict=True)), low=3).slope
        covered += slope.low <= 3 <= slope.high
        narrow += abs(slope.value - 3) <= (slope.high - slope.value) / 3
        kept = np.array(UPDATES) >= 3
        (b, _), covariance = np.polyfit(s[kept], d[kept], 1, cov=True)
        naive += abs(b - 3) <= 2 * math.sqrt(covariance[0, 0])
    assert covered >= 273
    if kind == "walk":
        assert narrow < 273 and naive < 100


def test_seeds_give_the_interval_over_runs():
    rng = np.random.default_rng(1)
    fits = [fit_diffusion([(t, 10 + b * math.log(t)) for t in UPDATES]) for b in 2 + 0.1 * rng.normal(size=5)]
    slopes = [fit.slope.value for fit in fits]
    found = mean_slope(fits)
    assert found.value == pytest.approx(np.mean(slopes))
    assert found.high - found.value == pytest.approx(2.7764451 * np.std(slopes, ddof=1) / math.sqrt(5), rel=1e-6)
    assert found.method == "mean slope of 5 runs"
    assert mean_slope(fits[:1]).method == "undefined: 1 runs with a slope, an interval over runs needs 2"


def test_what_cannot_be_fitted_is_undefined_and_says_why():
    few = fit_diffusion([(1, 1.0), (2, 2.0), (4, 3.0)], low=2)
    assert math.isnan(few.slope.value) and few.slope.method == "undefined: 2 points from 2 on, a fit needs 6"
    assert few.better == "" and Diffusion.from_json(few.to_json()).points == 2
    still = fit_diffusion([(t, 0.0) for t in UPDATES])
    assert still.slope.value == 0.0 and math.isnan(still.r2) and still.better == ""
    assert still.exponent.method == "undefined: a power law needs distances > 0"
    crowded = fit_diffusion([(1, 1.0), *((1000 + i, 2.0 + i) for i in range(5))])
    assert crowded.slope.high == math.inf and "unbounded: the points make only" in crowded.slope.method


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ([(1, 1.0)], {"coverage": 1.0}, r"coverage must lie in \(0, 1\), got 1.0"),
        ([(1, 1.0)], {"low": 0}, "low and high must satisfy 0 < low < high, got low=0, high=None"),
        ([(1, 1.0)], {"low": 5, "high": 5}, "low and high must satisfy 0 < low < high, got low=5, high=5"),
        ([(1, math.nan)], {}, "points must be pairs of a finite t > 0 and a finite distance >= 0"),
        ([(1, -1.0)], {}, "points must be pairs of"),
    ],
)
def test_bad_input_is_named(points, options, message):
    with pytest.raises(InputError, match=message):
        fit_diffusion(points, **options)
