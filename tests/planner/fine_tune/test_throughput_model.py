"""The logarithm against the authors' points, numpy's least squares, known laws with noise, and what cannot be told."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.planner.fine_tune.measured_batch import MeasuredBatch
from batchlab.planner.fine_tune.throughput_model import ThroughputModel
from tests.planner.fine_tune import published
from tests.planner.fine_tune.published import points

MIXTRAL = points(published.MIXTRAL_A40)
REFITS = {  # C3, a, b, RMSE: the sheet's table
    "Mixtral commonsense, A40": (1.8, 0.3169, 0.2808, 0.055),
    "Mixtral math, A40": (1.8, 0.3026, 0.2216, 0.022),
    "BlackMamba commonsense, A40": (2.5, 3.936, 2.344, 1.055),
    "BlackMamba math, A40": (2.5, 2.539, 2.499, 0.561),
    "Mixtral, A100-40": (1.8, 0.4106, 0.2918, 0.035),
    "Mixtral, A100-80": (1.8, 0.5068, 0.3532, 0.104),
    "Mixtral, H100": (1.8, 0.5626, 0.6164, 0.416),
}


@pytest.mark.parametrize("name", REFITS)
def test_every_refit_of_the_table(name):
    """To the last printed place, and numpy's own least squares to 1e-9."""
    c3, a, b, rmse = REFITS[name]
    some = points(published.ALL[name])
    fit = ThroughputModel.fit(some, c3=c3)
    place = 0.5e-4 if a < 1 else 0.5e-3
    assert fit.a.value == pytest.approx(a, abs=place) and fit.b.value == pytest.approx(b, abs=place)
    assert fit.rmse == pytest.approx(rmse, abs=0.5e-3)
    x = np.array([math.log(p.batch) / (p.active * c3) for p in some])
    expected = np.linalg.lstsq(np.stack([np.ones_like(x), x], 1), [p.speed for p in some], rcond=None)[0]
    assert [fit.a.value, fit.b.value] == pytest.approx(expected.tolist(), rel=1e-9)


def test_the_other_forms_on_mixtral():
    """RMSE 0.182 shifted, 0.078 without sparsity; a, b, g and RMSE 0.286, 0.329, 0.483, 0.044 with its power fitted."""
    assert ThroughputModel.fit(MIXTRAL, form="shift", c3=1.8).rmse == pytest.approx(0.182, abs=0.5e-3)
    blind = [MeasuredBatch(p.batch, p.seconds) for p in MIXTRAL]
    assert ThroughputModel.fit(blind).rmse == pytest.approx(0.078, abs=0.5e-3)
    power = ThroughputModel.fit(MIXTRAL, form="power")
    found = (power.a.value, power.b.value, power.exponent.value, power.rmse)
    assert found == pytest.approx((0.286, 0.329, 0.483, 0.044), abs=0.5e-3)


def test_speed_grows_as_the_authors_say():
    """Mixtral commonsense, sparse: 1.92 times from batch 1 to 2, 4.85 from 1 to 8."""
    speeds = published.MIXTRAL_A40[published.SPARSE]
    assert (round(speeds[2] / speeds[1], 2), round(speeds[8] / speeds[1], 2)) == (1.92, 4.85)


@pytest.mark.parametrize("form", ["code", "shift"])
def test_c3_is_not_identifiable(form):
    """Any C3 gives the same curve and error: 0.5, 1.8, 5; asking to fit it is refused."""
    fits = [ThroughputModel.fit(MIXTRAL, form=form, c3=c3) for c3 in (0.5, 1.8, 5.0)]
    for fit in fits[1:]:
        assert fit.rmse == pytest.approx(fits[0].rmse, rel=1e-12)
        for batch, sparsity in ((1, 1.0), (3, 0.25), (7, 0.5)):
            assert fit.predict(batch, sparsity) == pytest.approx(fits[0].predict(batch, sparsity), rel=1e-10)
    assert fits[0].coefficients.values != pytest.approx(fits[1].coefficients.values, rel=0.1)
    with pytest.raises(InputError, match=r"C3 is not identifiable: every C3 gives the same curve"):
        ThroughputModel.fit(MIXTRAL, form=form, c3=None)


def test_form_code_is_the_speed_at_batch_one_and_shift_is_not():
    code, shift = (ThroughputModel.fit(MIXTRAL, form=form, c3=1.8) for form in ("code", "shift"))
    for sparsity in (0.25, 1.0):
        assert code.predict(1, sparsity) == pytest.approx(code.a.value, rel=1e-12)
        assert abs(shift.predict(1, sparsity) - shift.a.value) > 0.05


def law(g, noise=None):
    """Q = 0.3 + 0.33·ln(B)/S^g on 4 dense and 12 sparse batches."""
    some = [(b, 1.0) for b in (1, 2, 3, 4)] + [(b, 0.25) for b in range(1, 13)]
    scale = np.ones(len(some)) if noise is None else 1 + 0.02 * noise.normal(size=len(some))
    return [
        MeasuredBatch.at_speed(b, (0.3 + 0.33 * math.log(b) / s**g) * e, sparsity=s)
        for (b, s), e in zip(some, scale, strict=True)
    ]


@given(g=st.floats(0.0, 1.0))
def test_power_recovers_its_exponent(g):
    fit = ThroughputModel.fit(law(g), form="power")
    assert fit.exponent.value == pytest.approx(g, abs=1e-6)
    assert (fit.a.value, fit.b.value) == pytest.approx((0.3, 0.33), rel=1e-5)


def test_power_recovers_its_exponent_under_noise():
    """2 % noise, 20 seeds: within 0.12, as the sheet measured."""
    for seed in range(20):
        fit = ThroughputModel.fit(law(0.5, np.random.default_rng(seed)), form="power")
        assert abs(fit.exponent.value - 0.5) < 0.12, (seed, fit.exponent)


@pytest.mark.parametrize("form", ["code", "shift", "power"])
def test_intervals_cover_at_their_rate(form):
    """1000 seeds, errors of one size: a, b and a predicted speed within 4 standard errors of 95 %, g's profile too.

    An interval of half the width would cover 67 %.
    """
    exponent = {"code": 1.0, "shift": 0.0, "power": 0.5}[form]
    held = dict.fromkeys(("a", "b", "speed", "g"), 0)
    some = [(b, s) for b in (1, 2, 3, 4, 6, 8) for s in (1.0, 0.25)]
    shift = [math.log(s) if form == "shift" else 0.0 for _, s in some]
    truth = np.array([1.0 + 0.5 * (math.log(b) - c) / s**exponent for (b, s), c in zip(some, shift, strict=True)])
    for seed in range(1000):
        drawn = truth + 0.05 * np.random.default_rng(seed).normal(size=len(some))
        fit = ThroughputModel.fit(
            [MeasuredBatch.at_speed(b, q, sparsity=s) for (b, s), q in zip(some, drawn, strict=True)], form=form
        )
        at = fit.estimate(4, 0.25)
        held["a"] += fit.a.low <= 1.0 <= fit.a.high
        held["b"] += fit.b.low <= 0.5 <= fit.b.high
        held["speed"] += at.low <= truth[some.index((4, 0.25))] <= at.high
        held["g"] += fit.exponent is None or fit.exponent.low <= 0.5 <= fit.exponent.high
    margin = 4 * math.sqrt(0.95 * 0.05 * 1000)
    names = ("a", "b", "speed", "g") if form == "power" else ("a", "b", "speed")
    for name in names:
        assert abs(held[name] - 950) < margin, held


def test_what_does_not_identify_the_law_is_refused():
    """The exponent needs a batch above 1 at two sparsities: Mixtral math has dense points at batch 1 alone."""
    sparse = [p for p in MIXTRAL if p.active < 1]
    for some in (sparse, points(published.MIXTRAL_MATH_A40), points(published.MIXTRAL_A100_40)):
        with pytest.raises(InputError, match=r"g is not identified: measure batches above 1 at two sparsities"):
            ThroughputModel.fit(some, form="power")
    with pytest.raises(InputError, match=r"points must hold two batch sizes or more: one, 4, fits no law"):
        ThroughputModel.fit([(4, 1.0), (4, 1.1), (4, 0.9)])
    with pytest.raises(InputError, match=r"a and b are not identified: all points have the same ln\(B\) over sparsity"):
        ThroughputModel.fit([MeasuredBatch(4, 1.0, sparsity=1.0), MeasuredBatch(2, 1.0, sparsity=0.5)])


def test_it_is_not_asked_far_from_its_points():
    fit = ThroughputModel.fit(MIXTRAL)
    assert fit.predict(16, 0.25) > fit.predict(8, 0.25)
    for batch in (0.5, 17, 1e9):
        with pytest.raises(InputError, match=r"batch must lie in 1..16, up to twice the largest fitted one, got"):
            fit.predict(batch, 0.25)
    with pytest.raises(InputError, match=r"sparsity must lie within the fitted 0.25..1, got 0.125"):
        fit.predict(4, 0.125)
    with pytest.raises(InputError, match=r"sparsity must lie in \(0, 1\], the share of experts at work, got 2"):
        fit.predict(4, 2)


@pytest.mark.parametrize("form", ["code", "shift", "power"])
@pytest.mark.parametrize("name", ["BlackMamba commonsense, A40", "Mixtral, H100"])
@pytest.mark.parametrize("eps", [0.05, 0.1, 0.2, 0.5])
def test_saturation_is_the_smallest_batch_by_definition(form, name, eps):
    fit = ThroughputModel.fit(points(published.ALL[name]), form=form)
    for sparsity in (0.25, 1.0):
        speeds = {b: (fit.speed(b, sparsity), fit.speed(2 * b, sparsity)) for b in range(1, int(fit.largest_batch) + 1)}
        brute = next((b for b, (q, twice) in speeds.items() if q > 0 and twice / q - 1 < eps), None)
        assert fit.saturation(eps, sparsity) == brute


def test_two_points_have_no_error_and_no_bounds():
    fit = ThroughputModel.fit([(1, 1.0), (4, 2.0)])
    assert fit.rmse == pytest.approx(0.0, abs=1e-12) and fit.a.value == pytest.approx(1.0)
    assert (fit.a.low, fit.a.high) == (-math.inf, math.inf)
    assert ThroughputModel.from_json(fit.to_json()) == fit


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ThroughputModel.fit(MIXTRAL, form="log"),
            r"form must be one of \['code', 'shift', 'power'\], got 'log'",
        ),
        (lambda: ThroughputModel.fit(MIXTRAL, c3=0.0), r"c3 must be finite and > 0, got 0.0"),
        (lambda: ThroughputModel.fit(MIXTRAL, coverage=95), r"coverage must lie in \(0, 1\), got 95"),
        (lambda: ThroughputModel.fit([]), r"points must be one or more, each with its seconds, got 0"),
        (
            lambda: ThroughputModel.fit([MeasuredBatch(1), MeasuredBatch(2)]),
            r"points must be one or more, each with its seconds",
        ),
        (lambda: ThroughputModel.fit(3), r"points must be a sequence of MeasuredBatch or of tuples, got 3"),
        (lambda: ThroughputModel.fit([(1,), (2,)]), r"a point must be MeasuredBatch or \(batch, seconds.*got \(1,\)"),
        (lambda: ThroughputModel.fit([(1, 1.0), (2, math.nan)]), r"seconds must be finite and > 0, got nan"),
        (lambda: ThroughputModel.fit([(0, 1.0), (2, 1.0)]), r"batch must be finite and > 0, got 0"),
        (lambda: ThroughputModel.fit([(1, 1, None, 8), (2, 1, None, 9)]), r"points must be of one sequence_length"),
        (lambda: ThroughputModel.fit(MIXTRAL).saturation(0.0), r"eps must lie in \(0, 1\), got 0.0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
