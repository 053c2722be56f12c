"""The part of a run's report on what was scheduled: the batch and the learning rate, along the examples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batchlab.core.plan import Plan
from batchlab.spine.columns import POINTS, Column, Columns, evenly, thin
from batchlab.spine.headline import ENDS, MOVES, cap
from batchlab.spine.words import figure, plural
from batchlab.viz.blocks import Block, Chart, Paragraph, Row, Section, Table
from batchlab.viz.course import batch_course, rate_course

TABLE_ROWS = 20


def course(plan: Plan, taken: Columns) -> Section | None:
    """Batch size and learning rate along training; None where neither of them moved, or was to move."""
    size, rate = taken.steps["batch_size"], taken.steps["lr"]
    fixed = plan.batch_schedule == "fixed"
    if len(taken) < 2 or (_still(size) and _still(rate) and fixed):
        return None
    examples = taken.steps["examples"]
    kept = _ends(size) if len(_ends(size)) <= POINTS else thin(size)
    table = _table(examples, size, rate)
    charts = [
        Chart(
            "batch-course",
            "Batch size",
            f"Begun with {plural(plan.batch_size, 'example')}; it {MOVES[plan.batch_schedule]}."
            if not fixed
            else "The same in each step.",
            batch_course(examples[kept].tolist(), size[kept].tolist()),
            table,
        ),
        Chart(
            "rate-course",
            "Learning rate",
            f"A function of the examples seen: {'warm-up, ' if plan.warmup_examples else ''}{ENDS[plan.schedule]}.",
            rate_course(examples[thin(rate)].tolist(), rate[thin(rate)].tolist()),
            table,
        ),
    ]
    blocks: list[Block] = [Row(charts)]
    if not (_still(size) and fixed):
        blocks.append(Paragraph(_moved(plan, size) + _held(plan, taken), quiet=True))
    return Section("course", "Batch size and learning rate along training", blocks)


def _moved(plan: Plan, size: Column) -> str:
    """What the moves came to, beside a batch that stays."""
    if _still(size):
        return f"It never moved: {plural(int(size[0]), 'example')} in each of {plural(len(size), 'update')}."
    changes = plural(int(np.count_nonzero(np.diff(size))), "change")
    fixed = float(size.sum()) / plan.batch_size
    return (
        f"{changes}, from {size.min():,.0f} to {size.max():,.0f} examples: {plural(len(size), 'update')}, where a "
        f"fixed batch of {plan.batch_size:,} would have taken {figure(fixed)} for as many examples. With the batch the "
        f"learning rate moved by the rule {plan.learning_rate_rule!r}."
    )


def _held(plan: Plan, taken: Columns) -> str:
    """Where a larger batch was wanted than was allowed."""
    count = int(taken.steps["capped"].sum())
    if not count:
        return ""
    allowed = cap(plan, int(taken.steps["batch_size"].max()))
    return f" In {plural(count, 'update')} it would have been larger but for its maximum, {allowed}."


def _still(values: Column) -> bool:
    return bool(np.all(values == values[0]))


def _ends(values: Column) -> NDArray[np.intp]:
    """Both sides of each change, the first and the last."""
    at = np.flatnonzero(np.diff(values))
    return np.unique(np.concatenate([[0], at, at + 1, [len(values) - 1]])).astype(np.intp)


def _table(examples: Column, size: Column, rate: Column) -> Table:
    ends = _ends(size).tolist()
    places = ends if TABLE_ROWS >= len(ends) > 2 else evenly(len(size), TABLE_ROWS)
    cells = [(f"{examples[at]:,.0f}", f"{size[at]:,.0f}", figure(float(rate[at]))) for at in places]
    return Table("Batch size and learning rate", ("Examples seen", "Batch size (examples)", "Learning rate"), cells)
