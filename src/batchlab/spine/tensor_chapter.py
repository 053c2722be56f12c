"""The part of a run's report on what the optimizer did to each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from batchlab.spine.columns import evenly, number
from batchlab.spine.words import figure
from batchlab.viz.blocks import Chart, Paragraph, Section, Table
from batchlab.viz.tensors import update_ratios

TABLE_ROWS = 30
Row = tuple[float, Mapping[str, Mapping[str, float]]]


def tensors_of(lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The steps whose update was watched, with what was noted of each tensor."""
    return [
        (
            number(line["step"]),
            {name: {what: number(value) for what, value in noted.items()} for name, noted in line["tensors"].items()},
        )
        for line in lines
        if line.get("tensors")
    ]


def tensors(rows: list[Row]) -> Section | None:
    """How far each update moved the tensors, relative to their size; None where nothing was watched."""
    if not rows:
        return None
    rows = [rows[place] for place in evenly(len(rows), 500)]
    by_name = {
        name: [(step, found[name]["update_ratio"]) for step, found in rows if name in found] for name in rows[-1][1]
    }
    chart = Chart(
        "update-ratio",
        "How far an update moves each tensor",
        "|Δw|/|w| at the evaluated steps. A tensor far above the others limits the learning rate of all.",
        update_ratios(by_name),
        _table(rows[-1]),
    )
    said = "Of models with more than 64 tensors the largest are watched."
    return Section("tensors", "What the optimizer did", [chart, Paragraph(said, quiet=True)])


def _table(last: Row) -> Table:
    step, found = last
    kinds = list(dict.fromkeys(what for noted in found.values() for what in noted))
    ranked = sorted(found, key=lambda name: -_finite(found[name].get("update_ratio", 0.0)))[:TABLE_ROWS]
    cells = [(name, *(figure(found[name][what]) if what in found[name] else "" for what in kinds)) for name in ranked]
    heads = ("Tensor", *(kind.replace("_", " ").capitalize() for kind in kinds))
    return Table(f"Tensors at step {step:,.0f}, the furthest moved first", heads, cells)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
