"""One trial of a sweep: a plan trained in memory until the target, a limit, or a divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from batchlab.core.errors import InputError
from batchlab.core.job import Job, Target
from batchlab.core.plan import Plan
from batchlab.core.random import preserved_generators
from batchlab.core.study import DIVERGED, INTERRUPTED, NOT_REACHED, REACHED
from batchlab.spine.learner import Learner

RESOLUTION = 0.03
UNSEEN_SHARE = 0.1


def next_evaluation(step: int, first: int) -> int:
    """The updates after which to evaluate next: `first`, then each at most 3 % later than the one before.

    So the steps to target are known to 3 %, or to one update, wherever they lie, at every batch size alike.

    >>> next_evaluation(0, 10), next_evaluation(10, 10), next_evaluation(200, 10)
    (10, 11, 206)
    """
    return first if step < first else step + max(1, math.floor(RESOLUTION * step))


def run_trial(
    job: Job,
    plan: Plan,
    *,
    seed: int,
    expected_steps: float,
    device: str | None = None,
    most_steps: Callable[[], float] = lambda: math.inf,
    stop: Callable[[], bool] = lambda: False,
    untrained: bool = True,
) -> dict[str, Any]:
    """Trains `plan` until `plan.target`, and says what came of it, by the names of `Study.trials`.

    expected_steps: a guess at the steps to target; the first tenth of it is not evaluated. plan.steps: the most.
    most_steps: asked at each evaluation, a lower limit past which the trial is hopeless. stop: asked after each
    update. A loss, gradient or metric that is not finite is a divergence. untrained: whether to look at the metric
    before the first update too; if not, a seed that happens to begin at the target counts as one update.

    Raises `InputError` if the target is found met before the first update, or its metric is not measured.
    """
    target = plan.target
    if target is None:
        raise InputError("a trial needs plan.target: steps to target mean nothing without one")
    first = max(1, math.floor(UNSEEN_SHARE * expected_steps))
    with preserved_generators():
        learner = Learner(job, plan, seed=seed, device=device)
        try:
            if untrained and target.reached(before := _metric(learner, target)):
                raise InputError(
                    f"the target {target.metric} of {target.value:g} is met before any update ({before:g}): "
                    "choose a harder target"
                )
            return _train(learner, target, first, most_steps, stop)
        finally:
            learner.close()


def _train(
    learner: Learner, target: Target, first: int, most_steps: Callable[[], float], stop: Callable[[], bool]
) -> dict[str, Any]:
    evaluations: list[tuple[int, float]] = []
    status, seconds, due = NOT_REACHED, 0.0, first
    while learner.step < learner.plan.steps:
        update = learner.update()
        seconds += update.seconds
        if update.skipped:
            status = DIVERGED
            break
        if stop():
            status = INTERRUPTED
            break
        if learner.step < min(due, learner.plan.steps):
            continue
        measured = _metric(learner, target)
        evaluations.append((learner.step, measured))
        due = next_evaluation(learner.step, first)
        if target.reached(measured) or not math.isfinite(measured):
            status = REACHED if math.isfinite(measured) else DIVERGED
            break
        if learner.step >= most_steps():
            break
    earlier = evaluations[-2][0] if len(evaluations) > 1 else 0
    reached = status == REACHED
    return {
        "status": status,
        "steps_to_target": learner.step if reached else None,
        "resolution": learner.step - earlier if reached else None,
        "steps": learner.step,
        "examples": learner.position,
        "seconds": seconds,
        "metric": evaluations[-1][1] if evaluations else None,
        "evaluations": evaluations,
    }


def _metric(learner: Learner, target: Target) -> float:
    values = learner.evaluate()
    if target.metric not in values:
        raise InputError(f"target metric {target.metric!r} is not among the measured {sorted(values)}")
    return values[target.metric]
