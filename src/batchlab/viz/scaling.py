"""Pictures of what sets of runs say about batch size, from numbers that others computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from batchlab.core.facts import Estimate
from batchlab.viz.style import (
    BLUE,
    BLUE_BAND,
    GREEN,
    GREY,
    GREY_BAND,
    ORANGE,
    ORANGE_BAND,
    blank,
    decades,
    powers_of_two,
)
from batchlab.viz.text import label
from batchlab.viz.traces import Interval, add_band, line, log_range, points_with_spread, upright_line

if TYPE_CHECKING:
    from batchlab.measure.runs.data_overhead import Growth
    from batchlab.measure.runs.scaling_regimes import ScalingRegimes
    from batchlab.measure.runs.sfo import SfoComplexity

_AXIS_LABEL = 40


def regimes(found: ScalingRegimes, *, unit: str = "examples") -> Any:
    """Steps to the goal against batch size, log-log, with the line of perfect scaling and where the regimes meet.

    unit: what the batch sizes count. Bands: the intervals of the two ends of the regimes, where they are bounded.
    """
    figure = blank(f"batch size ({unit})", "steps to the goal (updates)", log_x=True, log_y=True)
    measured = [_interval(size, each) for size, each in zip(found.batch_sizes, found.steps, strict=True)]
    figure.layout.xaxis.update(powers_of_two(found.batch_sizes))
    figure.layout.yaxis.update(decades([*(point[1] for point in measured), *found.perfect]))
    figure.add_trace(line(found.batch_sizes, found.perfect, "perfect scaling", GREY, dash="dash"))
    figure.add_trace(points_with_spread(measured, "measured", BLUE, "circle", joined=True))
    for each, name, color, band in (
        (found.perfect_until, "perfect scaling ends", ORANGE, ORANGE_BAND),
        (found.flat_from, "no further gain", GREEN, GREY_BAND),
    ):
        if each.defined:
            figure.add_trace(upright_line(each.value, name, color, "dot"))
        _upright_band(figure, each, found.batch_sizes, band)
    return figure


def evaluations(found: SfoComplexity, *, unit: str = "examples") -> Any:
    """Gradient evaluations N·b to the target against batch size, log-log, with the fitted law's band and its minimum.

    unit: what the batch sizes count. Where there is no critical batch in range, none is drawn.
    """
    figure = blank(f"batch size ({unit})", f"gradient evaluations to the target ({unit})", log_x=True, log_y=True)
    measured = [_interval(size, each) for size, each in zip(found.batch_sizes, found.sfo, strict=True)]
    fitted = [_interval(size, each) for size, each in zip(found.batch_sizes, found.fitted, strict=True)]
    shown = [point for point in fitted if math.isfinite(point[1])]
    values = [point[1] for point in [*measured, *shown]]
    figure.layout.xaxis.update(powers_of_two(found.batch_sizes))
    figure.layout.yaxis.update(decades(values))
    _law_with_band(figure, shown, values, f"{100 * found.u.coverage:.4g} % band of the fit", "fit")
    figure.add_trace(points_with_spread(measured, "measured", BLUE, "circle"))
    if found.critical_batch.defined and found.critical_batch.value > 0:
        figure.add_trace(upright_line(found.critical_batch.value, "critical batch size, fitted", ORANGE, "dot"))
        _upright_band(figure, found.critical_batch, found.batch_sizes, ORANGE_BAND)
    return figure


def growth(found: Growth, predictions: Sequence[tuple[float, Estimate]] = (), *, unit: str = "examples") -> Any:
    """The critical batch size against what it grows with, log-log, with the power law through the points.

    predictions: (size, `found.predict(size)`) at ascending sizes, for the law's line and band. unit: what the batch
    sizes count; the other axis bears the law's own unit.
    """
    size = label(found.unit, _AXIS_LABEL) if found.unit else "size, in the unit given"
    figure = blank(size, f"critical batch size ({unit})", log_x=True, log_y=True)
    along = [_interval(size, each) for size, each in predictions]
    figure.layout.xaxis.update(decades([*found.sizes, *(point[0] for point in along)]))
    values = [*found.critical_batches, *(point[1] for point in along)]
    figure.layout.yaxis.update(decades(values))
    law = f"{found.d.value:.4g}·x^{found.beta.value:.3g}"
    _law_with_band(figure, along, values, "interval of one more point", law)
    points = [(x, y, y, y) for x, y in zip(found.sizes, found.critical_batches, strict=True)]
    figure.add_trace(points_with_spread(points, "measured", BLUE, "circle"))
    return figure


def _interval(x: float, each: Estimate) -> Interval:
    """Low as -inf where it is no bound: a bar down to 0 on a log axis says nothing."""
    return (x, each.value, each.low if each.low > 0 else -math.inf, each.high)


def _law_with_band(figure: Any, along: Sequence[Interval], values: Sequence[float], band: str, law: str) -> None:
    """The law's line and its band; the axis is set by `values`, so that a wide band does not squeeze them."""
    if not along:
        return
    floor, ceiling = log_range(values)
    figure.layout.yaxis.range = [math.log10(floor), math.log10(ceiling)]
    x, value, low, high = (list(column) for column in zip(*along, strict=True))
    columns = {"examples": x, "value": value, "low": low, "high": high}
    add_band(figure, columns, floor, ceiling, color=BLUE_BAND, name=band)
    figure.add_trace(line(x, value, law, GREY))


def _upright_band(figure: Any, each: Estimate, sizes: Sequence[float], color: str) -> None:
    """The interval of a batch size over the whole height, where the data bound it; no further than the grid."""
    left, right = max(each.low, sizes[0]), min(each.high, sizes[-1])
    if left < right and math.isfinite(each.high):
        figure.add_vrect(x0=left, x1=right, fillcolor=color, line_width=0, layer="below")
