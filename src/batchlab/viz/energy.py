"""Pictures of measured energy, from numbers that others computed. Each returns a figure and shows nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from batchlab.core.facts import Estimate
from batchlab.viz.style import BLUE, GREY, ORANGE, PURPLE, SERIES, blank, spread
from batchlab.viz.text import label

ROW_PIXELS, FRAME_PIXELS = 34, 130


def energy_comparison(rows: Sequence[tuple[str, Estimate, Estimate]], *, per: str = "run") -> Any:
    """Joules of each configuration with their interval, and beside them the watts, which may rank otherwise.

    rows: (name, joules, watts), the first at the top; what is not known is not drawn. per: what the joules are for.
    The least of each column is filled.
    """
    figure = blank(f"energy (joules per {label(per)})", "")
    names = [label(name) for name, _, _ in rows]
    _column(figure, names, [joules for _, joules, _ in rows], "energy", BLUE, "circle", "x")
    _column(figure, names, [watts for _, _, watts in rows], "mean power", ORANGE, "diamond", "x3")
    grid = figure.layout.xaxis.to_plotly_json()
    grid.update(title={"text": "mean power (watts)", "standoff": 10}, domain=[0.58, 1.0], anchor="y")
    figure.update_layout(xaxis3=grid, height=FRAME_PIXELS + ROW_PIXELS * len(rows))
    figure.layout.xaxis.update(domain=[0.0, 0.5])
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=names[::-1], selector={"overlaying": None}
    )
    return figure


def _column(
    figure: Any, names: Sequence[str], values: Sequence[Estimate], title: str, color: str, symbol: str, axis: str
) -> None:
    known = [(name, each) for name, each in zip(names, values, strict=True) if each.defined]
    least = min((each.value for _, each in known), default=0.0)
    numbers = [each.value for _, each in known]
    trace = go.Scatter(x=numbers, y=[name for name, _ in known], mode="markers", name=title, xaxis=axis)
    bars = spread(numbers, [each.low for _, each in known], [each.high for _, each in known], color)
    fill = [color if value == least else "rgba(0,0,0,0)" for value in numbers]
    marker = {"color": fill, "size": 10, "symbol": symbol, "line": {"color": color, "width": 2}}
    hover = "%{y}: %{x:.4~g}<extra>" + title + "</extra>"
    figure.add_trace(trace.update(error_x=bars, marker=marker, hovertemplate=hover))


def energy_components(rows: Sequence[tuple[str, Sequence[tuple[str, float, str]]]]) -> Any:
    """What each block or configuration used, split by component, one bar each; estimates are hatched.

    rows: (name, ((component, joules, source), ...)), source as "counter", "sampled" or "estimated".
    """
    figure = blank("energy (joules)", "")
    names = [label(name) for name, _ in rows]
    components = list(dict.fromkeys(component for _, parts in rows for component, _, _ in parts))
    colors = (*SERIES, ORANGE, PURPLE, GREY)
    for place, component in enumerate(components):
        found = [
            (name, joules, source)
            for name, (_, parts) in zip(names, rows, strict=True)
            for each, joules, source in parts
            if each == component
        ]
        bar = go.Bar(x=[joules for _, joules, _ in found], y=[name for name, _, _ in found], orientation="h")
        hatched = ["/" if source == "estimated" else "" for _, _, source in found]
        marker = {"color": colors[place % len(colors)], "pattern": {"shape": hatched, "fillmode": "replace"}}
        sources = sorted({source for _, _, source in found})
        bar.update(name=f"{label(component)} ({', '.join(map(label, sources))})", marker=marker)
        figure.add_trace(bar.update(hovertemplate="%{y}: %{x:.4~g} J<extra>" + label(component) + "</extra>"))
    figure.update_layout(barmode="stack", height=FRAME_PIXELS + ROW_PIXELS * len(rows), legend_traceorder="normal")
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=names[::-1], selector={"overlaying": None}
    )
    return figure
