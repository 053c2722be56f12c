"""Figures hold the numbers they were given, with units on the axes."""

from batchlab.viz import stability


def trace(figure, name):
    (found,) = (each for each in figure.data if each.name == name)
    return found


def points(figure, name):
    found = trace(figure, name)
    return list(zip(found.x, found.y, strict=True))


def titles(figure):
    return figure.layout.xaxis.title.text, figure.layout.yaxis.title.text


def test_each_layer_has_a_line_on_a_log_axis_and_alarms_are_marked():
    layers = {"a": [(50, 1.0), (100, 12.0)], "<b>": [(50, 0.0), (100, 0.5)]}
    figure = stability.variance_ratio(layers, alarms=[100, 150, 100])
    assert points(figure, "a") == [(50, 1.0), (100, 12.0)]
    assert points(figure, "&lt;b&gt;") == [(100, 0.5)]  # a layer without spread has no place on a log axis
    assert list(trace(figure, "independent gradients").y) == [1.0, 1.0]
    assert list(trace(figure, "alarm").x) == [100, 150]
    assert titles(figure) == ("optimizer step", "variance ratio of the update")
    assert figure.layout.yaxis.type == "log"


def test_many_layers_differ_in_colour_or_dash():
    figure = stability.variance_ratio({str(i): [(1, 1.0), (2, 1.0), (3, 2.0)] for i in range(8)})
    styles = [(each.line.color, each.line.dash) for each in figure.data if each.name != "independent gradients"]
    assert len(set(styles)) == 8


def test_no_alarm_no_mark():
    assert "alarm" not in [each.name for each in stability.variance_ratio({"a": [(50, 1.0)]}).data]


def test_a_layers_history_shows_every_sign_and_where_each_alarm_began():
    columns = {
        "step": [50, 100, 150],
        "high_share": [0.0, 0.2, 0.6],
        "lag1": [0.1, 0.4, 0.9],
        "eps_share": [0.0, 0.0, 0.1],
        "cosine": [0.4, 0.3, 0.2],
    }
    figure = stability.layer_history(columns, alarms={"bimodal": [150, 100], "frozen": []})
    assert points(figure, "|u| > 0.8") == [(50, 0.0), (100, 0.2), (150, 0.6)]
    assert points(figure, "lag-1 correlation of the gradient") == [(50, 0.1), (100, 0.4), (150, 0.9)]
    assert points(figure, "√v̂ < ε")[-1] == (150, 0.1)
    assert points(figure, "cosine of update and gradient")[-1] == (150, 0.2)
    assert list(trace(figure, "first bimodal").x) == [100, 100]
    assert list(trace(figure, "alarm").x) == [100, 150]
    assert "first frozen" not in [each.name for each in figure.data]
    assert titles(figure) == ("optimizer step", "share of coordinates, or correlation")


def test_the_histogram_stands_beside_its_reference():
    figure = stability.update_histogram([-1.0, 0.0, 2.0], [0.4, 0.3], [(-1.0, 0.1), (0.0, 1.7), (1.0, 0.1)], name="w")
    bars = trace(figure, "w")
    assert (list(bars.x), list(bars.y), list(bars.width)) == ([-0.5, 1.0], [0.4, 0.3], [1.0, 2.0])
    assert points(figure, "independent gradients") == [(-1.0, 0.1), (0.0, 1.7), (1.0, 0.1)]
    marks = [each.x[0] for each in figure.data if each.name == "|u| = 0.8"]
    assert marks == [-0.8, 0.8] and list(figure.layout.xaxis.range) == [-1.0, 2.0]
    assert titles(figure) == ("normalised update u of a coordinate", "density of coordinates")
