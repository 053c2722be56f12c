"""Pictures of what a schedule did along a run: the batch size and the learning rate against examples seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchlab.viz.style import BLUE, ORANGE, blank, decades
from batchlab.viz.traces import line

Numbers = Sequence[float]


def batch_course(examples: Numbers, batch_size: Numbers) -> Any:
    """The batch of each update; `examples` is what was seen after it. Logarithmic where it moves by a factor of 4."""
    wide = bool(batch_size) and max(batch_size) >= 4 * min(batch_size)
    figure = blank("training examples seen", "batch size (examples)", log_y=wide)
    if wide:
        figure.layout.yaxis.update(decades(batch_size))
    else:
        figure.layout.yaxis.rangemode = "tozero"
    figure.layout.xaxis.rangemode = "tozero"
    figure.add_trace(line(examples, batch_size, "batch size", ORANGE, shape="vh"))
    return figure


def rate_course(examples: Numbers, rate: Numbers) -> Any:
    """The learning rate of each update against what was seen after it."""
    figure = blank("training examples seen", "learning rate")
    figure.layout.xaxis.rangemode = "tozero"
    figure.layout.yaxis.rangemode = "tozero"
    figure.add_trace(line(examples, rate, "learning rate", BLUE))
    return figure
