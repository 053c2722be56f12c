"""Figures hold the numbers they were given, with units on the axes, spread on the points, and nothing of their own."""

import math

import pytest

from batchlab.core.facts import Estimate, MicroBatchTime
from batchlab.measure.course.diffusion import fit_diffusion
from batchlab.measure.course.learning_rate import range_test
from batchlab.measure.noise.signal_to_noise import Gsnr, LayerGsnr
from batchlab.measure.speed.step_time import StepShares, Throughput
from batchlab.measure.speed.step_time_law import fit_step_time, saturation_interval
from batchlab.viz import diagnostics


def trace(figure, name):
    (found,) = (each for each in figure.data if each.name and each.name.startswith(name))
    return found


def points(figure, name):
    found = trace(figure, name)
    return list(zip(found.x, found.y, strict=True))


def titles(figure):
    return figure.layout.xaxis.title.text, figure.layout.yaxis.title.text


COURSE = [(t, 1 + 2 * math.log(t)) for t in (1, 2, 4, 8, 16, 32, 64, 128, 256)]


def test_a_distance_is_drawn_with_both_laws_over_the_range_fitted():
    figure = diagnostics.weight_distance(COURSE, fit_diffusion(COURSE, low=2, high=128))
    assert points(figure, "measured") == COURSE
    drawn = points(figure, "a + b·ln t, b = 2, R² 1.000")
    assert [t for t, _ in drawn] == [2, 4, 8, 16, 32, 64, 128]
    assert [d for _, d in drawn] == pytest.approx([d for t, d in COURSE if 2 <= t <= 128])
    assert len(points(figure, "c·t^α")) == 7
    assert titles(figure) == ("updates", "distance from the first weights")
    assert figure.layout.xaxis.type == "log"
    assert len(diagnostics.weight_distance(COURSE).data) == 1
    assert len(diagnostics.weight_distance(COURSE, fit_diffusion(COURSE, low=100)).data) == 1


def layer(name, quantiles, unbiased=1.0):
    return LayerGsnr(name, 10, 2.0, unbiased, quantiles, 0.0, 0.0, 0.5)


def test_the_ratio_of_each_layer_is_drawn_by_its_quantiles():
    layers = (
        layer("<b>first</b>", (0.1, 0.2, 0.5, 1.0, 2.0)),
        layer("second", (0.0, 0.1, 0.3, 0.6, math.inf), -0.1),
        layer("lost", (math.nan,) * 5, math.nan),
    )
    figure = diagnostics.signal_to_noise(Gsnr(layers, layer("", ()), 8, 16.0))
    wide, middle = trace(figure, "5 to 95 %"), trace(figure, "25 to 75 %")
    assert list(wide.x) == [0.1, 2.0, None, 0.05, 4.0, None]  # 0 and infinity end at the edges
    assert list(middle.x) == [0.2, 1.0, None, 0.1, 0.6, None]
    assert points(figure, "median")[:2] == [(0.5, "&lt;b&gt;first&lt;/b&gt;"), (0.3, "second")]
    assert [x for x, _ in points(figure, "mean, unbiased")] == [1.0, None, None]
    assert list(figure.layout.yaxis.categoryarray) == ["lost", "second", "&lt;b&gt;first&lt;/b&gt;"]
    assert titles(figure)[0] == "gradient signal-to-noise ratio of a group of 16 examples"
    each = diagnostics.signal_to_noise(Gsnr(layers, layer("", ()), 8, 16.0).per_sample())
    assert titles(each)[0] == "gradient signal-to-noise ratio of one example"


def ramped(**options):
    feed, valid = iter([4.0, 3.0, 1.0, 2.0, 30.0]), iter([5.0, 3.5, 2.0, 3.0, 30.0])
    validate = (lambda: next(valid)) if options.pop("valid", False) else None
    return range_test(lambda _: next(feed), low=1e-2, high=1e2, steps=5, smoothing=1.0, validate=validate, **options)


def test_a_range_test_is_drawn_with_its_readings():
    found = ramped(valid=True)
    figure = diagnostics.range_test(found, found.cycle())
    assert points(figure, "training, each step") == list(zip(found.learning_rates, found.losses, strict=True))
    assert [y for _, y in points(figure, "validation, smoothed")] == list(found.validation)
    assert trace(figure, "cycle's largest rate").x[0] == found.minimum == pytest.approx(1.0)
    assert trace(figure, "cycle's least rate").x[0] == pytest.approx(0.1)
    assert trace(figure, "diverged").x[0] == found.divergence
    assert trace(figure, "falls fastest").x[0] == found.steepest
    assert (figure.layout.shapes[0].x0, figure.layout.shapes[0].x1) == (pytest.approx(0.1), pytest.approx(1.0))
    assert tuple(figure.layout.yaxis.range) == (0.0, 7.5)  # what came after it diverged does not set the height
    assert titles(figure) == ("learning rate", "loss (the job's own unit)")
    bare = diagnostics.range_test(ramped())
    assert trace(bare, "least").x[0] == pytest.approx(1.0) and not bare.layout.shapes
    assert [y for _, y in points(bare, "training, smoothed")] == [4.0, 3.0, 1.0, 2.0, 30.0]
    assert diagnostics.range_test(ramped(spacing="linear")).layout.xaxis.type != "log"


HELD = {1: "launch/overhead", 4: "memory capacity", 16: "compute"}


def speeds(communication=None, tight=None):
    times = {1: 7.0, 4: 10.0, 16: 22.0}
    exact = [MicroBatchTime(b, Estimate(t, t, t, "given")) for b, t in times.items()]
    steps = tuple(
        StepShares(
            b, Estimate(t, t, t, ""), Estimate(8 * b / t, 0.1 * b, 9.0 * b, ""), 0.2, 0.1, communication, 0.5, HELD[b]
        )
        for b, t in times.items()
    )
    whole = Estimate(1.0, 1.0, 1.0, "given")
    law = fit_step_time(exact)
    return Throughput(tuple(exact), whole, whole, 4, saturation_interval(exact), steps, law, tight, "token", 8.0)


def test_throughput_is_drawn_with_its_law_and_where_it_saturates():
    figure = diagnostics.throughput(speeds(tight=64))
    assert points(figure, "measured") == [(1, 8 / 7), (4, 3.2), (16, 128 / 22)]
    assert list(trace(figure, "measured").error_y.array) == pytest.approx([9 - 8 / 7, 36 - 3.2, 144 - 128 / 22])
    law = points(figure, "t₀ + t₁·b: half the speed at 6")
    assert [y for _, y in law] == pytest.approx([8 / 7, 3.2, 128 / 22])
    assert trace(figure, "95 % of the best").x[0] == 16 and trace(figure, "out of memory").x[0] == 64
    assert titles(figure) == ("micro-batch (examples)", "tokens per second")


def test_the_shares_of_a_step_add_up():
    figure = diagnostics.step_shares(speeds())
    bars = [each for each in figure.data if each.type == "bar"]
    assert [bar.name for bar in bars] == ["forward and backward", "loading", "update"]
    assert [sum(values) for values in zip(*(bar.y for bar in bars), strict=True)] == pytest.approx([100.0] * 3)
    spoken = diagnostics.step_shares(speeds(communication=0.4))
    assert list(trace(spoken, "communication").y) == pytest.approx([40.0] * 3)
    assert list(trace(spoken, "forward").y) == pytest.approx([30.0] * 3)
    assert list(spoken.data[-1].text) == ["launch/<br>overhead", "memory<br>capacity", "compute"]
    assert titles(figure) == ("micro-batch (examples)", "share of the step (%)")
