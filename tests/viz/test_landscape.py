"""Landscape figures hold the numbers they were given, the right way round, and mark what they cannot draw."""

import json
import math

import pytest

from batchlab.viz import landscape as pictures
from batchlab.viz.blocks import Chart, Section, Table
from batchlab.viz.page import page

X, Y = [-1.0, 0.0, 1.0], [-2.0, 2.0]
NARROW = [[2.0, 3.0], [1.0, 1.5], [4.0, 5.0]]
WIDE = [[2.0, 300.0], [1.0, 1.5], [4.0, math.inf]]


def trace(figure, name):
    (found,) = (each for each in figure.data if each.name == name)
    return found


def points(figure, name):
    found = trace(figure, name)
    return list(zip(found.x, found.y, strict=True))


def titles(figure):
    return figure.layout.xaxis.title.text, figure.layout.yaxis.title.text


CURVE = [(-1.0, 2.0, 1.5, 3.0), (0.0, 1.0, 1.0, 1.0), (1.0, 3.0, 2.0, 4.0)]


def test_curves_have_their_median_in_the_range_of_all_directions():
    figure = pictures.loss_curves({"batch 16": CURVE, "<b>": CURVE[:2]}, level=1.5)
    assert points(figure, "batch 16: median") == [(-1.0, 2.0), (0.0, 1.0), (1.0, 3.0)]
    outline = points(figure, "batch 16: all directions")
    assert outline == [(-1, 3), (0, 1), (1, 4), (1, 2), (0, 1), (-1, 1.5)]
    assert points(figure, "&lt;b&gt;: median") == [(-1.0, 2.0), (0.0, 1.0)]
    assert list(trace(figure, "level of the width").y) == [1.5, 1.5]
    assert titles(figure) == ("step along the direction", "loss (the job's own unit)")
    assert figure.layout.yaxis.type == "linear"
    low, high = figure.layout.yaxis.range
    assert low < 1.0 and high > 4.0


def test_infinite_losses_are_marked_and_their_range_leaves_the_plot():
    lost = [*CURVE, (2.0, math.inf, 5.0, math.inf), (3.0, math.inf, math.inf, math.inf)]
    figure = pictures.loss_curves({"m": lost})
    assert points(figure, "m: median")[-2:] == [(2.0, None), (3.0, None)]
    assert list(trace(figure, "m: not finite").x) == [2.0, 3.0]
    outline = points(figure, "m: all directions")
    assert all(math.isfinite(y) for _, y in outline) and (3.0 not in [x for x, _ in outline])
    assert outline[3][1] > figure.layout.yaxis.range[1]


@pytest.mark.parametrize(("low", "kind"), [(0.01, "log"), (0.5, "linear"), (0.0, "linear"), (-0.5, "linear")])
def test_a_loss_axis_is_logarithmic_only_where_it_is_positive_and_wide(low, kind):
    curve = [(0.0, low, low, low), (1.0, 2.0, 1.0, 3.0)]
    assert pictures.loss_curves({"m": curve}).layout.yaxis.type == kind
    assert pictures.interpolation([0, 1], [low, 3.0]).layout.yaxis.type == kind
    ends = pictures.interpolation([0, 1], [low, 3.0]).layout.yaxis.range
    low_end, high_end = (10**end if kind == "log" else end for end in ends)
    assert low_end < low and high_end > 3.0


def test_an_interpolation_has_both_models_as_upright_lines():
    figure = pictures.interpolation([-0.5, 0.0, 1.0, 1.5], [3.0, 1.0, 2.0, math.inf], names=("a", "b"), valid=[4.0] * 4)
    assert points(figure, "training") == [(-0.5, 3.0), (0.0, 1.0), (1.0, 2.0), (1.5, None)]
    assert points(figure, "validation")[0] == (-0.5, 4.0)
    assert list(trace(figure, "a").x) == [0, 0] and list(trace(figure, "b").x) == [1, 1]
    assert list(trace(figure, "not finite").x) == [1.5]
    assert points(pictures.interpolation([0, 1], [1.0, 2.0]), "loss") == [(0, 1.0), (1, 2.0)]


def rows(values):
    return [list(row) for row in values]


def test_a_contour_has_a_row_for_each_y():
    figure = pictures.loss_contour(X, Y, NARROW)
    found = trace(figure, "loss")
    assert rows(found.z) == [[2.0, 1.0, 4.0], [3.0, 1.5, 5.0]] == rows(found.customdata)
    assert (list(found.x), list(found.y)) == (X, Y)
    assert points(figure, "the weights") == [(0, 0)]
    assert titles(figure) == ("step along the first direction", "step along the second direction")


@pytest.mark.parametrize("draw", [pictures.loss_contour, pictures.loss_surface])
def test_a_wide_plane_is_drawn_by_its_logarithm_and_read_by_its_loss(draw):
    found = trace(draw(X, Y, WIDE), "loss")
    assert rows(found.z) == [
        pytest.approx([math.log10(2), 0.0, math.log10(4)]),
        [pytest.approx(math.log10(300)), pytest.approx(math.log10(1.5)), None],
    ]
    assert rows(found.customdata) == [[2.0, 1.0, 4.0], [300.0, 1.5, None]]
    ticks = dict(zip(found.colorbar.ticktext, found.colorbar.tickvals, strict=True))
    assert ticks["100"] == 2.0 and ticks["1"] == 0.0


def test_a_contour_marks_what_is_not_finite_and_carries_a_path():
    path = [(1.0, 2.0), (0.5, 0.5), (0.0, 0.0)]
    figure = pictures.loss_contour(X, Y, WIDE, path=path, explained=(0.832, 0.0794))
    assert points(figure, "not finite") == [(1.0, 2.0)]
    assert points(figure, "path of training") == path
    assert points(figure, "start") == path[:1] and points(figure, "end") == path[-1:]
    assert titles(figure) == ("PCA axis 1 (83.2 % of variance)", "PCA axis 2 (7.94 % of variance)")
    assert not any(each.name == "the weights" for each in figure.data)


def test_a_plane_without_one_finite_loss_is_still_a_figure():
    figure = pictures.loss_contour(X, Y, [[math.inf, math.nan]] * 3)
    assert len(points(figure, "not finite")) == 3


def test_a_ratio_map_begins_at_zero_and_leaves_gaps():
    figure = pictures.hessian_ratio(X, Y, [[0.1, 0.2], [0.0, math.nan], [0.3, 0.4]])
    found = trace(figure, "ratio")
    assert rows(found.z) == [[0.1, 0.0, 0.3], [0.2, None, 0.4]] and found.zmin == 0
    assert points(pictures.hessian_ratio(X, Y, NARROW, path=[(1.0, 1.0), (0.0, 0.0)]), "end") == [(0.0, 0.0)]


def test_every_figure_fits_on_a_page():
    figures = {
        "curves": pictures.loss_curves({"m": [*CURVE, (2.0, math.inf, 5.0, math.inf)]}),
        "line": pictures.interpolation([0, 1], [1.0, math.inf]),
        "contour": pictures.loss_contour(X, Y, WIDE),
        "surface": pictures.loss_surface(X, Y, WIDE),
        "ratio": pictures.hessian_ratio(X, Y, [[math.nan, 1.0]] * 3),
    }
    table = Table("t", ("a", "b"), [("1", "2")])
    text = page("t", [Section("s", "t", [Chart(name, "t", "t", each, table) for name, each in figures.items()])])
    start = text.index('id="page-data">') + len('id="page-data">')
    data = json.loads(text[start : text.index("</script>", start)])
    assert set(data["figures"]) == set(figures)
