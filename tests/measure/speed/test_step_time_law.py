"""t(b) = t₀ + t₁·b from exact times, from noisy ones at the stated coverage, and where the law does not hold."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, MicroBatchTime
from batchlab.measure.order import median_interval
from batchlab.measure.speed.step_time_law import (
    StepTimeLaw,
    bottleneck,
    fit_step_time,
    saturation,
    saturation_interval,
)

SIZES = (1, 2, 4, 8, 16, 32, 64)


def exact(sizes, seconds):
    return [MicroBatchTime(b, Estimate(t, t, t, "given")) for b, t in zip(sizes, seconds, strict=True)]


@given(
    fixed=st.floats(1e-6, 10.0),
    each=st.floats(1e-6, 10.0),
    sizes=st.lists(st.integers(1, 5000), min_size=2, max_size=8, unique=True),
)
def test_an_exact_line_is_recovered(fixed, each, sizes):
    assume(each * min(sizes) > 1e-6 * fixed and fixed > 1e-6 * each * max(sizes))
    law = fit_step_time(exact(sizes, [fixed + each * b for b in sizes]))
    assert law.fixed.value == pytest.approx(fixed, rel=1e-6)
    assert law.per_example.value == pytest.approx(each, rel=1e-6)
    assert law.half.value == pytest.approx(fixed / each, rel=1e-6)
    assert StepTimeLaw.from_json(law.to_json()) == law


def test_the_saturation_of_a_fine_grid_is_the_closed_form():
    """5 ms + 1 ms·b: half the speed at 5; 95 % of the limit at 95, and of the best of 1..1000 where b/(b + 5) says."""
    points = exact(range(1, 1001), [0.005 + 0.001 * b for b in range(1, 1001)])
    law = fit_step_time(points)
    assert law.half.value == pytest.approx(5.0, rel=1e-9) and law.size_for() == pytest.approx(95.0, rel=1e-9)
    assert law.overhead(5) == pytest.approx(0.5) and law.size_for(0.5) == pytest.approx(5.0)
    best = 0.95 * 1000 / 1005
    assert saturation(points) == math.ceil(5 * best / (1 - best))


def noisy(rng, seconds, repeats, spread):
    return [
        MicroBatchTime(b, median_interval(list(t * np.exp(spread * rng.normal(size=repeats))), method="drawn"))
        for b, t in zip(SIZES, seconds, strict=True)
    ]


def test_the_intervals_cover_at_their_stated_rate():
    """300 seeds, log-normal noise of 10 %, 20 repeats: the wider of two intervals covers more than 95 %.

    Binomial(300, 0.95) lies in 273..297 with probability 0.998; at most half of what it says would cover under 80 %.
    """
    truth = {"fixed": 0.005, "per_example": 0.001, "half": 5.0}
    covered, narrow = dict.fromkeys(truth, 0), 0
    for seed in range(300):
        law = fit_step_time(noisy(np.random.default_rng(seed), [0.005 + 0.001 * b for b in SIZES], 20, 0.1))
        for name, value in truth.items():
            found = getattr(law, name)
            covered[name] += found.low <= value <= found.high
        half = law.half
        narrow += half.value - (half.value - half.low) / 2.5 <= 5.0 <= half.value + (half.high - half.value) / 2.5
    assert min(covered.values()) >= 273 and narrow < 273


def test_where_the_law_bends_the_interval_says_so():
    """Time that grows as b^1.3: the noise is nil, and yet the interval of the fixed time is as wide as its value."""
    law = fit_step_time(exact(SIZES, [b**1.3 for b in SIZES]))
    assert law.fixed.value < 0
    assert law.fixed.high - law.fixed.low > 0.5 * abs(law.fixed.value)


def test_what_bounds_nothing_is_said_to():
    one = fit_step_time(exact([4], [0.1]))
    assert math.isnan(one.fixed.value) and one.fixed.high == math.inf
    assert one.half.method == "undefined: 1 sizes, a line needs 2"
    flat = fit_step_time(exact([1, 2, 4], [0.1, 0.1, 0.1 - 1e-6]))
    assert math.isnan(flat.half.value) and flat.half.method.startswith("undefined: time does not grow with size")
    single = [MicroBatchTime(b, median_interval([0.01 * b + 0.1])) for b in (1, 2, 4)]
    assert fit_step_time(single).half.high == math.inf
    two = fit_step_time(exact([1, 4], [2.0, 5.0]))
    assert two.half.method == "least squares, 2 sizes: whether the law holds is not known"


def test_a_sweep_that_is_not_monotone_saturates_within_its_noise():
    """Speeds 1, 1.5, 1.45, 1.55 with 4 % noise: 2 may be the best; with 0.1 % noise it is only within 5 % of it."""
    speeds = (1.0, 1.5, 1.45, 1.55)
    wide, sharp = (
        [
            MicroBatchTime(b, Estimate(b / v, b / v * (1 - e), b / v * (1 + e), "given"))
            for b, v in zip((1, 2, 4, 8), speeds)
        ]
        for e in (0.04, 1e-3)
    )
    assert (saturation_interval(sharp).value, saturation_interval(sharp).high) == (2.0, 2.0)
    found = saturation_interval(wide)
    assert (found.low, found.value, found.high) == (2.0, 2.0, math.inf)
    assert found.method == "95% of the best of 4 sizes"


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"overhead": 0.51, "communication": 0.9, "loading": 0.9, "memory": True}, "launch/overhead"),
        ({"overhead": 0.5, "communication": 0.31, "loading": 0.9, "memory": True}, "communication"),
        ({"overhead": 0.5, "communication": 0.3, "loading": 0.31, "memory": True}, "data"),
        ({"overhead": 0.5, "communication": None, "loading": 0.3, "memory": True}, "memory capacity"),
        ({"overhead": math.nan}, "compute"),
    ],
)
def test_the_bottleneck_is_the_first_that_applies(shares, expected):
    assert bottleneck(**shares) == expected


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"share must lie in \(0, 1\), got 1.0"):
        fit_step_time(exact([1, 2], [1.0, 2.0])).size_for(1.0)
    with pytest.raises(InputError, match=r"coverage must lie in \(0, 1\), got 1.0"):
        fit_step_time(exact([1, 2], [1.0, 2.0]), coverage=1.0)
    with pytest.raises(InputError, match=r"seconds must be finite and > 0, got \[1.0, nan\]"):
        fit_step_time([*exact([1], [1.0]), MicroBatchTime(2, Estimate(math.nan, 0.0, 1.0, "given"))])
