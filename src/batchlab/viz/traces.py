"""The marks that pictures are made of: lines, points with their spread, bands, and lines right across a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from batchlab.viz.style import BLUE_BAND, ORANGE, PURPLE, spread

Numbers = Sequence[float]
Interval = tuple[float, float, float, float]  # x, value, low, high


def line(
    x: Numbers,
    y: Numbers,
    name: str,
    color: str,
    *,
    markers: bool = False,
    width: float = 2,
    dash: str = "solid",
    shape: str = "linear",
) -> Any:
    """A line; with `markers`, or fewer than three points, its points too."""
    return go.Scatter(
        x=list(x),
        y=list(y),
        name=name,
        mode="lines+markers" if markers or len(x) < 3 else "lines",
        line={"color": color, "width": width, "dash": dash, "shape": shape},
        marker={"color": color, "size": 7},
        hovertemplate="%{x:.5~g}: %{y:.4~g}<extra>" + name + "</extra>",
    )


def points_with_spread(points: Sequence[Interval], name: str, color: str, symbol: str, *, joined: bool = False) -> Any:
    """At least one point, each with its interval as error bars; `joined` by a line or not."""
    x, value, low, high = (list(column) for column in zip(*points, strict=True))
    return go.Scatter(
        x=x,
        y=value,
        error_y=spread(value, low, high, color),
        mode="lines+markers" if joined else "markers",
        marker={"color": color, "size": 8, "symbol": symbol},
        line={"color": color, "width": 1.5},
        name=name,
        hovertemplate="%{x:.5~g}: %{y:.4~g}<extra>" + name + "</extra>",
    )


def add_band(
    figure: Any,
    columns: Mapping[str, Numbers],
    floor: float,
    ceiling: float,
    *,
    color: str = BLUE_BAND,
    name: str = "its interval",
) -> None:
    """The area between `low` and `high`; an edge beyond what a log axis shows is drawn at the plot's own edge."""
    if len(columns["value"]) < 2 or not floor < ceiling:
        return
    x = list(columns["examples"])
    high = [min(bound, ceiling * 10) for bound in columns["high"]]
    low = [max(bound, floor / 10) for bound in columns["low"]]
    figure.add_trace(
        go.Scatter(
            x=x + x[::-1],
            y=high + low[::-1],
            fill="toself",
            fillcolor=color,
            line={"width": 0, "color": color},
            mode="lines",
            hoverinfo="skip",
            name=name,
        )
    )


def log_range(values: Sequence[float]) -> tuple[float, float]:
    """Axis ends around what is positive and finite; (0, 0) where nothing is."""
    shown = [value for value in values if 0 < value < math.inf]
    return (min(shown) / 3, max(shown) * 3) if shown else (0.0, 0.0)


def level_line(y: float, name: str, color: str) -> Any:
    """A level line across the plot that has a place in the legend."""
    line = go.Scatter(x=[0, 1], y=[y, y], xaxis="x2", mode="lines", name=name)
    return line.update(line={"color": color, "dash": "dot", "width": 2}, hovertemplate="%{y:.4~g}<extra></extra>")


def upright_line(x: float, name: str, color: str, dash: str) -> Any:
    """An upright line over the whole height that has a place in the legend."""
    line = go.Scatter(x=[x, x], y=[0, 1], yaxis="y2", mode="lines", name=name)
    return line.update(line={"color": color, "dash": dash, "width": 2}, hovertemplate="%{x:.5~g}<extra></extra>")


def foot_marks(x: Numbers, name: str) -> Any:
    """Crosses along the foot of a plot."""
    marks = go.Scatter(x=list(x), y=[0.02] * len(x), yaxis="y2", mode="markers", name=name)
    return marks.update(marker={"symbol": "x", "size": 9, "color": PURPLE}, hovertemplate="%{x:.5~g}<extra></extra>")


def add_star(figure: Any, points: Sequence[tuple[float, float]], name: str = "the plan", color: str = ORANGE) -> None:
    """Marks points with a star, if there are any."""
    if points:
        star = go.Scatter(x=[x for x, _ in points], y=[y for _, y in points], mode="markers", name=name)
        figure.add_trace(star.update(marker={"symbol": "star", "size": 15, "color": color}))
