"""The parts of a run's report: each hands its numbers to `viz`, or says what is missing and how to get it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from batchlab.core.facts import Facts
from batchlab.core.plan import FrontierRow, Plan
from batchlab.core.run import Run
from batchlab.spine import headline
from batchlab.spine.columns import Column, Columns, evenly, thin
from batchlab.spine.words import duration, figure, interval, size, steps_said
from batchlab.viz import plots
from batchlab.viz.blocks import Actions, Block, Bullets, Chart, Choice, Paragraph, Row, Section, Table, Tiles, Verdict
from batchlab.viz.traces import Interval

TABLE_ROWS = 60
HOW_TO_VERIFY = (
    "No sweep was run, so the prediction is held against one run only. tune(..., verify=True), or "
    "`batchlab tune ... --verify`, measures steps to target at several batch sizes and shows them here."
)
NO_FACTS = "Nothing was measured for this run: tune() does, and train(..., facts=facts) keeps what probe() measured."
AXES = (
    ("step", "steps", "Steps"),
    ("examples", "training examples seen", "Examples"),
    ("seconds", "seconds", "Seconds"),
)


def what_to_do(run: Run) -> Section:
    """Settings, prediction beside outcome, verdict."""
    job = run.meta.get("job") or {}
    lines = headline.settings(run.plan, str(job.get("unit", "example")), headline.units_of_run(run))
    said = headline.verdict(run.plan, run.summary)
    tiles = Tiles(headline.outcome(run.plan, run.summary))
    blocks: list[Block] = [Actions(lines), tiles, Verdict(said.text, said.tone)]
    if run.plan.notes:
        blocks.append(Bullets(list(run.plan.notes)))
    if run.meta.get("error"):
        blocks.append(Paragraph(f"It ended with: {run.meta['error']}"))
    return Section("what-to-do", "What to do", blocks)


def frontier(plan: Plan) -> Section:
    """Predicted time against cost, and time against batch size."""
    rows = [row for row in plan.frontier if math.isfinite(row.time) and math.isfinite(row.cost)]
    if not rows:
        missing = "The plan carries no frontier: a plan made by plan() or tune() does."
        return Section("frontier", "Time and cost", [Paragraph(missing, quiet=True)])
    charts = [
        Chart(
            "frontier-cost",
            "Time against cost",
            "Predicted, each point a batch size, down and left is better; the star is the plan.",
            plots.frontier(rows),
            _frontier_table(rows),
        ),
        Chart(
            "frontier-size",
            "Time against batch size",
            "Predicted time to target; where the line flattens, a larger batch buys little.",
            plots.time_to_target(rows),
            _frontier_table(rows),
        ),
    ]
    blocks: list[Block] = [Row(charts)]
    if {row.devices for row in rows} == {1}:
        note = "On one device the cost in device-seconds is the time itself; plan for several devices to see them part."
        blocks.append(Paragraph(note, quiet=True))
    return Section("frontier", "Time and cost", blocks)


def _frontier_table(rows: Sequence[FrontierRow]) -> Table:
    cells = [
        (
            f"{row.batch_size:,}{' (the plan)' if row.picked else ''}",
            str(row.devices),
            steps_said(row.steps),
            duration(row.time),
            figure(float(f"{row.cost:.4g}")),
        )
        for row in rows
    ]
    names = ("Batch size (examples)", "Devices", "Steps", "Time", "Cost (device-seconds)")
    return Table("Predicted for each batch size", names, cells)


def noise(plan: Plan, facts: Facts | None, taken: Columns) -> Section:
    """The noise scale along training with its band, from the run and from the probe."""
    steps = taken.steps
    places = thin(steps["noise"])
    probe = [
        (float(p.examples), p.noise_scale.value, p.noise_scale.low, p.noise_scale.high)
        for p in (facts.noise if facts else ())
        if p.noise_scale.defined
    ]
    if not len(places) and not probe:
        why = "It was not measured in this run: that takes measure_noise in the plan and two micro-batches a step."
        return Section("noise-scale", "Gradient noise scale", [Paragraph(why, quiet=True)])
    names = {"examples": "examples", "value": "noise", "low": "noise_low", "high": "noise_high"}
    training = {name: steps[column][places].tolist() for name, column in names.items()}
    training["low"] = [-math.inf if math.isnan(bound) else bound for bound in training["low"]]
    training["high"] = [math.inf if math.isnan(bound) else bound for bound in training["high"]]
    sizes = _changes(steps["batch_size"]) if len(taken) else np.array([], dtype=np.intp)
    used = {"examples": steps["examples"][sizes].tolist(), "value": steps["batch_size"][sizes].tolist()}
    chart = Chart(
        "noise-scale-training",
        "Noise scale along training",
        "A batch well below it learns as much from each example; well above it, more examples save few steps.",
        plots.noise_scale(training, batch_size=used, probe=probe, planned=plan.noise_scale),
        _interval_table(training, probe),
    )
    blocks: list[Block] = [chart]
    if plan.noise_scale is not None:
        known = plan.noise_scale.defined
        said = f"The plan used {interval(plan.noise_scale)} examples" if known else "The plan knew of no noise scale"
        said += f"; {plan.noise_scale.method}."
        blocks.append(Paragraph(said, quiet=True))
    return Section("noise-scale", "Gradient noise scale", blocks)


def _interval_table(training: Mapping[str, list[float]], probe: Sequence[Interval]) -> Table:
    along = list(zip(*(training[name] for name in ("examples", "value", "low", "high")), strict=True))
    rows = [("this run", *along[place]) for place in evenly(len(along), TABLE_ROWS)] + [("probe", *p) for p in probe]
    cells = [(f"{row[1]:,.0f}", row[0], *(figure(float(f"{value:.4g}")) for value in row[2:])) for row in rows]
    return Table("Noise scale in examples", ("Examples seen", "Measured in", "Noise scale", "Low", "High"), cells)


def _changes(values: Column) -> Any:
    """Places where a column takes a new value, with the first and the last."""
    new = np.flatnonzero(np.diff(values, prepend=np.nan) != 0)
    places = np.unique(np.append(new, len(values) - 1))
    return places[evenly(len(places), 2000)]


def loss(run: Run, taken: Columns) -> Section:
    """Loss against steps, examples and seconds; the target's metric with what was predicted."""
    valid: Mapping[str, Any] = taken.valid.get("loss", dict.fromkeys(("step", "examples", "seconds", "value"), ()))
    if not len(taken):
        blocks: list[Block] = [Paragraph("No step has been recorded yet.", quiet=True)]
        return Section("loss", "Loss", blocks)
    charts = [(short, _loss_chart(taken, valid, axis, title)) for axis, title, short in AXES]
    blocks = [Choice("Loss against", charts)]
    skipped = int(taken.steps["skipped"].sum())
    if skipped:
        note = f"{skipped:,} of {len(taken):,} steps had a loss or gradient that is not finite; they changed nothing."
        blocks.append(Paragraph(note, quiet=True))
    if run.plan.target is not None and run.plan.target.metric in taken.valid:
        blocks.append(_target_chart(run, taken.valid[run.plan.target.metric]))
    return Section("loss", "Loss", blocks)


def _loss_chart(taken: Columns, valid: Mapping[str, Any], axis: str, title: str) -> Chart:
    steps, shown = taken.steps, thin(taken.steps["loss"])
    checked = thin(np.asarray(valid["value"], dtype=np.float64))
    train = {axis: steps[axis][shown].tolist(), "loss": steps["loss"][shown].tolist()}
    held_out = {axis: [valid[axis][i] for i in checked], "loss": [valid["value"][i] for i in checked]}
    skipped = np.flatnonzero(steps["skipped"])
    skipped = skipped[evenly(len(skipped), 200)]
    rows = [("training", place, train["loss"][i]) for i, place in enumerate(train[axis])]
    rows = [rows[i] for i in evenly(len(rows), TABLE_ROWS)]
    rows += [("validation", held_out[axis][i], held_out["loss"][i]) for i in evenly(len(checked), TABLE_ROWS)]
    cells = [
        (f"{where:,.4g}" if axis == "seconds" else f"{where:,.0f}", name, figure(value)) for name, where, value in rows
    ]
    return Chart(
        f"loss-{axis}",
        f"Loss against {title}",
        "Training loss of each step's own batch, and the loss on the validation data.",
        plots.loss(train, held_out, axis=axis, x_title=title, skipped=steps[axis][skipped].tolist()),
        Table(f"Loss against {title}", (title.capitalize(), "Data", "Loss"), cells),
    )


def _target_chart(run: Run, measured: Mapping[str, Column]) -> Chart:
    plan, shown = run.plan, thin(measured["value"])
    assert plan.target is not None
    steps, values = measured["step"][shown].tolist(), measured["value"][shown].tolist()
    reached = run.summary["target_step"]
    cells = [(f"{steps[i]:,.0f}", figure(values[i])) for i in evenly(len(steps), TABLE_ROWS)]
    return Chart(
        "target-metric",
        "The way to the target",
        "The target's metric on the validation data"
        + ("." if plan.prediction is None else "; the shaded span is the interval of the predicted step."),
        plots.target_metric(steps, values, plan.target, predicted=plan.prediction, reached=reached),
        Table(f"{plan.target.metric} on the validation data", ("Steps", plan.target.metric), cells),
    )


def machine_limits(plan: Plan, facts: Facts | None) -> Section:
    """Step time and memory against micro-batch."""
    title = "Speed and memory"
    if facts is None:
        return Section("step-time", title, [Paragraph(NO_FACTS, quiet=True)])
    points = facts.micro_batches
    cells = [
        (
            f"{p.examples:,}{' (the plan)' if p.examples == plan.micro_batch else ''}",
            duration(p.seconds.value),
            f"{duration(p.seconds.low)} to {duration(p.seconds.high)}",
            figure(float(f"{p.examples / p.seconds.value:.4g}")),
            "not known" if p.memory_bytes is None else size(p.memory_bytes),
        )
        for p in points
    ]
    names = ("Micro-batch (examples)", "Seconds", "Interval", "Examples per second", "Memory")
    table = Table("Every micro-batch size that was run", names, cells)
    text = "One forward and backward pass, measured; bars are intervals."
    charts = [Chart("micro-batch-time", "Time", text, plots.micro_batch_time(points, plan.micro_batch), table)]
    if any(p.memory_bytes is not None for p in points):
        where = "the device's allocator" if facts.device.startswith("cuda") else "the process"
        text = f"Peak while a pass runs, as {where} reports it."
        figure_ = plots.micro_batch_memory(points, plan.micro_batch)
        charts.append(Chart("micro-batch-memory", "Memory", text, figure_, table))
    limit = f"The largest micro-batch to use here is {facts.max_micro_batch:,}; one optimizer step takes "
    limit += f"{duration(facts.update_seconds.value)} on top, whatever the batch."
    return Section("step-time", title, [Row(charts), Paragraph(limit, quiet=True)])


def learning_rates(plan: Plan, facts: Facts | None) -> Section:
    """The short runs that the base learning rate was found by."""
    title = "Learning rate"
    if facts is None or not facts.learning_rate_trials:
        why = NO_FACTS if facts is None else "No trials were run."
        return Section("learning-rate", title, [Paragraph(why, quiet=True)])
    run = [trial for trial in facts.learning_rate_trials if not math.isnan(trial.loss)]
    if not run:
        why = f"No trial was run: {figure(facts.base_learning_rate)} is a common default, and was not measured."
        return Section("learning-rate", title, [Paragraph(why, quiet=True)])
    trials = sorted(run, key=lambda trial: trial.learning_rate)
    cells = [
        (figure(float(f"{t.learning_rate:.4g}")), figure(t.loss) if math.isfinite(t.loss) else "diverged")
        for t in trials
    ]
    chart = Chart(
        "learning-rate-trials",
        f"Short runs at batch size {facts.base_batch_size:,}",
        "The plan's own rate differs where its batch size does; the table of reasons names the rule.",
        plots.learning_rate_trials(trials, base=facts.base_learning_rate, planned=plan.learning_rate),
        Table("Trials", ("Learning rate", "Validation loss, mean along the run"), cells),
    )
    return Section("learning-rate", title, [chart])


def reasons(plan: Plan) -> Section:
    """Every number with its reason."""
    rows = [(name, *rest) for name, *rest in plan.explain()]
    if not rows:
        missing = "This plan carries no reasons: it was not made by plan()."
        return Section("reasons", "Reasons", [Paragraph(missing, quiet=True)])
    table = Table("The plan's numbers", ("Number", "Value", "Rule and what it used", "Source"), rows)
    return Section("reasons", "Reasons", [table])


def not_verified() -> Section:
    """How to get a sweep to hold the plan against."""
    return Section("measured", "Measured against predicted", [Paragraph(HOW_TO_VERIFY, quiet=True)])


def limits(facts: Facts | None) -> Section:
    """What cannot be known from this, and the notes of the facts."""
    known = [
        "A prediction holds for this job, target, data and optimizer; another target can have another best batch size.",
        "Steps to target vary from seed to seed; one run is one sample of them.",
        "The noise scale is taken to predict the critical batch size; that is a model, and only a sweep tests it.",
        "Times are of this machine. Communication between devices was not measured.",
    ]
    notes = facts.notes if facts else ()
    blocks: list[Block] = [Bullets(known)]
    if notes:
        blocks += [Paragraph("How the measurements came about:"), Bullets(list(dict.fromkeys(notes)))]
    return Section("limits", "What this cannot tell you", blocks)


def provenance(meta: Mapping[str, Any]) -> Section:
    """Versions, machine, seed, commit."""
    table = Table("Where these numbers come from", ("What", "Value"), list(_origins(meta)))
    return Section("provenance", "Origin", [table])


def _origins(meta: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("name", "created", "status", "seed", "git_commit", "device", "world_size"):
        if meta.get(name) is not None:
            yield name.replace("_", " "), str(meta[name])
    for group in ("job", "versions", "machine"):
        for name, value in (meta.get(group) or {}).items():
            if value is None or value == []:
                continue
            words = size(value) if name.endswith("_bytes") and isinstance(value, int) else _plain(value)
            yield f"{group}: {name.removesuffix('_bytes').replace('_', ' ')}", words


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
