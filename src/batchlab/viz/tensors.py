"""Pictures of what an optimizer did to each tensor, from numbers that others computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from batchlab.viz.style import BLUE, GREEN, GREY, ORANGE, PURPLE, blank, decades
from batchlab.viz.traces import line

NAMED = (BLUE, ORANGE, GREEN, PURPLE)


def update_ratios(by_name: Mapping[str, Sequence[tuple[float, float]]]) -> Any:
    """|Δw|/|w| of each tensor against steps, on a logarithmic axis.

    by_name: points of step and ratio. Those that are last the furthest have a colour and a name, the others are grey.
    """
    drawn = {name: [(x, y) for x, y in points if 0 < y < math.inf] for name, points in by_name.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    ranked = sorted(drawn, key=lambda name: -drawn[name][-1][1])
    values = [y for points in drawn.values() for _, y in points]
    figure = blank("steps", "|Δw|/|w| of one update", log_y=bool(values))
    if values:
        figure.layout.yaxis.update(decades(values))
    figure.layout.xaxis.rangemode = "tozero"
    others = ranked[len(NAMED) :]
    for name in others:
        x, y = zip(*drawn[name], strict=True)
        trace = line(list(x), list(y), "other tensors", GREY, width=0.8)
        trace.update(legendgroup="others", showlegend=name == others[0], hovertext=name)
        figure.add_trace(trace)
    for name, color in zip(ranked, NAMED, strict=False):
        x, y = zip(*drawn[name], strict=True)
        figure.add_trace(line(list(x), list(y), name, color, markers=len(x) < 60))
    return figure
