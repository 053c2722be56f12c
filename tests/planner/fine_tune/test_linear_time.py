"""The line of time: the authors' points, known lines, the law for `planner.cost`, and intervals at their rate."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, MicroBatchTime
from batchlab.measure.speed.step_time_law import fit_step_time
from batchlab.planner.costs.update_time import line_of
from batchlab.planner.fine_tune.calibration import calibrate
from batchlab.planner.fine_tune.linear_time import LinearTimeModel
from batchlab.planner.fine_tune.measured_batch import MeasuredBatch
from tests.planner.fine_tune import published
from tests.planner.fine_tune.published import points

ERRORS = {  # of the file's head: seen and left out; this law, "code", "power"
    "Mixtral commonsense, A40": ((0.021, 0.032), (0.055, 0.058), (0.044, 0.061)),
    "Mixtral math, A40": ((0.007, 0.029), (0.022, 0.040), None),
    "BlackMamba commonsense, A40": ((0.402, 0.448), (1.055, 1.164), (0.399, 0.442)),
    "BlackMamba math, A40": ((0.392, 0.593), (0.561, 0.667), (0.280, 0.519)),
    "Mixtral, A100-40": ((0.005, 0.035), (0.035, 0.075), None),
    "Mixtral, A100-80": ((0.047, 0.058), (0.104, 0.115), (0.066, 0.081)),
    "Mixtral, H100": ((0.168, 0.186), (0.416, 0.455), (0.336, 0.389)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_the_line_beats_the_authors_form_on_their_own_points(name):
    errors = calibrate(points(published.ALL[name])).errors
    for form, expected in zip(("linear time", "code", "power"), ERRORS[name], strict=True):
        if expected is None:
            assert form not in errors
        else:
            assert (errors[form].rmse, errors[form].left_out) == pytest.approx(expected, abs=0.5e-3)
    assert errors["linear time"].rmse < errors["code"].rmse and errors["linear time"].left_out < errors["code"].left_out


def test_sparse_alone_is_the_sheets_error():
    """Mixtral commonsense, sparse only: RMSE 0.023 by equal weights in seconds, by numpy; 0.024 by 1/t, ours."""
    sparse = [p for p in points(published.MIXTRAL_A40) if p.active < 1]
    batch, speed = np.array([(p.batch, p.speed) for p in sparse]).T
    design = np.stack([np.ones_like(batch), batch], 1)
    plain = design @ np.linalg.lstsq(design, batch / speed, rcond=None)[0]
    assert math.sqrt(np.square(batch / plain - speed).mean()) == pytest.approx(0.023, abs=0.5e-3)
    assert LinearTimeModel.fit(sparse).rmse == pytest.approx(0.0243, abs=0.5e-4)


@given(fixed=st.floats(1e-4, 10), each=st.floats(1e-4, 10), share=st.floats(0.01, 0.99), sparsity=st.floats(0.05, 0.9))
def test_an_exact_line_is_recovered(fixed, each, share, sparsity):
    def seconds(b, s):
        return fixed + b * each * (1 - share + share * s)

    some = [MeasuredBatch(b, seconds(b, s), sparsity=s) for b in (1, 2, 5, 9) for s in (1.0, sparsity)]
    fit = LinearTimeModel.fit(some)
    assert fit.sparse_share.value == pytest.approx(share, rel=1e-5, abs=1e-6)
    between = (1 + sparsity) / 2
    assert fit.predict(7, between) == pytest.approx(7 / seconds(7, between), rel=1e-7)
    law = fit.law(sparsity)
    assert law.seconds(100) == pytest.approx(seconds(100, sparsity), rel=1e-6)
    assert LinearTimeModel.from_json(fit.to_json()) == fit


def test_one_sparsity_is_the_law_of_a_step():
    """The same estimates as `fit_step_time`, and what `planner.cost` takes."""
    seconds = {1: 0.9, 2: 1.2, 4: 1.7, 8: 3.1}
    fit = LinearTimeModel.fit(list(seconds.items()))
    assert fit.law() == fit_step_time([MicroBatchTime(b, Estimate(t, t, t, "measured")) for b, t in seconds.items()])
    assert fit.coefficients.values == pytest.approx([fit.law().fixed.value, fit.law().per_example.value], rel=1e-12)
    assert line_of(fit.law(), None, None, None) == pytest.approx(fit.coefficients.values)
    wide = [MeasuredBatch(b, t, low=0.5 * t, high=2 * t) for b, t in seconds.items()]
    assert LinearTimeModel.fit(wide).law().fixed.high > fit.law().fixed.high  # the times' own noise counts


def test_two_times_without_an_interval_bound_nothing():
    law = LinearTimeModel.fit([(1, 2.0), (3, 4.0)]).law()
    assert (law.fixed.value, law.per_example.value) == pytest.approx((1.0, 1.0))
    assert law.fixed.high == math.inf and law.half.high == math.inf


def test_intervals_cover_at_their_rate():
    """1000 seeds, variance that grows as t: t0, t1 at one sparsity, C and a speed within 4 standard errors of 95 %."""
    held = np.zeros(4)
    for seed in range(1000):
        rng, some = np.random.default_rng(seed), []
        for b in (1, 2, 4, 8, 12):
            for s in (1.0, 0.25):
                t = 2.0 + 0.5 * b * (0.3 + 0.7 * s)
                some.append(MeasuredBatch(b, t + 0.05 * math.sqrt(t) * rng.normal(), sparsity=s))
        fit = LinearTimeModel.fit(some)
        law, at = fit.law(0.25), fit.estimate(8, 0.25)
        truth = ((law.fixed, 2.0), (law.per_example, 0.2375), (fit.sparse_share, 0.7), (at, 8 / (2.0 + 8 * 0.2375)))
        held += [estimate.low <= value <= estimate.high for estimate, value in truth]
    assert (abs(held / 1000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1000)).all(), held


@pytest.mark.parametrize("eps", [0.02, 0.05, 0.1, 0.3])
def test_saturation_is_the_smallest_batch_by_definition(eps):
    for fixed in (0.0, 0.1, 1.0, 20.0):
        fit = LinearTimeModel.fit([(b, fixed + 0.5 * b) for b in (1, 2, 4, 50)])
        speeds = {b: (b / (fixed + 0.5 * b), 2 * b / (fixed + b)) for b in range(1, 51)}
        brute = next((b for b, (q, twice) in speeds.items() if twice / q - 1 < eps - 1e-9), None)
        assert fit.saturation(eps) == brute


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: LinearTimeModel.fit([(4, 1.0), (4, 1.1)]),
            r"points must hold two batch sizes or more: one, 4, fits no law",
        ),
        (
            lambda: LinearTimeModel.fit([MeasuredBatch(1, 1.0, sparsity=1.0), MeasuredBatch(2, 2.0, sparsity=0.5)]),
            r"t0, t1 and C are not identified by these 2 points: vary batch and sparsity apart",
        ),
        (
            lambda: LinearTimeModel.fit(points(published.MIXTRAL_A40)).law(),
            r"sparsity must be given: the points have \[0.25, 1.0\]",
        ),
        (
            lambda: LinearTimeModel.fit(points(published.MIXTRAL_A40)).predict(4, 0.1),
            r"sparsity must lie within the fitted 0.25..1",
        ),
        (lambda: LinearTimeModel.fit([(1, 1.0), (2, 2.5)]).predict(0), r"batch must be finite and > 0, got 0"),
        (
            lambda: LinearTimeModel.fit([(4, 1.0), (8, 2.5)]).predict(1),
            r"batch must be one for which the law gives a positive time",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
