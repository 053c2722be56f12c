"""Figures of sets of runs hold the numbers they were given, with units on the axes."""

import math

import numpy as np
import pytest

from batchlab.measure.runs.data_overhead import fit_growth
from batchlab.measure.runs.scaling_regimes import perfect_scaling_limit
from batchlab.measure.runs.sfo import sfo_complexity
from batchlab.viz import scaling

GRID = [2.0**k for k in range(3, 15)]


def trace(figure, name):
    (found,) = (each for each in figure.data if each.name == name)
    return found


def points(figure, name):
    found = trace(figure, name)
    return list(zip(found.x, found.y, strict=True))


def titles(figure):
    return figure.layout.xaxis.title.text, figure.layout.yaxis.title.text


def noisy(scale, runs=5):
    random = np.random.default_rng(0)
    return {b: list(100 * (1 + 256 / b) * np.exp(scale * random.standard_normal(runs))) for b in GRID}


def test_regimes_shows_the_points_the_line_and_the_two_ends():
    found = perfect_scaling_limit(noisy(0.01))
    figure = scaling.regimes(found, unit="tokens")
    assert titles(figure) == ("batch size (tokens)", "steps to the goal (updates)")
    assert points(figure, "perfect scaling") == list(zip(found.batch_sizes, found.perfect, strict=True))
    measured = trace(figure, "measured")
    assert list(measured.y) == [each.value for each in found.steps]
    assert list(measured.error_y.array) == pytest.approx([each.high - each.value for each in found.steps])
    assert list(trace(figure, "perfect scaling ends").x) == [found.perfect_until.value] * 2
    assert list(trace(figure, "no further gain").x) == [found.flat_from.value] * 2
    (band, *_) = figure.layout.shapes
    assert (band.x0, band.x1) == (found.perfect_until.low, found.perfect_until.high)


def test_ends_that_are_not_reached_and_intervals_that_are_not_bounded_are_not_drawn():
    figure = scaling.regimes(perfect_scaling_limit({b: 1e6 / b for b in GRID}))
    assert {each.name for each in figure.data} == {"perfect scaling", "measured"} and not figure.layout.shapes
    bars = trace(figure, "measured").error_y
    assert set(bars.array) == set(bars.arrayminus) == {None}


def found_sfo(scale=0.05, b_star=64):
    random, sizes = np.random.default_rng(0), GRID * 3
    steps = [1000 * b / (b - b_star / 2) if b > b_star / 2 else None for b in sizes]
    return sfo_complexity(sizes, [n and n * math.exp(scale * random.standard_normal()) for n in steps])


def test_evaluations_shows_the_law_its_band_and_the_minimum():
    found = found_sfo()
    figure = scaling.evaluations(found)
    assert titles(figure) == ("batch size (examples)", "gradient evaluations to the target (examples)")
    assert points(figure, "fit") == [(b, each.value) for b, each in zip(found.batch_sizes, found.fitted, strict=True)]
    assert points(figure, "measured") == [(b, each.value) for b, each in zip(found.batch_sizes, found.sfo, strict=True)]
    band = trace(figure, "90 % band of the fit")
    assert list(band.y[: len(found.fitted)]) == [each.high for each in found.fitted]
    assert list(trace(figure, "critical batch size, fitted").x) == [found.critical_batch.value] * 2
    assert figure.layout.shapes[0].x1 == found.critical_batch.high


def test_no_critical_batch_is_drawn_where_there_is_none():
    figure = scaling.evaluations(sfo_complexity(GRID, [1000 * b**-0.3 for b in GRID]))
    assert "critical batch size, fitted" not in {each.name for each in figure.data}
    assert all(math.isfinite(y) for each in figure.data for y in each.y)


def test_growth_shows_the_points_and_the_law_with_its_band():
    law = fit_growth([85, 151, 302, 604, 1200], [745, 955, 1394, 1889, 2533], unit="million parameters")
    predictions = [(size, law.predict(size)) for size in (50, 500, 5000)]
    figure = scaling.growth(law, predictions, unit="sequences")
    assert titles(figure) == ("million parameters", "critical batch size (sequences)")
    name = f"{law.d.value:.4g}·x^{law.beta.value:.3g}"
    assert points(figure, name) == [(size, each.value) for size, each in predictions]
    assert points(figure, "measured") == list(zip(law.sizes, law.critical_batches, strict=True))
    band = trace(figure, "interval of one more point")
    assert list(band.y[:3]) == [each.high for _, each in predictions]
    assert titles(scaling.growth(fit_growth([1, 2, 4], [1, 2, 3])))[0] == "size, in the unit given"


def test_a_band_that_is_not_bounded_leaves_the_axis_to_the_points():
    law = fit_growth([1, 2, 4], [1.0, 50.0, 2.0])
    figure = scaling.growth(law, [(size, law.predict(size)) for size in (1, 3, 100)])
    low, high = (10**end for end in figure.layout.yaxis.range)
    values = [1.0, 50.0, 2.0, *(law.predict(size).value for size in (1, 3, 100))]
    assert low == pytest.approx(min(values) / 3) and high == pytest.approx(3 * max(values))
