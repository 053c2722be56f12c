"""Pictures of a study of learning rate and batch size, from numbers that others computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from batchlab.viz.landscape import SCALE
from batchlab.viz.style import GREY, ORANGE, SERIES, SURFACE, SYMBOLS, blank, decades, powers_of_two
from batchlab.viz.text import label
from batchlab.viz.traces import line, points_with_spread

if TYPE_CHECKING:
    from batchlab.rules.ratio_nouns import LrToBatch, RatioCell

_MARK = 28
_ROOM = 0.35  # of a decade or an octave around the cells
_DASHES = ("solid", "dash", "dot", "dashdot")


def score_map(found: LrToBatch, task: str, *, unit: str = "examples") -> Any:
    """The score of each cell over batch size and learning rate, log-log, with lines of equal ratio at round ratios.

    Where the ratio alone counts, the colour does not change along a line. A star marks the task's best cell, and a ring
    the best for all tasks. unit: what the batch sizes count.
    """
    told, cells = found.task(task), found.cells
    figure = blank(f"batch size ({unit})", "peak learning rate", log_x=True, log_y=True)
    sizes, rates = [cell.batch_size for cell in cells], [cell.learning_rate for cell in cells]
    figure.layout.xaxis.update(powers_of_two(sizes))
    figure.layout.yaxis.update(decades(rates))
    ends = _around(sizes, math.log10(2) * _ROOM)
    figure.layout.xaxis.range, figure.layout.yaxis.range = ends, _around(rates, _ROOM)
    _add_equal_ratios(figure, [cell.ratio for cell in cells], (10 ** ends[0], 10 ** ends[1]))
    values = [score.value for score in told.scores]
    marks = {"symbol": "square", "size": _MARK, "color": values, "colorscale": SCALE, "showscale": True}
    marks |= {"line": {"width": 1, "color": SURFACE}, "colorbar": {"title": {"text": label(task)}, "thickness": 14}}
    squares = go.Scatter(x=sizes, y=rates, mode="markers", marker=marks, name=label(task), showlegend=False)
    hover = "batch size %{x:.5~g}, learning rate %{y:.3~g}: %{marker.color:.4~g}<extra></extra>"
    figure.add_trace(squares.update(hovertemplate=hover))
    _mark(figure, cells[found.compromise], "best for all tasks", {"symbol": "circle-open", "size": 22, "line.width": 3})
    _mark(figure, cells[told.best], "best", {"symbol": "star", "size": 14})
    return figure


def _around(values: Sequence[float], room: float) -> tuple[float, float]:
    """The ends of a log axis, in decades."""
    return math.log10(min(values)) - room, math.log10(max(values)) + room


def _add_equal_ratios(figure: Any, ratios: Sequence[float], ends: tuple[float, float]) -> None:
    ticks = decades(ratios)
    inside = [
        (ratio, text)
        for ratio, text in zip(ticks["tickvals"], ticks["ticktext"], strict=True)
        if min(ratios) / 2 <= ratio <= max(ratios) * 2
    ]
    for place, (ratio, text) in enumerate(inside):
        trace = line(ends, [ratio * size for size in ends], "equal ratio", GREY, width=1, dash="dot")
        trace.update(mode="lines", showlegend=place == 0, legendgroup="equal ratio")
        figure.add_trace(trace.update(hovertemplate=f"learning rate / batch size {text}<extra></extra>"))


def _mark(figure: Any, cell: RatioCell, name: str, marker: dict[str, Any]) -> None:
    trace = go.Scatter(x=[cell.batch_size], y=[cell.learning_rate], mode="markers", name=name, hoverinfo="skip")
    figure.add_trace(trace.update(marker=marker | {"color": ORANGE}))


def score_by_ratio(found: LrToBatch, task: str, *, unit: str = "examples") -> Any:
    """The score of each cell against its ratio, a colour for each batch size, and the mean at each ratio of several.

    Where the ratio alone counts, all batch sizes lie on one curve. Bars: intervals over seeds. unit: what the batch
    sizes count.
    """
    told = found.task(task)
    figure = blank("learning rate / batch size", label(task), log_x=True)
    figure.layout.xaxis.update(decades([point.ratio for point in told.by_ratio]))
    for place, size in enumerate(sorted({cell.batch_size for cell in found.cells})):
        points = sorted(
            (cell.ratio, score.value, score.low, score.high)
            for cell, score in zip(found.cells, told.scores, strict=True)
            if cell.batch_size == size
        )
        color, symbol = SERIES[place % len(SERIES)], SYMBOLS[place % len(SYMBOLS)]
        trace = points_with_spread(points, f"batch size {size} ({unit})", color, symbol, joined=True)
        figure.add_trace(trace.update(line={"dash": _DASHES[place // len(SERIES) % len(_DASHES)]}))
    along = [(point.ratio, point.score.value) for point in told.by_ratio if point.cells > 1]
    if along:
        x, y = zip(*along, strict=True)
        figure.add_trace(line(x, y, "mean at equal ratio", ORANGE, width=3))
    return figure
