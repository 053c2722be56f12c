"""Pictures of the distribution of Adam's updates, from numbers that others computed. Each returns a figure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from batchlab.viz.style import BLUE, BLUE_BAND, GREEN, GREY, ORANGE, PURPLE, SERIES, blank, decades
from batchlab.viz.text import label
from batchlab.viz.traces import Numbers, foot_marks, level_line, line, upright_line

HIGH = 0.8
_DASHES = ("solid", "dash", "dot", "dashdot")


def variance_ratio(layers: Mapping[str, Sequence[tuple[float, float]]], *, alarms: Numbers = ()) -> Any:
    """Variance of each layer's updates against optimizer step, log y, in units of that of independent gradients.

    layers: name -> (step, ratio). alarms: steps at which any layer alarmed, marked along the foot.
    """
    figure = blank("optimizer step", "variance ratio of the update", log_y=True)
    drawn = {name: [point for point in points if point[1] > 0] for name, points in layers.items()}
    for place, (name, points) in enumerate(drawn.items()):
        color, dash = SERIES[place % len(SERIES)], _DASHES[place // len(SERIES) % len(_DASHES)]
        figure.add_trace(line([x for x, _ in points], [y for _, y in points], label(name), color, dash=dash))
    figure.add_trace(level_line(1.0, "independent gradients", GREY))
    _mark(figure, alarms)
    figure.layout.yaxis.update(decades([1.0, *(y for points in drawn.values() for _, y in points)]))
    return figure


def layer_history(columns: Mapping[str, Numbers], *, alarms: Mapping[str, Numbers] | None = None) -> Any:
    """One layer's warning signs against optimizer step, all of them shares or correlations.

    columns: `step`, `high_share`, `lag1`, `eps_share`, `cosine` as in its readings. alarms: name -> steps at which it
    was raised, each marked by an upright line where it first was and along the foot where it held.
    """
    figure = blank("optimizer step", "share of coordinates, or correlation")
    names = {
        "high_share": (f"|u| > {HIGH}", ORANGE),
        "lag1": ("lag-1 correlation of the gradient", BLUE),
        "eps_share": ("√v̂ < ε", PURPLE),
        "cosine": ("cosine of update and gradient", GREEN),
    }
    for column, (name, color) in names.items():
        figure.add_trace(line(columns["step"], columns[column], name, color))
    for name, steps in (alarms or {}).items():
        if steps:
            figure.add_trace(upright_line(min(steps), f"first {label(name)}", GREY, "dash"))
    _mark(figure, [step for steps in (alarms or {}).values() for step in steps])
    return figure


def update_histogram(
    edges: Numbers, density: Numbers, reference: Sequence[tuple[float, float]], *, name: str = ""
) -> Any:
    """The density of one layer's updates u against its Gaussian reference, with the marks |u| = 0.8.

    edges, density: one edge more than bins, of area 1. reference: (u, density) for independent gradients.
    """
    figure = blank("normalised update u of a coordinate", "density of coordinates")
    widths = [b - a for a, b in itertools.pairwise(edges)]
    centres = [a + width / 2 for a, width in zip(edges, widths, strict=False)]
    bars = go.Bar(x=centres, y=list(density), width=widths, name=label(name) if name else "updates")
    bars.update(marker={"color": BLUE_BAND, "line": {"color": BLUE, "width": 1}}, hovertemplate="%{x:.3f}: %{y:.4~g}")
    figure.add_trace(bars)
    figure.add_trace(line([x for x, _ in reference], [y for _, y in reference], "independent gradients", GREY))
    for place, mark in enumerate((-HIGH, HIGH)):
        figure.add_trace(upright_line(mark, f"|u| = {HIGH}", ORANGE, "dot").update(showlegend=place == 0))
    figure.layout.xaxis.range = [min(edges), max(edges)]
    figure.layout.yaxis.rangemode = "tozero"
    return figure


def _mark(figure: Any, alarms: Numbers) -> None:
    if alarms:
        figure.add_trace(foot_marks(sorted(set(alarms)), "alarm"))
