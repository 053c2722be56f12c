"""Nouns as tables for the terminal; every number in them was computed elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from batchlab.core.facts import Facts
from batchlab.core.plan import Plan
from batchlab.measure.findings import Findings
from batchlab.spine import headline
from batchlab.spine.findings_chapters import lines
from batchlab.spine.words import aim, duration, figure, interval, size, steps_said
from batchlab.viz.table import terminal_table
from batchlab.viz.text import visible

if TYPE_CHECKING:
    from batchlab.core.systems import System


def facts_table(facts: Facts) -> Table:
    """What was measured: noise scale, speed, memory, learning rate, target."""
    best = max(facts.micro_batches, key=lambda point: point.examples / point.seconds.value)
    rows = [
        ("Noise scale", interval(facts.noise_scale), f"examples; {facts.noise_scale.method}"),
        ("Largest micro-batch", f"{facts.max_micro_batch:,}", "examples"),
        (
            "Fastest micro-batch",
            f"{best.examples:,}",
            f"{figure(best.examples / best.seconds.value)} examples a second",
        ),
        ("Base learning rate", figure(facts.base_learning_rate), f"{facts.optimizer}, at {facts.base_batch_size}"),
        ("Target", aim(facts.target), f"from the {facts.target_origin}"),
    ]
    if best.memory_bytes is not None:
        rows.insert(3, ("Its memory", size(best.memory_bytes), ""))
    return terminal_table(f"{facts.job} on {facts.device}", rows)


def findings_table(found: Findings) -> Table:
    """What was measured on its own."""
    return terminal_table(f"{found.job} on {found.device}, weights: {found.weights}", lines(found))


def plan_table(plan: Plan, facts: Facts) -> Table:
    """What to run, and what it is predicted to take."""
    rows = headline.settings(plan, facts.unit, facts.units_per_example)
    if plan.prediction is not None:
        rows.append(("Predicted steps", interval(plan.prediction), plan.prediction.method))
        if plan.predicted_step_seconds is not None:
            seconds = plan.prediction.value * plan.predicted_step_seconds
            rows.append(("Predicted time", duration(seconds), "steps × step time"))
    return terminal_table(f"{plan.job}, goal: {plan.goal}", rows)


def frontier_table(plan: Plan) -> Table:
    """Predicted time against cost, the pick marked."""
    table = _grid("Batch size", "Devices", "Steps", "Time", "Device time", "", justify="right")
    for row in plan.frontier:
        cells = [f"{row.batch_size:,}", str(row.devices), steps_said(row.steps)]
        table.add_row(*cells, duration(row.time), duration(row.cost), "picked" if row.picked else "")
    return table


def reasons_table(plan: Plan) -> Table:
    """Every number with its rule, the facts it used, and the source."""
    return _filled(("Number", "Value", "Rule", "Source"), plan.explain())


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of a query, one column a name."""
    names = tuple(rows[0]) if rows else ("no rows",)
    return _filled(names, [[_cell(row[name]) for name in names] for row in rows])


def systems_table(systems: Sequence[System]) -> Table:
    """The implemented systems with their papers and public names."""
    rows = [[f"{s.number:02d}", s.name, s.paper, s.arxiv or "", ", ".join(s.symbols)] for s in systems]
    return _filled(("No.", "System", "Paper", "arXiv", "Names"), rows)


def _filled(names: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = _grid(*names)
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def _grid(*names: str, justify: Literal["left", "right"] = "left") -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        table.add_column(Text(visible(name)), justify=justify)
    return table


def _cell(value: Any) -> str:
    return figure(value) if isinstance(value, float) else "" if value is None else str(value)
