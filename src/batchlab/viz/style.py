"""What every picture shares: a small palette that the colour-blind can tell apart, axes with units.

The colours are those of the light page; `DARK` names what the page puts in their place on a dark one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0067a5", "#b84800", "#00735a", "#96407f", "#59636e"
BLUE_BAND, ORANGE_BAND, GREY_BAND = "rgba(0,103,165,0.16)", "rgba(184,72,0,0.14)", "rgba(89,99,110,0.13)"
SERIES = (BLUE, GREEN, PURPLE, GREY)
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "pentagon", "hexagon")
INK, GRID, SURFACE = "#24292f", "#e4e7eb", "#ffffff"

DARK = {
    BLUE: "#62b5ea",
    ORANGE: "#f2924e",
    GREEN: "#45c79d",
    PURPLE: "#e08fc9",
    GREY: "#a3adb8",
    BLUE_BAND: "rgba(98,181,234,0.20)",
    ORANGE_BAND: "rgba(242,146,78,0.18)",
    GREY_BAND: "rgba(163,173,184,0.16)",
    INK: "#dfe3e8",
    GRID: "#333c46",
    SURFACE: "#1a2028",
}


def blank(x_title: str, y_title: str, *, log_x: bool = False, log_y: bool = False) -> Any:
    """A figure with titled axes, a legend above the plot, no title of its own and no global template.

    A second, hidden pair of axes spans the plot from 0 to 1, for lines right across it.
    """
    figure = go.Figure()
    figure.layout.template = None
    axis = {
        "gridcolor": GRID,
        "linecolor": GREY,
        "tickcolor": GREY,
        "ticks": "outside",
        "ticklen": 4,
        "zeroline": False,
        "automargin": True,
        "exponentformat": "SI",
        "minexponent": 4,
    }
    figure.update_xaxes(**axis, type="log" if log_x else "linear", title={"text": x_title, "standoff": 10})
    figure.update_yaxes(**axis, type="log" if log_y else "linear", title={"text": y_title, "standoff": 10})
    whole = {"range": [0, 1], "visible": False, "fixedrange": True}
    figure.update_layout(
        font={"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 12, "r": 16, "t": 12, "b": 12},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.03, "yanchor": "bottom"},
        hoverlabel={"bgcolor": SURFACE, "bordercolor": GREY, "font": {"color": INK}},
        xaxis2={**whole, "overlaying": "x"},
        yaxis2={**whole, "overlaying": "y"},
        showlegend=True,
        hovermode="closest",
    )
    return figure


def spread(values: list[float], low: list[float], high: list[float], color: str) -> dict[str, Any]:
    """Error bars from intervals; a bound that is not finite has no bar on its side."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [_length(bound, value) for value, bound in zip(values, high, strict=True)],
        "arrayminus": [_length(value, bound) for value, bound in zip(values, low, strict=True)],
        "color": color,
        "thickness": 1.4,
        "width": 4,
    }


def _length(upper: float, lower: float) -> float | None:
    length = upper - lower
    return length if 0 <= length < float("inf") else None


def powers_of_two(values: Sequence[float], most: int = 7) -> dict[str, Any]:
    """Ticks of a log axis at powers of two (of four, of eight, ...): at most `most` of them around `values`."""
    low, high = _ends(values)
    if low == 0:
        return {}
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    every = max(1, math.ceil((last - first + 1) / most))
    return _ticks([2.0**k for k in range(first, last + 1, every)])


def decades(values: Sequence[float]) -> dict[str, Any]:
    """Ticks of a log axis at 1, 2, 5, 10, ..., closer on a narrow one, whole decades on one of more than three."""
    low, high = _ends(values)
    if low == 0:
        return {}
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps: tuple[float, ...] = (1,) if last - first > 3 else (1, 2, 5) if high > 6 * low else (1, 1.5, 2, 3, 4, 6, 8)
    every = max(1, math.ceil((last - first) / 7)) if len(steps) == 1 else 1
    return _ticks([step * 10.0**k for k in range(first, last + 1, every) for step in steps])


def _ticks(places: list[float]) -> dict[str, Any]:
    return {"tickmode": "array", "tickvals": places, "ticktext": [_tick(place) for place in places]}


def _tick(value: float) -> str:
    if 1e-4 <= value < 1e4:
        return f"{value:.6g}"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= value < 1000 * size:
            return f"{value / size:.3g}{suffix}"
    exponent = math.floor(math.log10(value) + 1e-9)
    digits = f"{value / 10.0**exponent:.3g}"
    return f"10<sup>{exponent}</sup>" if digits == "1" else f"{digits}×10<sup>{exponent}</sup>"


def _ends(values: Sequence[float]) -> tuple[float, float]:
    shown = [value for value in values if 0 < value < math.inf]
    return (min(shown), max(shown)) if shown else (0.0, 0.0)
