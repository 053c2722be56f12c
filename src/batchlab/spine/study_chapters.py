"""The parts of a study's report, and of a run's that was verified by one: measured against predicted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from batchlab.core.facts import Estimate, Facts
from batchlab.core.jsonio import from_plain
from batchlab.core.plan import Plan
from batchlab.core.study import SEARCH, Study
from batchlab.measure.runs.tradeoff import Tradeoff
from batchlab.planner.prediction import Prediction
from batchlab.spine.columns import number
from batchlab.spine.words import aim, duration, figure, plural
from batchlab.viz import plots
from batchlab.viz.blocks import Block, Bullets, Chart, Paragraph, Row, Section, Table, Tiles, Verdict
from batchlab.viz.traces import Interval

FACTOR = 2.0
CURVE_POINTS = 60

Line = tuple[str, str, str]


def tradeoff_of(study: Study) -> Tradeoff | None:
    """The fitted law, or None where there is none yet."""
    plain = study.summary.get("tradeoff")
    return None if plain is None else from_plain(Tradeoff, plain, source=str(study.path))


def findings(study: Study) -> list[Line]:
    """Measured S_min, E_min and B_crit with intervals, and B_crit predicted."""
    fit, summary = tradeoff_of(study), study.summary
    lines = []
    if fit is None:
        lines.append(("Batch sizes", str(len(summary["rows"])), f"to {aim(study.target)}"))
    else:
        lines += [
            ("Measured critical batch size", *_value_and_range(fit.b_crit, "examples")),
            ("Fewest steps, S_min", *_value_and_range(fit.s_min, "at a very large batch")),
            ("Fewest examples, E_min", *_value_and_range(fit.e_min, "at a very small batch")),
        ]
    predicted = summary.get("predicted")
    if predicted is not None:
        estimate = _as_estimate(predicted)
        lines.insert(0, ("Predicted critical batch size", *_value_and_range(estimate, "from the noise scale")))
    return lines + (_against_best(_known(study), _own_runs(study, {})) if study.plan_trials() else [])


def verdict(study: Study) -> tuple[str, Literal["good", "bad", "open"]]:
    """What the study says of the prediction, in words."""
    summary, fit = study.summary, tradeoff_of(study)
    ratio = summary.get("ratio")
    if summary["status"] != "finished":
        done = sum(row["trials"] for row in summary["rows"])
        return f"The sweep has not finished ({summary['status']}): {plural(done, 'trial')} so far.", "open"
    if fit is None:
        return "Too few batch sizes reached the target to fit the trade-off.", "open"
    if ratio is None:
        return "There was no noise scale to predict the critical batch size from.", "open"
    value = number(ratio["value"] if isinstance(ratio, Mapping) else ratio)
    if not 0 < value < math.inf:
        return "The sweep does not bound the critical batch size, so it cannot judge the prediction.", "open"
    inside = 1 / FACTOR <= value <= FACTOR
    text = f"The measured critical batch size is {figure(float(f'{value:.3g}'))} times the predicted one"
    text += f", {'within' if inside else 'not within'} a factor of {FACTOR:g}"
    if not inside and (said := summary.get("predicted")) is not None:
        told = _as_estimate(said)
        if told.low <= fit.b_crit.high and fit.b_crit.low <= told.high:
            text += ", though the intervals of the two overlap"
            if fit.bracketed:
                return f"{text}: more trials would tell.", "open"
    if not fit.bracketed:
        return f"{text}; the sweep does not bound it on both sides.", "open"
    return f"{text}.", "good" if inside else "bad"


def found(study: Study) -> Section:
    """A study's first part."""
    text, tone = verdict(study)
    return Section("what-to-do", "What the sweep found", [Tiles(findings(study)), Verdict(text, tone)])


def measured_against_predicted(study: Study, facts: Facts | None, plan: Plan | None, run: Mapping[str, Any]) -> Section:
    """Steps and time to target at each batch size beside what was predicted. run: the summary of the plan's run."""
    rows, known = study.summary["rows"], _known(study)
    if not known:
        none = "No batch size has reached the target yet."
        return Section("measured", "Measured against predicted", [Paragraph(none, quiet=True)])
    fit, own = tradeoff_of(study), None if plan is None else _own_runs(study, run)
    steps = Chart(
        "tradeoff",
        "Steps to target against batch size",
        f"To {aim(study.target)}. Points: median and range of fresh seeds; band: where a run should fall.",
        plots.tradeoff(
            [_interval_of(row) for row in known],
            fit=_fit_curve(fit, known) if fit else (),
            predicted=_predicted_curve(facts, known),
            run=(plan.batch_size, own[0]) if plan is not None and own else None,
        ),
        row_table(rows),
    )
    time = Chart(
        "time-measured",
        "Time to target against batch size",
        "Training time only, at the learning rate tuned for each batch size.",
        plots.time_measured(
            [(row["batch_size"], row["seconds"], row["seconds"], row["seconds"]) for row in known],
            run=(plan.batch_size, own[1]) if plan is not None and own else None,
        ),
        row_table(rows),
    )
    blocks: list[Block] = [Row([steps, time])]
    if plan is not None:
        text, tone = verdict(study)
        first = [] if study.plan_trials() else _against_best(known, own)
        blocks = [Tiles([*findings(study), *first]), Verdict(text, tone), *blocks]
        blocks += [Bullets(notes)] if (notes := _notes(study)) else []
    return Section("measured", "Measured against predicted", blocks)


def tuned(study: Study, plan: Plan | None = None) -> Section:
    """The learning rate tuned for each batch size, and every trial behind it."""
    rows = study.summary["rows"]
    best = [(row["batch_size"], row["learning_rate"]) for row in rows if row["learning_rate"] is not None]
    if not best:
        return Section("tuned", "Tuned learning rates", [Paragraph("No trial has reached the target yet.", quiet=True)])
    trials = [t for t in study.trials() if t["kind"] == SEARCH]
    met = [t for t in trials if t["steps_to_target"] is not None]
    points: dict[int, list[tuple[float, float]]] = {}
    for trial in met:
        points.setdefault(trial["batch_size"], []).append((trial["learning_rate"], trial["steps_to_target"]))
    cells = [
        (str(t["batch_size"]), _rate(t["learning_rate"]), str(t["steps_to_target"] or "none"), str(t["status"]))
        for t in trials
    ]
    names = ("Batch size (examples)", "Learning rate", "Steps to target", "Status")
    charts = [
        Chart(
            "tuned-rates",
            "Best learning rate at each batch size",
            "Found by search at that batch size alone.",
            plots.tuned_rates(best, (plan.batch_size, plan.learning_rate) if plan else None),
            row_table(rows),
        ),
        Chart(
            "rate-search",
            "Every trial that met the target",
            "Lower is better; each batch size has its own best place.",
            plots.rate_search(points),
            Table("Trials of the search", names, cells),
        ),
    ]
    return Section("tuned", "Tuned learning rates", [Row(charts)])


def all_rows(study: Study) -> Section:
    """Every batch size in one table."""
    return Section("rows", "Every batch size", [row_table(study.summary["rows"])])


def sweep_limits(study: Study) -> Section:
    """What a sweep leaves open, and its notes."""
    known = [
        "It holds for this job, target, data, optimizer and schedule, on this machine.",
        "Only the learning rate was tuned for each batch size; other settings move with it by rule.",
        "The steps of a search's winner are too good on average; medians here are of fresh seeds.",
    ]
    notes = _notes(study)
    return Section("limits", "What this cannot tell you", [Bullets(known), *([Bullets(notes)] if notes else [])])


def row_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Every batch size of a sweep with what was measured there."""
    cells = [
        (
            f"{row['batch_size']:,}",
            "not met" if row["median"] is None else figure(row["median"]),
            f"{_or(row['low'], 'none')} to {_or(row['high'], 'not met')}" if row["seeds"] else "not run",
            _rate(row["learning_rate"]) if row["learning_rate"] is not None else "none",
            _or(row["examples"], "none"),
            "none" if row["seconds"] is None else duration(row["seconds"]),
            f"{row['reached']} of {row['trials']}",
        )
        for row in rows
    ]
    names = ("Batch size (examples)", "Steps", "Over seeds", "Learning rate", "Examples", "Time", "Trials that met it")
    return Table("What the sweep measured", names, cells)


def _notes(study: Study) -> list[str]:
    return [str(note) for note in study.summary.get("notes") or ()]


def _known(study: Study) -> list[dict[str, Any]]:
    """The batch sizes that met the target."""
    return [row for row in study.summary["rows"] if row["median"] is not None]


def _own_runs(study: Study, run: Mapping[str, Any]) -> tuple[float, float, int] | None:
    """Median steps and seconds to the target of the plan's own runs, and their number; None where most did not meet it.

    The fresh ones where there are some, for they ran as the sweep's did; else the one run, which began cold.
    """
    trials = study.plan_trials()
    if not trials:
        return (run["target_step"], run["target_seconds"], 1) if run.get("target_step") else None
    met = [trial["steps_to_target"] is not None for trial in trials]
    steps = statistics.median(t["steps_to_target"] if ok else math.inf for t, ok in zip(trials, met, strict=True))
    seconds = statistics.median(t["seconds"] if ok else math.inf for t, ok in zip(trials, met, strict=True))
    return (steps, seconds, len(trials)) if math.isfinite(steps) else None


def _against_best(known: Sequence[Mapping[str, Any]], own: tuple[float, float, int] | None) -> list[Line]:
    if own is None or not known:
        return []
    best = min(known, key=lambda row: float(row["seconds"]))
    against = f"{duration(own[1])} against {duration(best['seconds'])} at batch size {best['batch_size']:,}"
    seeds = f"medians of {own[2]} and {len(best['seeds'])} runs"
    return [("The plan's time over the sweep's best", f"{own[1] / best['seconds']:.3g}", f"{against}; {seeds}")]


def _interval_of(row: Mapping[str, Any]) -> Interval:
    high = math.inf if row["high"] is None else row["high"]
    return (row["batch_size"], row["median"], row["low"], high)


def _grid(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    sizes = [row["batch_size"] for row in rows]
    return [float(size) for size in np.geomspace(min(sizes), max(sizes), CURVE_POINTS)]


def _fit_curve(fit: Tradeoff, rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    curve = [(size, fit.steps(size)) for size in _grid(rows)]
    return [point for point in curve if math.isfinite(point[1])]


def _predicted_curve(facts: Facts | None, rows: Sequence[Mapping[str, Any]]) -> list[Interval]:
    """S(B) from the reference runs and the noise scale, with the interval of a run with a new seed."""
    if facts is None:
        return []
    prediction = Prediction.of(facts)
    if not (prediction.noise_known and prediction.reached):
        return []
    curve = [(size, prediction.estimate(size)) for size in _grid(rows)]
    return [(size, steps.value, steps.low, steps.high) for size, steps in curve]


def _value_and_range(estimate: Estimate, remark: str) -> tuple[str, str]:
    if estimate.low == estimate.high:
        return _round(estimate.value), remark
    ends = f"{_round(estimate.low)} to {_round(estimate.high)}"
    return _round(estimate.value), f"{remark}; {100 * estimate.coverage:.4g} % interval {ends}"


def _round(value: float) -> str:
    return figure(float(f"{value:.3g}"))


def _as_estimate(predicted: Any) -> Estimate:
    if isinstance(predicted, Mapping):
        return from_plain(Estimate, predicted)
    return Estimate(number(predicted), number(predicted), number(predicted), "predicted")


def _or(value: Any, otherwise: str) -> str:
    return otherwise if value is None else figure(float(value))


def _rate(value: float) -> str:
    return figure(float(f"{value:.4g}"))
