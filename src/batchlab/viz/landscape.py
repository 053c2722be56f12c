"""Pictures of loss landscapes, from numbers that others computed. Each function returns a figure and shows nothing.

Losses are in the job's own unit; steps are multiples of a direction. Losses that are not finite are not drawn, and
where there are some their places are marked. A loss that is positive and spans more than a factor of ten has a
logarithmic axis or scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from batchlab.viz.style import (
    BLUE,
    BLUE_BAND,
    GREEN,
    GREY,
    GREY_BAND,
    GRID,
    INK,
    ORANGE,
    ORANGE_BAND,
    SURFACE,
    blank,
    decades,
)
from batchlab.viz.text import label
from batchlab.viz.traces import Interval, Numbers, level_line, upright_line

Grid = Sequence[Numbers]

LOSS = "loss (the job's own unit)"
SCALE = "Cividis"
_COLORS = ((BLUE, BLUE_BAND, "solid"), (ORANGE, ORANGE_BAND, "dash"), (GREEN, GREY_BAND, "dot"))
_WIDE = 10.0
_LEVELS = 14


def loss_curves(
    models: Mapping[str, Sequence[Interval]], *, level: float | None = None, x_title: str = "step along the direction"
) -> Any:
    """Loss against the step along random directions: the median over directions in the range of all of them.

    models: name -> (step, median, least, largest) at each step; up to three, as a small and a large batch's minimum.
    level: a loss to mark with a line, as that at which a width is measured, f(0) + level.
    """
    values = [value for points in models.values() for point in points for value in point[1:]]
    wide = _is_wide(values)
    figure = blank(x_title, LOSS, log_y=wide)
    floor, ceiling = _ends(values)
    for (name, points), (color, band, dash) in zip(models.items(), _COLORS, strict=False):
        _add_range(figure, points, ceiling, band, label(name))
        shown = [(a, middle) for a, middle, _, _ in points]
        figure.add_trace(_curve(shown, f"{label(name)}: median", color, dash))
        _mark_lost(figure, [a for a, middle, _, _ in points if math.isinf(middle)], f"{label(name)}: not finite", color)
    if level is not None:
        figure.add_trace(level_line(level, "level of the width", GREY))
    return _scaled(figure, floor, ceiling, wide)


def interpolation(
    x: Numbers,
    losses: Numbers,
    *,
    names: tuple[str, str] = ("first model", "second model"),
    valid: Numbers | None = None,
) -> Any:
    """Loss on the straight line through two models, at 0 and 1. valid: the same on other data."""
    every = [*losses, *(valid or ())]
    wide = _is_wide(every)
    figure = blank("place between the models (0 and 1)", LOSS, log_y=wide)
    figure.add_trace(_curve(list(zip(x, losses, strict=True)), "loss" if valid is None else "training", BLUE, "solid"))
    if valid is not None:
        figure.add_trace(_curve(list(zip(x, valid, strict=True)), "validation", ORANGE, "dash"))
    for place, name in zip((0, 1), names, strict=True):
        figure.add_trace(upright_line(place, label(name), (GREEN, GREY)[place], ("dash", "dot")[place]))
    _mark_lost(figure, [a for a, loss in zip(x, losses, strict=True) if math.isinf(loss)], "not finite", ORANGE)
    return _scaled(figure, *_ends(every), wide)


def loss_contour(
    x: Numbers,
    y: Numbers,
    losses: Grid,
    *,
    path: Sequence[tuple[float, float]] = (),
    explained: Sequence[float] = (),
) -> Any:
    """Level lines of the loss over a plane, and the path of training on it.

    losses: `losses[i][j]` at (x[i], y[j]). path: (x, y) of checkpoints, first to last. explained: the share of the
    path's variance along each axis, 0 to 1, written on the axes.
    """
    titles = [_axis_title(place, explained) for place in (0, 1)]
    figure = blank(*titles)
    wide = _is_wide([loss for row in losses for loss in row])
    z = _columns(losses, wide)
    low, high = _ends([value for row in z for value in row if value is not None])
    figure.add_trace(
        go.Contour(
            x=list(x), y=list(y), z=z, customdata=_columns(losses, False), colorscale=SCALE, ncontours=_LEVELS,
            contours=_levels(low, high), line={"width": 0.8, "color": SURFACE}, connectgaps=False,
            colorbar=_colorbar("loss", low, high, wide), name="loss", showlegend=False,
            hovertemplate="%{x:.4~g}, %{y:.4~g}: loss %{customdata:.4~g}<extra></extra>",
        )
    )  # fmt: skip
    _mark_lost_places(figure, x, y, losses)
    if path:
        _add_path(figure, path)
    else:
        _add_centre(figure)
    return _planar(figure, x, y)


def loss_surface(x: Numbers, y: Numbers, losses: Grid) -> Any:
    """The loss over a plane as a surface in three dimensions; `losses[i][j]` at (x[i], y[j])."""
    figure = blank("", "")
    wide = _is_wide([loss for row in losses for loss in row])
    z = _columns(losses, wide)
    low, high = _ends([value for row in z for value in row if value is not None])
    figure.add_trace(
        go.Surface(
            x=list(x), y=list(y), z=z, customdata=_columns(losses, False), colorscale=SCALE, name="loss",
            colorbar=_colorbar("loss", low, high, wide), showlegend=False,
            hovertemplate="%{x:.4~g}, %{y:.4~g}: loss %{customdata:.4~g}<extra></extra>",
        )
    )  # fmt: skip
    axis = {"gridcolor": GRID, "zeroline": False, "color": INK, "backgroundcolor": "rgba(0,0,0,0)"}
    scene = {
        f"{name}axis": {**axis, "title": {"text": text}}
        for name, text in zip("xyz", ("direction 1", "direction 2", "loss"), strict=True)
    }
    scene["zaxis"] |= _ticks(low, high, wide)
    view = {"eye": {"x": 1.2, "y": -1.3, "z": 0.75}}
    figure.update_layout(scene={**scene, "camera": view, "aspectratio": {"x": 1, "y": 1, "z": 0.7}}, showlegend=False)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def hessian_ratio(x: Numbers, y: Numbers, ratios: Grid, *, path: Sequence[tuple[float, float]] = ()) -> Any:
    """|λ_min/λ_max| over a plane: near 0 where the loss is nearly convex. `ratios[i][j]` at (x[i], y[j])."""
    figure = blank(*(_axis_title(place, ()) for place in (0, 1)))
    figure.add_trace(
        go.Heatmap(
            x=list(x), y=list(y), z=_columns(ratios, False), colorscale=SCALE, zmin=0, name="ratio", showlegend=False,
            colorbar=_bar("|λ<sub>min</sub>/λ<sub>max</sub>|"),
            hovertemplate="%{x:.4~g}, %{y:.4~g}: ratio %{z:.3~g}<extra></extra>",
        )
    )  # fmt: skip
    if path:
        _add_path(figure, path)
    else:
        _add_centre(figure)
    return figure


_NAMES = ("step along the first direction", "step along the second direction")


def _axis_title(place: int, explained: Sequence[float]) -> str:
    if not explained:
        return _NAMES[place]
    return f"PCA axis {place + 1} ({100 * explained[place]:.3g} % of variance)"


def _curve(points: Sequence[tuple[float, float]], name: str, color: str, dash: str) -> Any:
    y = [value if math.isfinite(value) else None for _, value in points]
    trace = go.Scatter(x=[a for a, _ in points], y=y, mode="lines", name=name, connectgaps=False)
    hover = "%{x:.4~g}: %{y:.4~g}<extra>" + name + "</extra>"
    return trace.update(line={"color": color, "width": 2.2, "dash": dash}, hovertemplate=hover)


def _add_range(figure: Any, points: Sequence[Interval], ceiling: float, color: str, name: str) -> None:
    """From the least to the largest of all directions; an infinite one runs out of the plot."""
    inside = [(a, low, high) for a, _, low, high in points if math.isfinite(low)]
    x = [a for a, _, _ in inside]
    top = [high if math.isfinite(high) else 10 * ceiling for _, _, high in inside]
    bottom = [low for _, low, _ in inside]
    outline: Any = go.Scatter(x=x + x[::-1], y=top + bottom[::-1], fill="toself", fillcolor=color, mode="lines")
    outline.update(line={"width": 0, "color": color}, hoverinfo="skip", name=f"{name}: all directions")
    figure.add_trace(outline)


def _mark_lost(figure: Any, places: Numbers, name: str, color: str) -> None:
    if places:
        marks = go.Scatter(x=list(places), y=[0.97] * len(places), yaxis="y2", mode="markers", name=name)
        marks.update(marker={"symbol": "x", "size": 8, "color": color}, hovertemplate="%{x:.4~g}<extra></extra>")
        figure.add_trace(marks)


def _mark_lost_places(figure: Any, x: Numbers, y: Numbers, losses: Grid) -> None:
    places = [(x[i], y[j]) for i, row in enumerate(losses) for j, loss in enumerate(row) if math.isinf(loss)]
    if places:
        marks = go.Scatter(x=[a for a, _ in places], y=[b for _, b in places], mode="markers", name="not finite")
        figure.add_trace(marks.update(marker={"symbol": "x", "size": 7, "color": ORANGE}))


def _add_path(figure: Any, path: Sequence[tuple[float, float]]) -> None:
    x, y = [a for a, _ in path], [b for _, b in path]
    trace = go.Scatter(x=x, y=y, mode="lines+markers", name="path of training")
    trace.update(line={"color": ORANGE, "width": 2}, marker={"color": ORANGE, "size": 6})
    figure.add_trace(trace.update(marker={"line": {"color": SURFACE, "width": 1}}))
    for place, name, symbol in ((0, "start", "diamond"), (-1, "end", "star")):
        mark = go.Scatter(x=[x[place]], y=[y[place]], mode="markers", name=name)
        mark.update(marker={"symbol": symbol, "size": 13, "color": ORANGE, "line": {"color": SURFACE, "width": 1.5}})
        figure.add_trace(mark)


def _add_centre(figure: Any) -> None:
    mark = go.Scatter(x=[0], y=[0], mode="markers", name="the weights")
    mark.update(marker={"symbol": "star", "size": 13, "color": ORANGE, "line": {"color": SURFACE, "width": 1.5}})
    figure.add_trace(mark)


def _planar(figure: Any, x: Numbers, y: Numbers) -> Any:
    figure.update_layout(xaxis={"range": [min(x), max(x)], "showgrid": False})
    return figure.update_layout(yaxis={"range": [min(y), max(y)], "showgrid": False})


def _columns(values: Grid, logarithm: bool) -> list[list[float | None]]:
    """A row for each y, as plotly has them; None where a value is not finite, its decimal logarithm if asked for."""
    return [[_shown(value, logarithm) for value in column] for column in zip(*values, strict=True)]


def _shown(value: float, logarithm: bool) -> float | None:
    if not math.isfinite(value):
        return None
    return math.log10(value) if logarithm else value


def _is_wide(values: Numbers) -> bool:
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > _WIDE * min(finite)


def _ends(values: Numbers) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 1.0)


def _scaled(figure: Any, floor: float, ceiling: float, wide: bool) -> Any:
    if wide:
        figure.layout.yaxis.update(decades([floor, ceiling]))
        return figure.update_layout(yaxis={"range": [math.log10(floor / 1.3), math.log10(ceiling * 1.3)]})
    margin = 0.06 * (ceiling - floor or 1.0)
    return figure.update_layout(yaxis={"range": [floor - margin, ceiling + margin]})


def _levels(low: float, high: float) -> dict[str, Any]:
    return {"start": low, "end": high, "size": (high - low or 1.0) / _LEVELS}


def _ticks(low: float, high: float, wide: bool) -> dict[str, Any]:
    """Ticks of an axis that holds logarithms, with the values themselves."""
    if not wide:
        return {}
    ticks = decades([10**low, 10**high])
    return {**ticks, "tickvals": [math.log10(value) for value in ticks["tickvals"]]}


def _bar(title: str) -> dict[str, Any]:
    return {"title": {"text": title, "side": "right"}, "thickness": 14, "outlinewidth": 0, "tickcolor": GREY}


def _colorbar(title: str, low: float, high: float, wide: bool) -> dict[str, Any]:
    return {**_bar(title), **_ticks(low, high, wide)}
