"""What a plan's numbers let foresee before it is run: what will not come in its length, or not before the target."""

from __future__ import annotations

from typing import Any

from batchlab.core.plan import Plan
from batchlab.schedule.batches.controller import BatchController
from batchlab.schedule.rates.by_examples import lr_factor
from batchlab.spine.batch_control import expected_updates, fitted_patience, given_points, usual_patience
from batchlab.spine.words import of_what, plural

MOVES = "the predicted steps and time are those of a batch that stays; this one moves"


def foreseen(plan: Plan, controller: BatchController | None = None) -> list[str]:
    """Sentences for `Plan.notes`. controller: what moves the plan's batch (`make_controller`), None for nothing.

    What a plan for a target predicts is the end that counts: a run that meets the target ends there.
    """
    said = [MOVES] if plan.batch_schedule != "fixed" and plan.predicted_steps is not None else []
    if plan.predicted_steps is not None and plan.predicted_for:
        said.append(f"the predicted steps and time are for {of_what(plan)}, not for this run's")
    return [*said, *warm_up(plan), *_falling(plan), *_points(plan, controller), *_patience(plan)]


def expected_examples(plan: Plan) -> int | None:
    """Those after which a batch that stays is predicted to meet the target, where that is before the run's end."""
    predicted = plan.predicted_steps
    if plan.target is None or predicted is None or not predicted.defined:
        return None
    if plan.predicted_for:
        return None
    examples = max(1, round(predicted.value)) * plan.batch_size
    return examples if examples < plan.examples else None


def warm_up(plan: Plan) -> list[str]:
    """That it is longer than the run, or than the way to the target."""
    warmup, expected = plan.warmup_examples, expected_examples(plan)
    said = f"the warm-up takes {warmup:,} examples"
    if warmup > plan.examples:
        return [f"{said} and the run has {plan.examples:,}: the learning rate never comes to its peak"]
    if expected is not None and warmup > expected:
        met = f"the {expected:,} after which the target is predicted to be met"
        return [f"{said}, more than {met}: the rate still rises then"]
    return []


def _falling(plan: Plan) -> list[str]:
    """A schedule spans the most examples that a run may take, which are four times those predicted in a plan's own."""
    expected = expected_examples(plan)
    if plan.schedule == "constant" or expected is None:
        return []
    named: dict[str, Any] = {"schedule": plan.schedule, "settings": plan.schedule_settings}
    named |= {"warmup_examples": plan.warmup_examples}
    share = lr_factor(expected, total_examples=plan.examples, **named)
    return [
        f"the schedule {plan.schedule!r} is laid over all {plan.examples:,} examples; at {expected:,}, after which the "
        f"target is predicted to be met, the rate is {share:.0%} of its peak: with fewer steps it would be further on"
    ]


def _points(plan: Plan, controller: BatchController | None) -> list[str]:
    expected = expected_examples(plan)
    late = {name: at for name, at in given_points(controller).items() if expected is not None and at > expected}
    if not late:
        return []
    named = ", ".join(f"{name} at {at:,}" for name, at in late.items())
    return [f"{named} examples: a batch that stays is predicted to meet the target after {expected:,}, and ends there"]


def _patience(plan: Plan) -> list[str]:
    if plan.batch_schedule in ("fixed", "ramp", "milestones"):
        return []
    usual, fitted, updates = usual_patience(plan), fitted_patience(plan), expected_updates(plan)
    patience = plan.batch_settings.get("patience", usual if fitted is None else fitted)
    waits = f"batch_schedule {plan.batch_schedule!r} waits {plural(patience, 'update')} before it changes the batch"
    if patience >= plan.steps:
        return [f"{waits}, and the run has {plan.steps:,}: the batch never moves"]
    if patience >= updates:
        return [f"{waits}, and the target is predicted to be met after {updates:,}: it may never move"]
    return [] if fitted is None else [f"{waits}, not the usual {usual}, for about {updates:,} are expected in all"]
