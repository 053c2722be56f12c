"""Pictures of what a gradient, a run and a machine tell about batch size, from numbers that others computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from batchlab.viz.style import BLUE, GREEN, GREY, GREY_BAND, ORANGE, PURPLE, blank, decades, powers_of_two
from batchlab.viz.text import label
from batchlab.viz.traces import Numbers, line, points_with_spread, upright_line

if TYPE_CHECKING:
    from batchlab.measure.course.diffusion import Diffusion
    from batchlab.measure.course.learning_rate import Cycle, RangeTest
    from batchlab.measure.noise.signal_to_noise import Gsnr
    from batchlab.measure.speed.step_time import Throughput

_LAYER_LABEL = 36


def weight_distance(points: Sequence[tuple[float, float]], fit: Diffusion | None = None) -> Any:
    """Distance from the first weights against updates, log x, with both laws over the range that was fitted."""
    figure = blank("updates", "distance from the first weights", log_x=True)
    figure.layout.yaxis.rangemode = "tozero"
    t, distance = [x for x, _ in points], [y for _, y in points]
    figure.layout.xaxis.update(decades(t))
    figure.add_trace(_dots(t, distance, "measured", BLUE))
    if fit is None:
        return figure
    inside = [x for x in t if fit.low <= x <= fit.high]
    if fit.slope.defined:
        name = f"a + b·ln t, b = {fit.slope.value:.3g}, R² {fit.r2:.3f}"
        figure.add_trace(line(inside, [fit.logarithm(x) for x in inside], name, ORANGE))
    if fit.exponent.defined:
        name = f"c·t^α, α = {fit.exponent.value:.3g}, R² {fit.power_r2:.3f}"
        figure.add_trace(line(inside, [fit.power(x) for x in inside], name, GREEN, dash="dash"))
    return figure


def _dots(x: Numbers, y: Numbers, name: str, color: str) -> Any:
    dots = go.Scatter(x=list(x), y=list(y), mode="markers", name=name, marker={"color": color, "size": 6})
    return dots.update(hovertemplate="%{x:.5~g}: %{y:.4~g}<extra>" + name + "</extra>")


def signal_to_noise(found: Gsnr) -> Any:
    """The gradient signal-to-noise ratio of each parameter tensor, log x: median, middle half, and 5 to 95 %.

    The first tensor stands at the top. Quantiles that are 0 or infinite end at the edge of the plot.
    """
    of = f"a group of {found.group_size:g} examples" if found.per == "group" else "one example"
    figure = blank(f"gradient signal-to-noise ratio of {of}", "", log_x=True)
    names = [label(layer.name, _LAYER_LABEL) for layer in found.layers]
    shown = [value for layer in found.layers for value in layer.quantiles if 0 < value < math.inf]
    floor, ceiling = (min(shown) / 2, max(shown) * 2) if shown else (0.1, 10.0)
    inside = [[min(max(value, floor), ceiling) for value in layer.quantiles] for layer in found.layers]
    for first, last, width, name in ((0, 4, 3, "5 to 95 %"), (1, 3, 9, "25 to 75 %")):
        x = [end for values in inside if not math.isnan(values[0]) for end in (values[first], values[last], None)]
        y = [
            end
            for row, values in zip(names, inside, strict=True)
            if not math.isnan(values[0])
            for end in (row, row, None)
        ]
        bars = go.Scatter(x=x, y=y, mode="lines", name=name, line={"color": BLUE, "width": width}, hoverinfo="skip")
        figure.add_trace(bars.update(opacity=0.45))
    medians = go.Scatter(x=[values[2] for values in inside], y=names, mode="markers", name="median")
    medians.update(marker={"color": BLUE, "size": 10, "line": {"color": GREY, "width": 1}})
    figure.add_trace(medians.update(hovertemplate="%{y}: %{x:.3~g}<extra>median</extra>"))
    unbiased = [layer.unbiased_mean if layer.unbiased_mean > 0 else None for layer in found.layers]
    means = go.Scatter(x=unbiased, y=names, mode="markers", name="mean, unbiased")
    means.update(marker={"color": ORANGE, "size": 9, "symbol": "diamond"})
    figure.add_trace(means.update(hovertemplate="%{y}: %{x:.3~g}<extra>mean, unbiased</extra>"))
    figure.layout.xaxis.update(decades([floor, ceiling]), range=[math.log10(floor), math.log10(ceiling)])
    figure.layout.yaxis.update(type="category", categoryorder="array", categoryarray=names[::-1], automargin=True)
    return figure


def range_test(found: RangeTest, cycle: Cycle | None = None) -> Any:
    """Loss against learning rate in a range test, with its readings and the ends suggested for a cycle."""
    linear = found.spacing == "linear"
    figure = blank("learning rate", "loss (the job's own unit)", log_x=not linear)
    rates = list(found.learning_rates)
    figure.add_trace(line(rates, found.losses, "training, each step", GREY, width=1))
    if found.validation:
        figure.add_trace(line(rates, found.validation, "validation", PURPLE, width=1))
    read = "validation" if found.validation else "training"
    figure.add_trace(line(rates, found.smoothed, f"{read}, smoothed", BLUE, width=2.5))
    figure.add_trace(upright_line(found.steepest, "falls fastest", GREEN, "dot"))
    if cycle is None:
        figure.add_trace(upright_line(found.minimum, "least", ORANGE, "solid"))
    else:
        ends = {"x0": cycle.min_lr, "x1": cycle.max_lr}
        figure.add_vrect(**ends, fillcolor=GREY_BAND, line_width=0, layer="below")
        figure.add_trace(upright_line(cycle.min_lr, "cycle's least rate", ORANGE, "dash"))
        figure.add_trace(upright_line(cycle.max_lr, "cycle's largest rate: loss is least", ORANGE, "solid"))
    if found.divergence is not None:
        figure.add_trace(upright_line(found.divergence, "diverged", PURPLE, "dash"))
    top = max(found.smoothed[0], found.losses[0], *found.validation[:1])
    least = min([*found.losses, *found.validation])
    figure.layout.yaxis.range = [min(least, 0.0) if least < 0 else 0.0, 1.5 * top if top > 0 else None]
    if not linear:
        figure.layout.xaxis.update(decades(rates))
    return figure


def throughput(found: Throughput) -> Any:
    """Units per second against micro-batch, log x, with intervals, the fitted law, and where the speed saturates."""
    figure = blank("micro-batch (examples)", f"{found.unit}s per second", log_x=True)
    figure.layout.yaxis.rangemode = "tozero"
    points = [
        (step.examples, step.units_per_second.value, step.units_per_second.low, step.units_per_second.high)
        for step in found.steps
    ]
    figure.add_trace(points_with_spread(points, "measured", BLUE, "circle", joined=True))
    sizes = [step.examples for step in found.steps]
    if found.law is not None and found.law.half.defined:
        along = [(size, size * found.units_per_example / found.law.seconds(size)) for size in sizes]
        name = f"t₀ + t₁·b: half the speed at {found.law.half.value:.3g}"
        figure.add_trace(line([x for x, _ in along], [y for _, y in along], name, GREY, dash="dash"))
    if found.saturation is not None:
        figure.add_trace(upright_line(found.saturation.value, "95 % of the best", GREEN, "dot"))
    if found.out_of_memory_at is not None:
        figure.add_trace(upright_line(found.out_of_memory_at, "out of memory", ORANGE, "solid"))
    figure.layout.xaxis.update(powers_of_two([*sizes, *([found.out_of_memory_at] if found.out_of_memory_at else [])]))
    return figure


def step_shares(found: Throughput) -> Any:
    """What each micro-batch's step goes to, in percent: loading, the update, communication where known, the rest.

    The bottleneck's name stands over each bar. A share below 0, which noise can give, is drawn as such.
    """
    figure = blank("micro-batch (examples)", "share of the step (%)")
    sizes = [str(step.examples) for step in found.steps]
    shares = {
        "forward and backward": (
            [1 - step.loading - step.update - (step.communication or 0.0) for step in found.steps],
            BLUE,
        ),
        "loading": ([step.loading for step in found.steps], ORANGE),
        "update": ([step.update for step in found.steps], GREEN),
    }
    if any(step.communication is not None for step in found.steps):
        shares["communication"] = ([step.communication or 0.0 for step in found.steps], PURPLE)
    for name, (values, color) in shares.items():
        bars = go.Bar(x=sizes, y=[100 * value for value in values], name=name, marker={"color": color})
        figure.add_trace(bars.update(hovertemplate="%{x}: %{y:.3~g} %<extra>" + name + "</extra>"))
    names = go.Scatter(x=sizes, y=[100] * len(sizes), mode="text", showlegend=False, hoverinfo="skip")
    text = [step.bottleneck.replace("/", "/<br>").replace(" ", "<br>") for step in found.steps]
    figure.add_trace(names.update(text=text, textposition="top center", cliponaxis=False))
    figure.layout.barmode = "relative"
    figure.layout.xaxis.update(type="category")
    figure.layout.yaxis.range = [0, 120]
    return figure
