"""Figures hold the numbers they were given, with units on the axes."""

import math

from batchlab.viz import curvature


def trace(figure, name):
    (found,) = (each for each in figure.data if each.name == name)
    return found


def points(figure, name):
    found = trace(figure, name)
    return list(zip(found.x, found.y, strict=True))


def titles(figure):
    return figure.layout.xaxis.title.text, figure.layout.yaxis.title.text


def test_the_density_is_drawn_down_to_a_millionth_of_its_peak_with_the_extremes():
    figure = curvature.spectral_density([-1.0, 0.0, 1.0, 2.0], [0.1, 2.0, 1e-9, 0.3], largest=1.9, smallest=-0.9)
    assert points(figure, "spectral density") == [(-1.0, 0.1), (0.0, 2.0), (2.0, 0.3)]
    assert list(trace(figure, "largest").x) == [1.9, 1.9]
    assert list(trace(figure, "most negative").x) == [-0.9, -0.9]
    assert titles(figure) == ("eigenvalue of the Hessian", "density of eigenvalues")
    assert figure.layout.yaxis.type == "log"


def test_a_spectrum_without_a_density_is_an_empty_figure():
    assert points(curvature.spectral_density([], []), "spectral density") == []


def test_batch_edges_have_their_spread_beside_the_law_and_the_full_edge():
    figure = curvature.batch_edge(
        [(8, 4.0, 3.0, 5.5), (32, 2.5, 2.0, math.inf)], law=[(8, 3.9), (32, 2.6), (128, 2.2)], full=2.0
    )
    assert points(figure, "measured, mean over batches") == [(8, 4.0), (32, 2.5)]
    bars = trace(figure, "measured, mean over batches").error_y
    assert (list(bars.array), list(bars.arrayminus)) == ([1.5, None], [1.0, 0.5])
    assert points(figure, "spike law") == [(8, 3.9), (32, 2.6), (128, 2.2)]
    assert list(trace(figure, "all examples").y) == [2.0, 2.0]
    assert titles(figure) == ("batch size (examples)", "largest eigenvalue of the batch Hessian")
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    assert list(figure.layout.xaxis.ticktext) == ["8", "16", "32", "64", "128"]


def test_the_ceiling_is_drawn_with_its_band_and_what_was_seen():
    figure = curvature.learning_rate_ceiling(
        [(8, 0.5, 0.4, 0.6), (32, 0.8, 0.7, 0.9)], measured=[(8, 0.4, 0.3, 0.5)], used=(32, 0.1)
    )
    assert points(figure, "ceiling") == [(8, 0.5), (32, 0.8)]
    assert points(figure, "its interval") == [(8, 0.6), (32, 0.9), (32, 0.7), (8, 0.4)]
    assert points(figure, "left from here on") == [(8, 0.4)]
    assert points(figure, "used") == [(32, 0.1)]
    assert titles(figure) == ("batch size (examples)", "largest stable learning rate")


def test_undefined_ceilings_draw_nothing_false():
    figure = curvature.learning_rate_ceiling([(8, math.nan, 0.0, math.inf)])
    assert [each.name for each in figure.data] == ["ceiling"]
