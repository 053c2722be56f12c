"""A run's step lines as columns of numbers, and columns thinned to what a picture can show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]

POINTS = 2000
_NAMES = (
    "step",
    "examples",
    "seconds",
    "batch_size",
    "lr",
    "loss",
    "skipped",
    "capped",
    "noise",
    "noise_low",
    "noise_high",
)


@dataclass(frozen=True)
class Columns:
    """The steps of a run, one entry a step; NaN where there is no number.

    steps: columns `step`, `examples` (seen after the step), `seconds` (summed over steps, evaluations left out),
    `batch_size`, `lr`, `loss`, `skipped`, `capped` (0 or 1), `noise`, `noise_low`, `noise_high`.
    valid: metric -> columns `step`, `examples`, `seconds`, `value` of its evaluations.
    """

    steps: Mapping[str, Column]
    valid: Mapping[str, Mapping[str, Column]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.steps["step"])


def number(value: Any) -> float:
    """A number as the step lines hold it; "nan", "inf" and "-inf" are strings there, and None is NaN.

    >>> number("-inf"), number(None), number(3)
    (-inf, nan, 3.0)
    """
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan


def columns(lines: Iterable[Mapping[str, Any]], initial: Mapping[str, Any] | None = None) -> Columns:
    """The columns of step lines. initial: the evaluation before the first step, if there was one."""
    steps: dict[str, list[float]] = {name: [] for name in _NAMES}
    valid: dict[str, list[tuple[float, float, float, float]]] = {}
    for metric, value in (initial or {}).items():
        valid.setdefault(metric, []).append((0.0, 0.0, 0.0, number(value)))
    seconds = 0.0
    for line in lines:
        seconds += number(line["seconds"])
        noise = line.get("noise_scale") or {}
        row = (
            *(number(line["step"]), number(line["position"]), seconds),
            *(number(line.get(name)) for name in ("batch_size", "lr", "loss")),
            *(float(bool(line.get(name))) for name in ("skipped", "capped")),
            *(number(noise.get(name)) for name in ("value", "low", "high")),
        )
        for name, value in zip(_NAMES, row, strict=True):
            steps[name].append(value)
        for metric, value in (line.get("valid") or {}).items():
            valid.setdefault(metric, []).append((row[0], row[1], seconds, number(value)))
    names = ("step", "examples", "seconds", "value")
    return Columns(
        {name: np.array(values, dtype=np.float64) for name, values in steps.items()},
        {metric: dict(zip(names, np.array(rows, dtype=np.float64).T, strict=True)) for metric, rows in valid.items()},
    )


def thin(values: Column, limit: int = POINTS) -> NDArray[np.intp]:
    """Places of at most `limit` finite values: the first, the last, and each stretch's smallest and largest.

    >>> thin(np.array([3.0, np.nan, 1.0]))
    array([0, 2])
    """
    places = np.flatnonzero(np.isfinite(values))
    if len(places) <= limit:
        return places
    inner = np.array_split(places[1:-1], (limit - 2) // 2)
    extremes = [stretch[pick(values[stretch])] for stretch in inner for pick in (np.argmin, np.argmax)]
    return np.unique(np.array([places[0], *extremes, places[-1]]))


def evenly(count: int, limit: int) -> list[int]:
    """At most `limit` places out of `count`, evenly spread, the first and the last among them."""
    if count <= limit:
        return list(range(count))
    return sorted({round(place) for place in np.linspace(0, count - 1, limit)})
