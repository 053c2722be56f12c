"""The part of a study's report that says where more batch stops helping, and what data it costs."""

from __future__ import annotations

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.study import Study
from batchlab.measure.runs.data_overhead import CriticalBatch, critical_batch
from batchlab.measure.runs.scaling_regimes import ScalingRegimes, perfect_scaling_limit
from batchlab.spine.words import figure
from batchlab.viz import scaling
from batchlab.viz.blocks import Block, Bullets, Chart, Paragraph, Section, Table, Tiles

TITLE = "Where more batch stops helping"


def where_more_batch_helps(study: Study) -> Section:
    """Perfect scaling, diminishing returns, no further gain; where the study does not tell, why not."""
    try:
        found = perfect_scaling_limit(study)
    except InputError as error:
        return Section("more-batch", TITLE, [Paragraph(f"Not known yet: {error}.", quiet=True)])
    critical, notes = _critical(study)
    chart = Chart(
        "regimes",
        "Steps to target against perfect scaling",
        "On the dashed line, twice the batch halves the steps. Bands: where each regime may end.",
        scaling.regimes(found),
        _table(found),
    )
    notes = [note for note in (*found.note.split("; "), *notes) if note]
    blocks: list[Block] = [Tiles(_tiles(found, critical)), chart, *([Bullets(notes)] if notes else [])]
    return Section("more-batch", TITLE, blocks)


def _critical(study: Study) -> tuple[CriticalBatch | None, list[str]]:
    """B*, or why there is none."""
    runs = [(row["batch_size"], steps) for row in study.rows() for steps in row["steps"]]
    try:
        return critical_batch([size for size, _ in runs], [steps for _, steps in runs]), []
    except InputError as error:
        return None, [f"B* is not known: {error}"]


def _tiles(found: ScalingRegimes, critical: CriticalBatch | None) -> list[tuple[str, str, str]]:
    share = f"{100 * found.tolerance:g} %"
    lines = [
        ("Perfect scaling until", *_told(found.perfect_until, f"steps within {share} of it, from {found.base:g} on")),
        ("No further gain from", *_told(found.flat_from, "the smallest size tried")),
    ]
    if critical is not None:
        share = f"{100 * critical.overhead:g} %"
        lines.append(("Critical batch size B*", *_told(critical.size, f"{share} more data than at {critical.base:g}")))
    return lines


def _told(estimate: Estimate, remark: str) -> tuple[str, str]:
    if not estimate.defined:
        return "not reached", "beyond the sizes tried"
    ends = f"{figure(float(f'{estimate.low:.3g}'))} to {figure(float(f'{estimate.high:.3g}'))}"
    return figure(float(f"{estimate.value:.3g}")), f"{remark}; {100 * estimate.coverage:.4g} % interval {ends}"


def _table(found: ScalingRegimes) -> Table:
    columns = zip(found.batch_sizes, found.steps, found.perfect, [None, *found.slopes], strict=True)
    cells = [
        (
            f"{size:,g}",
            figure(float(f"{steps.value:.4g}")),
            figure(float(f"{perfect:.4g}")),
            "" if slope is None else f"{slope:.2f}",
            found.regime(size),
        )
        for size, steps, perfect, slope in columns
    ]
    names = ("Batch size (examples)", "Steps, mean of seeds", "Perfect scaling", "Slope from the size before", "Regime")
    return Table("Steps against perfect scaling", names, cells)
