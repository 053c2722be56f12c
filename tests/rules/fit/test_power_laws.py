"""Power laws of a user's points: known laws, SciPy, their coverage, what they predict, and what they refuse."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from batchlab.core.errors import InputError
from batchlab.rules.fit import PowerLaw, joint_law, power_law

CBS = ([85, 151, 302, 604, 1200], [745.3, 955.2, 1393.7, 1888.5, 2533.4])


def noisy(count, seed, *, deviation=0.05, decades=2, slope=0.383):
    x = np.geomspace(1e9, 1e9 * 10**decades, count)
    return x, 3e3 * (x / 1e9) ** slope * np.exp(deviation * np.random.default_rng(seed).standard_normal(count))


def test_it_is_scipys_line():
    x, y = noisy(12, 0)
    law, peer = power_law(x, y, coverage=0.9), stats.linregress(np.log(x), np.log(y))
    half = stats.t.ppf(0.95, 10) * peer.stderr
    assert law.exponent.value == pytest.approx(peer.slope, rel=1e-12)
    assert (law.exponent.low, law.exponent.high) == pytest.approx((peer.slope - half, peer.slope + half), rel=1e-9)
    half = stats.t.ppf(0.95, 10) * peer.intercept_stderr
    assert math.log(law.a.value) == pytest.approx(peer.intercept, rel=1e-12)
    ends = math.exp(peer.intercept - half), math.exp(peer.intercept + half)
    assert (law.a.low, law.a.high) == pytest.approx(ends, rel=1e-9)


def test_published_critical_batches_give_the_published_law():
    """Zhang et al. 2024: 93.197·N^0.46828, N in millions; in plain counts the same law with another prefactor."""
    millions, plain = power_law(*CBS), power_law([1e6 * n for n in CBS[0]], CBS[1])
    assert millions.a.value == pytest.approx(93.197, rel=1e-3)
    assert millions.exponent.value == pytest.approx(0.46828, rel=1e-3)
    assert plain.exponent.value == pytest.approx(millions.exponent.value, rel=1e-9)
    assert plain.exponent.high == pytest.approx(millions.exponent.high, rel=1e-9)
    assert plain.value(3e8) == pytest.approx(millions.value(300), rel=1e-9)
    assert plain.at(3e9).low == pytest.approx(millions.at(3000).low, rel=1e-9)


def test_slope_errors_of_synthetic_laws_are_those_measured():
    """Power Lines' check: 5 % noise over two decades, 200 draws. Worst slope error below 0.03 at 20 points.

    The 95 % quantile is 1.96 standard errors of least squares; with 200 draws it is known to a tenth.
    """
    for count in (10, 20, 40):
        errors = []
        for seed in range(200):
            x, y = noisy(count, seed)
            errors.append(abs(power_law(x, y).exponent.value - 0.383))
        log_x = np.log(noisy(count, 0)[0])
        standard = 0.05 / math.sqrt(((log_x - log_x.mean()) ** 2).sum())
        assert np.quantile(errors, 0.95) == pytest.approx(1.96 * standard, rel=0.3)
        assert max(errors) < (0.03 if count >= 20 else 0.04)


@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_intervals_cover_at_their_rate(coverage):
    """600 draws of 8 points: exponent, value far away, and one more point there; four standard errors."""
    inside, x = np.zeros(3), np.geomspace(1e9, 1e11, 8)
    for seed in range(600):
        _, y = noisy(8, seed)
        law = power_law(x, y, coverage=coverage)
        truth = 3e3 * 1000**0.383
        new = truth * math.exp(0.05 * np.random.default_rng(10_000 + seed).standard_normal())
        mean, point = law.at(1e12), law.at(1e12, new_point=True)
        inside += [
            law.exponent.low <= 0.383 <= law.exponent.high,
            mean.low <= truth <= mean.high,
            point.low <= new <= point.high,
        ]
    assert (np.abs(inside / 600 - coverage) < 4 * math.sqrt(coverage * (1 - coverage) / 600)).all(), inside / 600


@given(st.lists(st.floats(0.5, 2.0), min_size=5, max_size=9), st.integers(1, 3))
def test_what_is_held_out_is_a_refit_without_it(wobble, repeats):
    x = np.repeat(np.geomspace(1.0, 300.0, len(wobble)), repeats)
    y = x**0.7 * np.repeat(wobble, repeats) ** 0.1 * np.tile([1.0, 1.01, 0.98][:repeats], len(wobble))
    law = power_law(x, y, widest=10)
    for value in np.unique(x):
        rest = x != value
        slope, at = np.polyfit(np.log(x[rest]), np.log(y[rest]), 1)
        for place in np.flatnonzero(~rest):
            wanted = math.log(y[place]) - at - slope * math.log(value)
            assert law.held_out[place] == pytest.approx(wanted, abs=1e-9)
    assert law.leave_one_out == pytest.approx(np.mean(np.abs(law.held_out)))
    assert law.residuals == pytest.approx([math.log(b / law.value(a)) for a, b in zip(x, y, strict=True)], abs=1e-12)


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_units_change_nothing_but_the_prefactor(x_unit, y_unit):
    x, y = noisy(6, 3)
    law, other = power_law(x, y), power_law(x_unit * x, y_unit * y)
    assert other.exponent.value == pytest.approx(law.exponent.value, rel=1e-9)
    assert other.exponent.low == pytest.approx(law.exponent.low, rel=1e-9)
    assert other.value(x_unit * 3e10) == pytest.approx(y_unit * law.value(3e10), rel=1e-9)
    assert other.held_out == pytest.approx(law.held_out, abs=1e-9)


def test_it_says_where_it_extrapolates_and_reads_back():
    law = power_law([1, 10, 100], [5, 6, 7.5], x_name="tokens", y_name="batch_tokens")
    assert law.outside(10) == law.outside(100) == ""
    assert law.outside(101) == "tokens of 101 lie beyond 1 to 100, which the law was fitted over"
    assert PowerLaw.from_json(law.to_json()) == law
    with pytest.raises(InputError, match="tokens must be finite and > 0, got 0"):
        law.value(0)


def test_a_law_beyond_floats_is_infinite_and_not_an_error():
    steep = power_law([1.0, 10.0, 100.0], [1.0, 1e100, 1e200])
    assert steep.value(1e3) == pytest.approx(1e300) and steep.value(1e4) == steep.at(1e4).high == math.inf


def test_a_span_that_tells_no_exponent_is_refused_with_the_one_that_would():
    """The interval's width falls as 1/ln span: at the span named it is as wide as allowed."""
    wobble = np.exp([0.1, -0.1, 0.05, -0.05])
    short = np.geomspace(1, 1.3, 4)
    with pytest.raises(InputError, match=r"tokens spans too little for a power law: over a factor of 1.3, with ") as e:
        power_law(short, short**0.4 * wobble, x_name="tokens", y_name="batch_tokens")
    assert "batch_tokens scattered by 11 %, the exponent's 95 % interval is [" in str(e.value)
    wanted = float(str(e.value).split("span a factor of ")[1].split()[0])
    for factor, passes in ((1.01, True), (0.97, False)):
        x = np.geomspace(1, wanted**factor, 4)
        if passes:
            found = power_law(x, x**0.4 * wobble).exponent
            assert found.high - found.low == pytest.approx(1, rel=0.02)
        else:
            with pytest.raises(InputError, match="wider than 1"):
                power_law(x, x**0.4 * wobble)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        ([1, 2], [1, 2], {}, "tokens must hold at least 3 different values for a power law, got 2"),
        ([], [], {}, "tokens must hold at least 3 different values for a power law, got 0"),
        ([1, 2, 2 * (1 + 1e-12), 2], [1, 2, 3, 4], {}, "at least 3 different values for a power law, got 2"),
        ([1, 2, 3], [1, 2], {}, "tokens and y must be of one length, got 3 and 2"),
        ([1, 2, math.nan], [1, 2, 3], {}, "tokens must be finite and > 0, got nan"),
        ([1, 2, 3], [1, 2, 0], {}, "y must be finite and > 0, got 0"),
        ([1, 2, 3], [1, 2, "x"], {}, "y must be finite and > 0, got 'x'"),
        (7, [1, 2, 3], {}, "tokens must be a sequence of numbers, got 7"),
        (np.ones((3, 2)), [1, 2, 3], {}, "tokens must be a sequence of numbers"),
        ([1, 2, 3], [1, 2, 3], {"coverage": 95}, "coverage must lie in .0, 1., got 95"),
        ([1, 2, 3], [1, 2, 3], {"widest": 0}, "widest must be finite and > 0, got 0"),
    ],
)
def test_bad_points_are_named(x, y, options, message):
    with pytest.raises(InputError, match=message):
        power_law(x, y, x_name="tokens", **options)


def test_a_joint_law_is_least_squares_with_students_intervals():
    rng = np.random.default_rng(0)
    n, m = np.tile(np.geomspace(1e7, 1e9, 6), 4), np.repeat([1.0, 2.0, 4.0, 8.0], 6)
    y = 0.007 * n**0.47 * m**0.34 * np.exp(0.1 * rng.standard_normal(24))
    law = joint_law(n, m, y, coverage=0.9)
    design = np.stack([np.ones(24), np.log(n), np.log(m)], 1)
    constants, (error,), *_ = np.linalg.lstsq(design, np.log(y))
    half = stats.t.ppf(0.95, 21) * np.sqrt(error / 21 * np.diag(np.linalg.inv(design.T @ design)))
    assert (math.log(law.A.value), law.alpha.value, law.beta.value) == pytest.approx(constants, rel=1e-9)
    assert law.alpha.high - law.alpha.value == pytest.approx(half[1], rel=1e-6)
    assert law.beta.value - law.beta.low == pytest.approx(half[2], rel=1e-6)
    assert math.log(law.A.high / law.A.value) == pytest.approx(half[0], rel=1e-6)
    rest = n < n.max()
    without = joint_law(n[rest], m[rest], y[rest])
    wanted = [math.log(y[i] / without.value(params=n[i], replicas=m[i])) for i in np.flatnonzero(~rest)]
    assert np.array(law.held_out)[~rest] == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "m", "message"),
    [
        (
            [1e8, 2e8, 4e8, 8e8],
            [2, 2, 2, 2],
            "replicas must hold at least two different values for a joint law, got only 2",
        ),
        ([1e8, 2e8, 4e8, 8e8], [1, 2, 4, 8], "params and replicas must not move together"),
        ([1e8, 1e8, 4e8], [1, 2, 4], "y must hold at least 4 points for a joint law, got 3"),
        ([1e8, 1e8, 4e8, 4e8], [1, 2, 0, 8], "replicas must be finite and > 0, got 0"),
    ],
)
def test_a_joint_law_that_cannot_be_told_is_refused(n, m, message):
    with pytest.raises(InputError, match=message):
        joint_law(n, m, [1.0, 2.0, 3.0, 4.0][: len(n)])
