"""Figures hold the numbers they were given, with units on the axes."""

import math

from batchlab.core.facts import Estimate
from batchlab.viz import energy

ROWS = [
    ("fp32", Estimate(5200.0, 5000.0, 5400.0, ""), Estimate(61.0, 58.0, 64.0, "")),
    ("<bf16>", Estimate(3600.0, 3500.0, math.inf, ""), Estimate(88.0, 85.0, 91.0, "")),
    ("missed", Estimate(math.nan, 0.0, math.inf, ""), Estimate(40.0, 38.0, 42.0, "")),
]


def trace(figure, name):
    (found,) = (each for each in figure.data if each.name == name)
    return found


def test_joules_and_watts_stand_side_by_side_with_their_intervals():
    figure = energy.energy_comparison(ROWS, per="example")
    joules, watts = trace(figure, "energy"), trace(figure, "mean power")
    assert (list(joules.x), list(joules.y)) == ([5200.0, 3600.0], ["fp32", "&lt;bf16&gt;"])
    assert (list(watts.x), list(watts.y)) == ([61.0, 88.0, 40.0], ["fp32", "&lt;bf16&gt;", "missed"])
    assert list(joules.error_x.array) == [200.0, None] and list(joules.error_x.arrayminus) == [200.0, 100.0]
    assert (joules.xaxis, watts.xaxis) == ("x", "x3")
    assert figure.layout.xaxis.title.text == "energy (joules per example)"
    assert figure.layout.xaxis3.title.text == "mean power (watts)"
    assert figure.layout.xaxis.domain[1] < figure.layout.xaxis3.domain[0]
    assert list(figure.layout.yaxis.categoryarray) == ["missed", "&lt;bf16&gt;", "fp32"]  # the first row on top
    assert figure.layout.yaxis2.type != "category"


def test_the_least_of_each_column_is_filled():
    figure = energy.energy_comparison(ROWS)
    hollow = "rgba(0,0,0,0)"
    assert [color == hollow for color in trace(figure, "energy").marker.color] == [True, False]
    assert [color == hollow for color in trace(figure, "mean power").marker.color] == [True, True, False]


def test_nothing_known_is_an_empty_figure():
    unknown = Estimate(math.nan, 0.0, math.inf, "")
    figure = energy.energy_comparison([("a", unknown, unknown)])
    assert list(trace(figure, "energy").x) == []


def test_components_are_stacked_and_estimates_hatched():
    rows = [
        ("fp32", [("gpu", 4000.0, "counter"), ("cpu", 900.0, "estimated")]),
        ("bf16", [("gpu", 3000.0, "counter"), ("cpu", 800.0, "counter"), ("ram", 200.0, "estimated")]),
    ]
    figure = energy.energy_components(rows)
    gpu, cpu = trace(figure, "gpu (counter)"), trace(figure, "cpu (counter, estimated)")
    assert (list(gpu.x), list(gpu.y)) == ([4000.0, 3000.0], ["fp32", "bf16"])
    assert list(cpu.marker.pattern.shape) == ["/", ""] and list(gpu.marker.pattern.shape) == ["", ""]
    assert list(trace(figure, "ram (estimated)").x) == [200.0]
    assert figure.layout.barmode == "stack" and figure.layout.xaxis.title.text == "energy (joules)"
