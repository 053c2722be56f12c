"""Pictures of a loss's curvature, from numbers that others computed. Each returns a figure and shows nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchlab.viz.style import BLUE, GREEN, GREY, ORANGE, ORANGE_BAND, blank, decades, powers_of_two
from batchlab.viz.traces import (
    Interval,
    Numbers,
    add_band,
    level_line,
    line,
    log_range,
    points_with_spread,
    upright_line,
)

_BELOW = 1e-6


def spectral_density(
    grid: Numbers, density: Numbers, *, largest: float | None = None, smallest: float | None = None
) -> Any:
    """The density of the Hessian's eigenvalues, log y down to a millionth of its peak; the extreme ones upright.

    grid, density: eigenvalues, and the density at each, of area 1.
    """
    figure = blank("eigenvalue of the Hessian", "density of eigenvalues", log_y=True)
    floor = _BELOW * max(density, default=0.0)
    shown = [(x, y) for x, y in zip(grid, density, strict=True) if y > floor]
    figure.add_trace(line([x for x, _ in shown], [y for _, y in shown], "spectral density", BLUE))
    for value, name, color in ((largest, "largest", ORANGE), (smallest, "most negative", GREEN)):
        if value is not None:
            figure.add_trace(upright_line(value, name, color, "dash"))
    figure.layout.yaxis.update(decades([y for _, y in shown]))
    return figure


def batch_edge(
    measured: Sequence[Interval], *, law: Sequence[tuple[float, float]] = (), full: float | None = None
) -> Any:
    """The largest eigenvalue of batch Hessians against batch size, log-log.

    measured: (batch size, mean over batches, low, high). law: (batch size, eigenvalue) along the fitted law. full: the
    largest eigenvalue over all examples.
    """
    figure = blank("batch size (examples)", "largest eigenvalue of the batch Hessian", log_x=True, log_y=True)
    if law:
        figure.add_trace(line([x for x, _ in law], [y for _, y in law], "spike law", GREY))
    if measured:
        figure.add_trace(points_with_spread(measured, "measured, mean over batches", BLUE, "circle"))
    if full is not None and full > 0:
        figure.add_trace(level_line(full, "all examples", GREEN))
    figure.layout.xaxis.update(powers_of_two([*(point[0] for point in measured), *(x for x, _ in law)]))
    figure.layout.yaxis.update(decades([*(point[1] for point in measured), *(y for _, y in law)]))
    return figure


def learning_rate_ceiling(
    ceiling: Sequence[Interval], *, measured: Sequence[Interval] = (), used: tuple[float, float] | None = None
) -> Any:
    """The largest stable learning rate against batch size, log-log, with its interval.

    ceiling: (batch size, learning rate, low, high). measured: the same of rates at which training was seen to leave.
    used: the batch size and learning rate that a run has.
    """
    figure = blank("batch size (examples)", "largest stable learning rate", log_x=True, log_y=True)
    x, value, low, high = ([point[k] for point in ceiling] for k in range(4))
    floor, top = log_range([*value, *(point[1] for point in measured)])
    columns = {"examples": x, "value": value, "low": low, "high": high}
    add_band(figure, columns, floor, top, color=ORANGE_BAND, name="its interval")
    figure.add_trace(line(x, value, "ceiling", ORANGE, markers=True))
    if measured:
        figure.add_trace(points_with_spread(measured, "left from here on", BLUE, "diamond"))
    if used is not None:
        figure.add_trace(points_with_spread([(*used, used[1], used[1])], "used", GREEN, "star"))
    figure.layout.xaxis.update(powers_of_two([*x, *(point[0] for point in measured)]))
    figure.layout.yaxis.update(decades([*value, *(point[1] for point in measured)]))
    return figure
