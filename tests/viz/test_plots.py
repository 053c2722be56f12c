"""Figures hold the numbers they were given, with units on the axes; nothing else is checked about their looks."""

import math

import pytest

from batchlab.core.facts import Estimate, LearningRateTrial, MicroBatchTime
from batchlab.core.job import Target
from batchlab.core.plan import FrontierRow
from batchlab.viz import plots
from batchlab.viz.style import DARK, decades, powers_of_two
from batchlab.viz.text import label

ROWS = (
    FrontierRow(16, 1, 700.0, 7.0, 7.0),
    FrontierRow(64, 1, 250.0, 4.0, 4.0, picked=True),
    FrontierRow(16, 2, 700.0, 5.0, 10.0),
    FrontierRow(64, 2, 250.0, 2.5, 5.0),
    FrontierRow(128, 2, 200.0, math.inf, math.inf),
)


def trace(figure, name):
    (found,) = (each for each in figure.data if each.name == name)
    return found


def points(figure, name):
    found = trace(figure, name)
    return list(zip(found.x, found.y, strict=True))


def titles(figure):
    return figure.layout.xaxis.title.text, figure.layout.yaxis.title.text


def test_frontier_has_one_line_per_device_count_and_marks_the_pick():
    figure = plots.frontier(ROWS)
    assert points(figure, "1 device") == [(7.0, 7.0), (4.0, 4.0)]
    assert points(figure, "2 devices") == [(10.0, 5.0), (5.0, 2.5)]
    assert points(figure, "the plan: batch size 64") == [(4.0, 4.0)]
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    assert titles(figure) == ("cost to target (device-seconds)", "time to target (seconds)")


def test_time_to_target_is_drawn_against_batch_size():
    figure = plots.time_to_target(ROWS)
    assert points(figure, "2 devices") == [(16, 5.0), (64, 2.5)]
    assert points(figure, "the plan: batch size 64") == [(64, 4.0)]
    assert list(figure.layout.xaxis.ticktext) == ["16", "32", "64"]


def noise_columns(low=(5.0, 6.0, 9.0), high=(20.0, 24.0, 40.0)):
    return {"examples": [32, 64, 96], "value": [10.0, 12.0, 20.0], "low": list(low), "high": list(high)}


def test_noise_scale_band_runs_along_its_bounds():
    figure = plots.noise_scale(
        noise_columns(),
        batch_size={"examples": [32, 96], "value": [32, 64]},
        probe=[(64.0, 11.0, 6.0, math.inf)],
        planned=Estimate(15.0, 10.0, 20.0, "norms"),
    )
    assert points(figure, "in this run") == [(32, 10.0), (64, 12.0), (96, 20.0)]
    band = points(figure, "its interval")
    assert band == [(32, 20.0), (64, 24.0), (96, 40.0), (96, 9.0), (64, 6.0), (32, 5.0)]
    assert points(figure, "batch size used") == [(32, 32), (96, 64)]
    probe = trace(figure, "in the probe")
    assert list(probe.error_y.arrayminus) == [5.0]
    assert list(probe.error_y.array) == [None]  # an unbounded side has no bar
    assert list(trace(figure, "what the plan used").y) == [15.0, 15.0]
    assert titles(figure) == ("training examples seen", "noise scale (examples)")


def test_an_unbounded_interval_is_drawn_to_the_edge_of_a_plot_that_its_values_set():
    figure = plots.noise_scale(noise_columns(low=(-3.0, 0.0, -math.inf), high=(math.inf, 24.0, math.inf)))
    low, high = (10**end for end in figure.layout.yaxis.range)
    assert low < 10.0 < 20.0 < high < 100.0
    edges = [y for _, y in points(figure, "its interval")]
    assert all(math.isfinite(y) and y > 0 for y in edges)
    assert edges[0] > high and edges[1] == 24.0 and edges[3] < low


def test_noise_scale_without_any_point_is_an_empty_figure():
    empty = {"examples": [], "value": [], "low": [], "high": []}
    assert len(plots.noise_scale(empty).data) == 0


@pytest.mark.parametrize("axis", ["step", "examples", "seconds"])
def test_loss_is_drawn_against_the_axis_it_is_asked_for(axis):
    train = {axis: [1, 2, 3], "loss": [3.0, 2.0, 1.0]}
    figure = plots.loss(train, {axis: [3], "loss": [1.5]}, axis=axis, x_title=f"{axis}!", skipped=[2])
    assert points(figure, "training, each step") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert points(figure, "validation") == [(3, 1.5)]
    assert list(trace(figure, "skipped: not finite").x) == [2]
    assert figure.layout.xaxis.title.text == f"{axis}!"
    assert figure.layout.yaxis.type == "linear"


def test_loss_is_logarithmic_only_where_it_is_positive_and_wide():
    valid = {"step": [], "loss": []}
    assert plots.loss({"step": [1, 2], "loss": [9.0, 0.1]}, valid, axis="step", x_title="").layout.yaxis.type == "log"
    for low in (-0.1, 0.0, 5.0):
        figure = plots.loss({"step": [1, 2], "loss": [9.0, low]}, valid, axis="step", x_title="")
        assert figure.layout.yaxis.type == "linear"


def test_target_metric_marks_target_prediction_and_outcome():
    predicted = Estimate(25.0, 15.0, math.inf, "law")
    figure = plots.target_metric(
        [0, 10, 20], [0.1, 0.5, 0.9], Target("f1", 0.8, "max"), predicted=predicted, reached=20
    )
    assert points(figure, "measured") == [(0, 0.1), (10, 0.5), (20, 0.9)]
    assert set(trace(figure, "target").y) == {0.8}
    assert set(trace(figure, "predicted to meet it").x) == {25.0}
    assert set(trace(figure, "met it").x) == {20}
    (span,) = figure.layout.shapes
    assert span.x0 == 15.0 and figure.layout.xaxis.range[1] < span.x1 < math.inf


def test_micro_batch_time_and_memory():
    sizes = [
        MicroBatchTime(2, Estimate(0.1, 0.08, 0.13, "m"), 3 * 2**20),
        MicroBatchTime(4, Estimate(0.15, 0.15, 0.15, "m"), None),
        MicroBatchTime(8, Estimate(0.2, 0.1, 0.4, "m"), 8 * 2**20),
    ]
    time = plots.micro_batch_time(sizes, chosen=8)
    assert points(time, "measured") == [(2, 0.1), (4, 0.15), (8, 0.2)]
    assert list(trace(time, "measured").error_y.array) == pytest.approx([0.03, 0.0, 0.2])
    assert points(time, "the plan") == [(8, 0.2)]
    memory = plots.micro_batch_memory(sizes, chosen=4)
    assert points(memory, "measured") == [(2, 3.0), (8, 8.0)]
    assert titles(memory) == ("micro-batch (examples)", "memory (MiB)")
    assert not [each for each in memory.data if each.name == "the plan"]


def test_learning_rate_trials_set_diverged_runs_apart():
    trials = [LearningRateTrial(0.1, math.inf), LearningRateTrial(0.01, 0.3), LearningRateTrial(0.001, 0.9)]
    trials.append(LearningRateTrial(0.5, math.nan))  # was not run
    figure = plots.learning_rate_trials(trials, base=0.01, planned=0.02)
    assert points(figure, "trials") == [(0.001, 0.9), (0.01, 0.3)]
    assert list(trace(figure, "diverged").x) == [0.1]
    assert set(trace(figure, "found good at the base batch").x) == {0.01}
    assert set(trace(figure, "the plan's").x) == {0.02}


def test_tradeoff_shows_sweep_fit_prediction_and_run():
    measured = [(16, 700.0, 650.0, 800.0), (64, 300.0, 300.0, 300.0)]
    figure = plots.tradeoff(
        measured, fit=[(16, 690.0), (64, 310.0)], predicted=[(16, 600.0, 500.0, 720.0)], run=(64, 280)
    )
    assert points(figure, "sweep") == [(16, 700.0), (64, 300.0)]
    assert list(trace(figure, "sweep").error_y.arrayminus) == [50.0, 0.0]
    assert points(figure, "fit to the sweep") == [(16, 690.0), (64, 310.0)]
    assert points(figure, "predicted") == [(16, 600.0)]
    assert points(figure, "the plan's run") == [(64, 280)]


def test_no_figure_carries_a_global_style_and_every_colour_has_a_dark_twin():
    text = plots.frontier(ROWS).to_json() + plots.noise_scale(noise_columns()).to_json()
    assert '"template"' not in text
    for colour in set(DARK):
        assert DARK[colour] != colour
    used = {"#0067a5", "#b84800", "rgba(0,103,165,0.16)"}
    assert all(colour in text and colour in DARK for colour in used)


def test_outside_text_cannot_become_markup_in_a_figure():
    figure = plots.target_metric([0, 1], [0, 1], Target('<a href="https://x.test">m</a>', 1.0))
    assert "<a" not in figure.to_json().replace("\\u003c", "<")
    assert label("x" * 100) == "x" * 59 + "…"


def test_ticks():
    assert powers_of_two([3, 100])["ticktext"] == ["2", "4", "8", "16", "32", "64", "128"]
    assert powers_of_two([1, 2.0**20])["ticktext"][-1] == "262k"
    assert decades([0.004, 0.9])["ticktext"] == [
        "0.001",
        "0.002",
        "0.005",
        "0.01",
        "0.02",
        "0.05",
        "0.1",
        "0.2",
        "0.5",
        "1",
        "2",
        "5",
    ]
    assert "1.5" in decades([1, 2])["ticktext"]
    assert decades([1e-6, 1])["ticktext"][0] == "10<sup>-6</sup>"
    assert decades([]) == powers_of_two([math.inf, 0.0]) == {}
