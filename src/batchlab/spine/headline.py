"""What a run says in a few lines: what to use, what was predicted and what happened, and the verdict."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from batchlab.core.plan import Plan
from batchlab.core.run import Run
from batchlab.spine.words import aim, duration, figure, of_what, plural, shown_steps, steps_said

Line = tuple[str, str, str]  # name, value, remark
CLOSE = 1.25
MOVES = {
    "fixed": "in each step",
    "adaptive": "follows the measured noise scale during the run",
    "goodput": "follows the noise scale and the time of the updates",
    "decay_by_batch": "grows where the learning rate would fall",
    "norm_test": "grows as the norm test asks",
    "inner_product_test": "grows as the inner-product test asks",
    "ramp": "rises by a ramp",
    "milestones": "moves at milestones",
}
ENDS = {
    "constant": "then constant",
    "linear": "then falling linearly",
    "cosine": "then falling as a cosine",
    "wsd": "then constant, and down at the end",
    "power": "then falling as a power of the examples",
    "one_cycle": "one cycle up and down",
}


class Verdict(NamedTuple):
    """What came of a run, in words; "good", "bad", or "open" where nothing can be said yet."""

    text: str
    tone: Literal["good", "bad", "open"]


def settings(plan: Plan, unit: str = "example", units_per_example: float | None = 1) -> list[Line]:
    """The three lines: batch size, micro-batch times accumulation, learning rate."""
    tokens = (
        f", {figure(plan.batch_size * units_per_example)} {unit}s"
        if unit != "example" and units_per_example is not None
        else ""
    )
    batch = MOVES[plan.batch_schedule]
    passes = f"{plan.accumulation:,} pass{'' if plan.accumulation == 1 else 'es'}"
    devices = plural(plan.world_size, "device")
    warm = f"warm-up over {plural(plan.warmup_examples, 'example')}, " if plan.warmup_examples else "no warm-up, "
    most = math.ceil(plan.batch_size / plan.world_size)  # of a pass, whatever a plan by hand has
    return [
        ("Batch size", f"{plural(plan.batch_size, 'example')}{tokens}", batch),
        ("Micro-batch", f"{min(plan.micro_batch, most):,} × {plan.accumulation:,}", f"{passes} per step on {devices}"),
        ("Learning rate", figure(plan.learning_rate), f"{plan.optimizer}; {warm}{ENDS[plan.schedule]}"),
    ]


def outcome(plan: Plan, summary: Mapping[str, Any]) -> list[Line]:
    """Predicted beside actual: steps and time to the target; without a target, what the run took in all."""
    if plan.target is None:
        return [
            ("Steps", f"{summary['steps']:,}", f"of {plan.steps:,} planned"),
            ("Time", duration(summary["seconds"]), "evaluations left out"),
        ]
    predicted, reached = plan.prediction, summary["target_step"]
    said = "unknown" if predicted is None else steps_said(predicted.value)
    range_ = (
        _not_predicted(plan)
        if predicted is None
        else f"{100 * predicted.coverage:.4g} % interval {steps_said(predicted.low)} to {steps_said(predicted.high)}"
    )
    took = f"{reached:,}" if reached is not None else "not met"
    lines = [
        ("Predicted steps to target", said, range_),
        ("Actual steps to target", took, _actual_remark(plan, summary)),
    ]
    if plan.predicted_step_seconds and predicted is not None and predicted.defined:
        lines.append(("Predicted time", duration(predicted.value * plan.predicted_step_seconds), "steps × step time"))
    if summary["target_seconds"] is not None:
        lines.append(("Actual time", duration(summary["target_seconds"]), "evaluations left out"))
    return lines


def _not_predicted(plan: Plan) -> str:
    fixed = plan.predicted_steps
    if fixed is None or not fixed.defined:
        return "the plan predicted none"
    if plan.predicted_for:
        return f"{steps_said(fixed.value)} for {of_what(plan)}, not for this run's"
    return f"{steps_said(fixed.value)} for a batch that stays at {plan.batch_size:,}; this one moves"


def verdict(plan: Plan, summary: Mapping[str, Any]) -> Verdict:
    """The outcome as a sentence."""
    status, steps = summary["status"], summary["steps"]
    if status == "running":
        return Verdict(
            f"Still running, or ended without a word: {plural(steps, 'step')} of {plan.steps:,} so far.", "open"
        )
    if status == "interrupted":
        return Verdict(f"Interrupted after {plural(steps, 'step')} of {plan.steps:,}; resume it to go on.", "open")
    if status == "stopped":
        return Verdict(f"Stopped after {plural(steps, 'step')}: {_skipped(summary)}.", "bad")
    if plan.target is None:
        return Verdict(f"Finished {plural(steps, 'step')}; there was no target to hold a prediction against.", "open")
    if summary["target_step"] is None:
        ended = f"it ended at {_final(plan, summary)}"
        return Verdict(f"The target, {aim(plan.target)}, was not met in {plural(steps, 'step')}; {ended}.", "bad")
    return _held(plan, summary["target_step"])


def _held(plan: Plan, reached: int) -> Verdict:
    assert plan.target is not None
    if reached == 0:
        easy = f"The target, {aim(plan.target)}, was met before any update"
        return Verdict(f"{easy}: it is no test of the plan. Give the job a harder one, or the probe more time.", "open")
    met = f"Met the target, {aim(plan.target)}, after {plural(reached, 'step')}"
    predicted = plan.prediction
    if predicted is None and plan.predicted_steps is not None and plan.predicted_for:
        return Verdict(f"{met}; the prediction is for {of_what(plan)}, not for this run's.", "open")
    if predicted is None and plan.predicted_steps is not None:
        return Verdict(f"{met}; its batch moves, so no prediction can be held against it.", "open")
    if predicted is None or not predicted.defined:
        return Verdict(f"{met}; there was no prediction to hold it against.", "open")
    shown = shown_steps(predicted.value)
    ratio = reached / shown if shown > 0 else math.inf
    said = f"{met}: {figure(float(f'{ratio:.3g}'))} times the {figure(shown)} predicted"
    inside = shown_steps(predicted.low) <= reached <= shown_steps(predicted.high)
    if inside and math.isfinite(predicted.high):
        return Verdict(f"{said}, inside the prediction's interval.", "good")
    if inside:
        return Verdict(f"{said}; the prediction's interval has no upper end, so it could not have missed.", "open")
    close = 1 / CLOSE <= ratio <= CLOSE
    return Verdict(f"{said}, {'just ' if close else ''}outside the prediction's interval.", "open" if close else "bad")


def _actual_remark(plan: Plan, summary: Mapping[str, Any]) -> str:
    assert plan.target is not None
    if summary["target_step"] is not None:
        every = plan.evaluate_every
        return f"to {aim(plan.target)}" + (f"; evaluated every {every} steps" if every > 1 else "")
    return f"in {plural(summary['steps'], 'step')}; {aim(plan.target)} is the target"


def _final(plan: Plan, summary: Mapping[str, Any]) -> str:
    value = summary["final"].get(plan.target.metric) if plan.target else None
    return "an unknown value" if value is None else figure(float(value))


def _skipped(summary: Mapping[str, Any]) -> str:
    count = summary["skipped_steps"]
    return f"{plural(count, 'step')} had a loss or gradient that is not finite" if count else "an error ended the run"


def units_of_run(run: Run) -> float | None:
    """How many units an example holds: as the job has it, else on average as it was measured; None where not known."""
    given = (run.meta.get("job") or {}).get("units_per_example")
    measured = (run.meta.get("facts") or {}).get("units_per_example")
    return measured if given is None else given


def of_run(run: Run) -> list[Line]:
    """The lines of the first part: settings and outcome."""
    job = run.meta.get("job") or {}
    lines = settings(run.plan, str(job.get("unit", "example")), units_of_run(run))
    return [*lines, *sizes(run), *outcome(run.plan, run.summary)]


def sizes(run: Run) -> list[Line]:
    """Which sizes a batch that was to move had, and whether its maximum held it; nothing of one that stays."""
    lines = [] if run.plan.batch_schedule == "fixed" else list(run.steps())
    taken, capped = [line["batch_size"] for line in lines], sum(bool(line.get("capped")) for line in lines)
    if not taken:
        return []
    held = [("Held by its maximum", f"{capped:,} of {plural(len(taken), 'step')}", cap(run.plan, max(taken)))]
    if len({*taken}) == 1:
        moved = ("Batch sizes", f"{taken[0]:,}", f"it never moved in {plural(len(taken), 'step')}")
    else:
        changes = sum(a != b for a, b in itertools.pairwise(taken))
        moved = ("Batch sizes", f"{min(taken):,} to {max(taken):,}", f"{plural(changes, 'change')}, now {taken[-1]:,}")
    return [moved, *(held if capped else [])]


def cap(plan: Plan, largest: int) -> str:
    """Which maximum a batch was held by, that would have grown beyond `largest`."""
    most = plan.max_batch_size
    if most is None:
        return f"{largest:,} examples, by the data set"
    reason = plan.reasons.get("max_batch_size")
    return f"max_batch_size {most:,}" + (f": {reason.rule}" if reason else "")
