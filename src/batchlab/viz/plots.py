"""Pictures of a plan and its run, from numbers that others computed. Each function returns a figure and shows nothing.

Sizes are in examples, times in seconds. Non-finite points are not drawn; a band's unbounded edge runs to the edge of
the plot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from batchlab.core.facts import Estimate, LearningRateTrial, MicroBatchTime
from batchlab.core.job import Target
from batchlab.core.plan import FrontierRow
from batchlab.viz.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    ORANGE_BAND,
    PURPLE,
    SERIES,
    SURFACE,
    SYMBOLS,
    blank,
    decades,
    powers_of_two,
)
from batchlab.viz.text import label
from batchlab.viz.traces import (
    Interval,
    Numbers,
    add_band,
    add_star,
    foot_marks,
    level_line,
    line,
    log_range,
    points_with_spread,
    upright_line,
)

MIB = 2.0**20
AXIS_LABEL = 32


def frontier(rows: Sequence[FrontierRow]) -> Any:
    """Predicted time against cost to the target, log-log: a line for each number of devices, a point a batch size."""
    figure = blank("cost to target (device-seconds)", "time to target (seconds)", log_x=True, log_y=True)
    return _by_devices(figure, rows, "cost")


def time_to_target(rows: Sequence[FrontierRow]) -> Any:
    """Predicted time to the target against batch size, log-log: a line for each number of devices."""
    figure = blank("batch size (examples)", "time to target (seconds)", log_x=True, log_y=True)
    return _by_devices(figure, rows, "batch_size")


def _by_devices(figure: Any, rows: Sequence[FrontierRow], x: str) -> Any:
    drawable = [row for row in rows if 0 < row.time < math.inf and 0 < row.cost < math.inf]
    counts = sorted({row.devices for row in drawable})
    for place, count in enumerate(counts):
        shown = [row for row in drawable if row.devices == count]
        color, symbol = SERIES[place % len(SERIES)], SYMBOLS[place % len(SYMBOLS)]
        trace = go.Scatter(x=[getattr(row, x) for row in shown], y=[row.time for row in shown], mode="lines+markers")
        trace.update(line={"color": color, "width": 1.5}, marker={"color": color, "size": 8, "symbol": symbol})
        figure.add_trace(trace.update(name=f"{count} device{'s' if count > 1 else ''}", **_frontier_hover(shown)))
    picked = [row for row in drawable if row.picked]
    trace = go.Scatter(x=[getattr(row, x) for row in picked], y=[row.time for row in picked], mode="markers")
    trace.update(marker={"size": 18, "color": ORANGE, "symbol": "star", "line": {"color": SURFACE, "width": 1.5}})
    name = f"the plan: batch size {picked[0].batch_size:,}" if picked else "the plan"
    figure.add_trace(trace.update(name=name, **_frontier_hover(picked)))
    sizes = x == "batch_size"
    along = [getattr(row, x) for row in drawable]
    figure.layout.xaxis.update(powers_of_two(along) if sizes else decades(along))
    figure.layout.yaxis.update(decades([row.time for row in drawable]))
    return figure


def _frontier_hover(rows: Sequence[FrontierRow]) -> dict[str, Any]:
    template = "batch size %{customdata[0]} on %{customdata[1]}<br>%{customdata[2]:.4~g} steps<br>"
    template += "%{customdata[3]:.4~g} s, %{customdata[4]:.4~g} device-seconds<extra></extra>"
    return {
        "customdata": [[row.batch_size, row.devices, row.steps, row.time, row.cost] for row in rows],
        "hovertemplate": template,
    }


def noise_scale(
    training: Mapping[str, Numbers],
    *,
    batch_size: Mapping[str, Numbers] | None = None,
    probe: Sequence[Interval] = (),
    planned: Estimate | None = None,
) -> Any:
    """The gradient noise scale along training with its band, log y.

    training: columns `examples`, `value`, `low`, `high` of the run. batch_size: columns `examples`, `value` of what
    was used. probe: (examples, value, low, high) of the reference run. planned: the value the plan was made from.
    """
    figure = blank("training examples seen", "noise scale (examples)", log_y=True)
    figure.layout.xaxis.rangemode = "tozero"
    inside = [*training["value"], *(point[1] for point in probe), *(batch_size["value"] if batch_size else ())]
    floor, ceiling = log_range(inside + ([planned.value] if planned else []))
    add_band(figure, training, floor, ceiling)
    if training["value"]:
        figure.add_trace(line(training["examples"], training["value"], "in this run", BLUE))
    if batch_size and batch_size["value"]:
        figure.add_trace(line(batch_size["examples"], batch_size["value"], "batch size used", ORANGE, shape="hv"))
    if probe:
        figure.add_trace(points_with_spread(probe, "in the probe", GREEN, "diamond"))
    if planned is not None and planned.value > 0 and planned.defined:
        figure.add_trace(level_line(planned.value, "what the plan used", GREY))
    if floor < ceiling:
        figure.layout.yaxis.update(decades([floor, ceiling]), range=[math.log10(floor), math.log10(ceiling)])
    return figure


def loss(
    train: Mapping[str, Numbers], valid: Mapping[str, Numbers], *, axis: str, x_title: str, skipped: Numbers = ()
) -> Any:
    """Training and validation loss against one axis.

    train, valid: columns `loss` and the one named by `axis`. skipped: where on that axis a step was left out
    because its loss or gradient was not finite; marked along the foot.
    """
    positive = [value for value in [*train["loss"], *valid["loss"]] if value > 0]
    wide = len(positive) == len(train["loss"]) + len(valid["loss"]) > 0 and max(positive) > 10 * min(positive)
    figure = blank(x_title, "loss (the job's own unit)", log_y=wide)
    if wide:
        figure.layout.yaxis.update(decades(positive))
    figure.layout.xaxis.rangemode = "tozero"
    if train["loss"]:
        figure.add_trace(line(train[axis], train["loss"], "training, each step", BLUE, width=1.2))
    if valid["loss"]:
        figure.add_trace(line(valid[axis], valid["loss"], "validation", ORANGE, markers=True))
    if skipped:
        figure.add_trace(foot_marks(skipped, "skipped: not finite"))
    return figure


def target_metric(
    steps: Numbers, values: Numbers, target: Target, *, predicted: Estimate | None = None, reached: int | None = None
) -> Any:
    """The target's metric on the validation data against steps, with where it was predicted to be met, and was."""
    figure = blank("steps", f"{label(target.metric, AXIS_LABEL)} (validation)")
    figure.add_trace(line(steps, values, "measured", BLUE, markers=True))
    figure.add_trace(level_line(target.value, "target", GREY))
    right = 1.08 * max([*steps, reached or 0, predicted.value if predicted and predicted.defined else 0])
    if predicted is not None and predicted.defined:
        ends = {"x0": max(predicted.low, 0.0), "x1": min(predicted.high, 2 * right)}
        figure.add_vrect(**ends, fillcolor=ORANGE_BAND, line_width=0, layer="below")
        figure.add_trace(upright_line(predicted.value, "predicted to meet it", ORANGE, "dash"))
    if reached is not None:
        figure.add_trace(upright_line(reached, "met it", GREEN, "solid"))
    figure.layout.xaxis.range = [0, right]
    return figure


def micro_batch_time(points: Sequence[MicroBatchTime], chosen: int | None = None) -> Any:
    """Seconds of one forward and backward pass against micro-batch, log-log, with intervals; the plan's is marked."""
    figure = blank("micro-batch (examples)", "time of a pass (seconds)", log_x=True, log_y=True)
    figure.add_trace(
        points_with_spread(
            [(p.examples, p.seconds.value, p.seconds.low, p.seconds.high) for p in points],
            "measured",
            BLUE,
            "circle",
            joined=True,
        )
    )
    add_star(figure, [(p.examples, p.seconds.value) for p in points if p.examples == chosen])
    figure.layout.xaxis.update(powers_of_two([p.examples for p in points]))
    figure.layout.yaxis.update(decades([p.seconds.value for p in points]))
    return figure


def micro_batch_memory(points: Sequence[MicroBatchTime], chosen: int | None = None) -> Any:
    """Peak memory against micro-batch, log x."""
    known = [(p.examples, p.memory_bytes / MIB) for p in points if p.memory_bytes is not None]
    figure = blank("micro-batch (examples)", "memory (MiB)", log_x=True)
    figure.layout.yaxis.rangemode = "tozero"
    figure.add_trace(line([x for x, _ in known], [y for _, y in known], "measured", PURPLE, markers=True))
    add_star(figure, [point for point in known if point[0] == chosen])
    figure.layout.xaxis.update(powers_of_two([examples for examples, _ in known]))
    return figure


def learning_rate_trials(
    trials: Sequence[LearningRateTrial], *, base: float | None = None, planned: float | None = None
) -> Any:
    """Validation loss along short runs against learning rate, log x; those that diverged along the top."""
    figure = blank("learning rate", "validation loss, mean along the run", log_x=True)
    ended = sorted((t.learning_rate, t.loss) for t in trials if math.isfinite(t.loss))
    diverged = [t.learning_rate for t in trials if math.isinf(t.loss)]
    figure.add_trace(line([x for x, _ in ended], [y for _, y in ended], "trials", BLUE, markers=True))
    figure.layout.xaxis.update(decades([t.learning_rate for t in trials]))
    if diverged:
        top = go.Scatter(x=diverged, y=[0.96] * len(diverged), mode="markers", name="diverged", yaxis="y2")
        figure.add_trace(top.update(marker={"symbol": "x", "size": 10, "color": ORANGE}, hovertemplate="%{x:.3g}"))
    if base is not None:
        figure.add_trace(upright_line(base, "found good at the base batch", GREEN, "solid"))
    if planned is not None:
        figure.add_trace(upright_line(planned, "the plan's", ORANGE, "dash"))
    return figure


def tradeoff(
    measured: Sequence[Interval],
    *,
    fit: Sequence[tuple[float, float]] = (),
    predicted: Sequence[Interval] = (),
    run: tuple[float, float] | None = None,
) -> Any:
    """Steps to target against batch size, log-log: what was measured, the fit through it, and what was predicted.

    measured, predicted: (batch size, steps, low, high). fit: (batch size, steps) along the fitted law. run: the
    plan's own batch size and the steps it took.
    """
    figure = blank("batch size (examples)", "steps to target", log_x=True, log_y=True)
    shown = [*measured, *predicted]
    figure.layout.xaxis.update(powers_of_two([point[0] for point in shown]))
    figure.layout.yaxis.update(decades([point[1] for point in shown]))
    if predicted:
        x, value, low, high = (list(column) for column in zip(*predicted, strict=True))
        floor, ceiling = log_range([*value, *(point[1] for point in measured)])
        columns = {"examples": x, "value": value, "low": low, "high": high}
        add_band(figure, columns, floor, ceiling, color=ORANGE_BAND, name="its interval")
        figure.add_trace(line(x, value, "predicted", ORANGE, dash="dash"))
    if fit:
        figure.add_trace(line([x for x, _ in fit], [y for _, y in fit], "fit to the sweep", GREY))
    if measured:
        figure.add_trace(points_with_spread(measured, "sweep", BLUE, "circle"))
    if run is not None:
        add_star(figure, [run], "the plan's run", GREEN)
    return figure


def time_measured(points: Sequence[Interval], *, run: tuple[float, float] | None = None) -> Any:
    """Measured seconds to target against batch size, log-log. points: (batch size, seconds, low, high)."""
    figure = blank("batch size (examples)", "time to target (seconds)", log_x=True, log_y=True)
    figure.layout.xaxis.update(powers_of_two([point[0] for point in points]))
    figure.layout.yaxis.update(decades([point[1] for point in points]))
    if points:
        figure.add_trace(points_with_spread(points, "sweep", BLUE, "circle", joined=True))
    if run is not None:
        add_star(figure, [run], "the plan's run", GREEN)
    return figure


def tuned_rates(best: Sequence[tuple[float, float]], planned: tuple[float, float] | None = None) -> Any:
    """The best learning rate found at each batch size, log-log. best: (batch size, learning rate)."""
    figure = blank("batch size (examples)", "best learning rate", log_x=True, log_y=True)
    figure.layout.xaxis.update(powers_of_two([size for size, _ in best]))
    figure.layout.yaxis.update(decades([rate for _, rate in best]))
    figure.add_trace(line([x for x, _ in best], [y for _, y in best], "best in the sweep", BLUE, markers=True))
    if planned is not None:
        add_star(figure, [planned])
    return figure


def rate_search(trials: Mapping[int, Sequence[tuple[float, float]]]) -> Any:
    """Every trial that met the target, log-log. trials: batch size -> (learning rate, steps to target)."""
    figure = blank("learning rate", "steps to target", log_x=True, log_y=True)
    every = [point for points in trials.values() for point in points]
    figure.layout.xaxis.update(decades([rate for rate, _ in every]))
    figure.layout.yaxis.update(decades([steps for _, steps in every]))
    for place, (size, points) in enumerate(sorted(trials.items())):
        ordered = sorted(points)
        color, symbol = SERIES[place % len(SERIES)], SYMBOLS[place % len(SYMBOLS)]
        trace = line([x for x, _ in ordered], [y for _, y in ordered], f"batch size {size}", color, markers=True)
        figure.add_trace(trace.update(marker={"symbol": symbol}, line={"width": 1.2}))
    return figure
