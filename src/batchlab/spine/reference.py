"""The reference run: training at the base batch size until it flattens, its noise measured at each update."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import torch

from batchlab.core.errors import InputError
from batchlab.core.facts import NoisePoint
from batchlab.core.job import Job, Target
from batchlab.core.plan import Plan
from batchlab.measure.noise.noise_pair import NoisePair
from batchlab.spine.learner import Learner, Update
from batchlab.spine.stopwatch import Stopwatch
from batchlab.spine.trial import next_evaluation

TARGET_SHARE = 0.05
FLAT_SHARE = 0.01
FEWEST_STEPS, LATEST = 15, 2.0
UNREACHABLE = Target("loss", -1e308)


@dataclasses.dataclass
class Course:
    """One run at the base batch size. evaluations: (updates, metric), before the first update too.

    pairs: the noise of each update. points: its running value. evaluation_seconds: of each evaluation.
    """

    evaluations: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    pairs: list[NoisePair] = dataclasses.field(default_factory=list)
    points: list[NoisePoint] = dataclasses.field(default_factory=list)
    evaluation_seconds: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    stopped: str = ""

    def steps_to(self, target: Target) -> int | None:
        """The first evaluation that reached the target."""
        return next((step for step, value in self.evaluations if target.reached(value)), None)


def run_reference(
    job: Job, plan: Plan, watch: Stopwatch, *, until: float, seed: int, device: torch.device, every: int = 1
) -> Course:
    """Trains `plan` until the job's target is met, or else the loss has flattened, or the budget's share is spent.

    Flattened: the last half of the updates improved the best value by no more than 1 % of all improvement. until: the
    share of the budget; fewer than 15 updates tell nothing, so they are run past it, up to twice the whole budget.
    every: updates between evaluations at least.
    """
    target = job.target or UNREACHABLE
    started = watch.left(until)

    def finished(course: Course) -> str:
        left = watch.left(until)
        watch.report("reference run", 1 - left / started if started > 0 else 1.0)
        step = course.evaluations[-1][0]
        if step >= FEWEST_STEPS and course.steps_to(target) is not None:
            return "target"
        if job.target is None and step >= FEWEST_STEPS and flattened(course.evaluations, target):
            return "flat"
        return "budget" if left <= 0 and (step >= FEWEST_STEPS or watch.left(LATEST) <= 0) else ""

    return _run(job, plan, target.metric, finished, watch, until=until, seed=seed, device=device, every=every)


def run_restart(
    job: Job, plan: Plan, watch: Stopwatch, *, most: int, seed: int, device: torch.device, every: int = 1
) -> Course:
    """The same with other weights and examples, until the job's target or `most` updates."""
    target = job.target or UNREACHABLE

    def finished(course: Course) -> str:
        step, value = course.evaluations[-1]
        if target.reached(value):
            return "target"
        if step >= most:
            return "steps"
        return "budget" if watch.left() <= 0 else ""

    return _run(job, plan, target.metric, finished, watch, until=1.0, seed=seed, device=device, every=every)


def _run(
    job: Job,
    plan: Plan,
    metric: str,
    finished: Callable[[Course], str],
    watch: Stopwatch,
    *,
    until: float,
    seed: int,
    device: torch.device,
    every: int,
) -> Course:
    """Update, evaluate when due, ask `finished`; out of time, evaluate once more and end."""
    course, started = Course(), time.perf_counter()
    learner = Learner(job, plan, seed=seed, device=device, preconditioned=True)
    try:
        _evaluate(course, learner, metric)
        due = every
        while not course.stopped:
            update = learner.update()
            if update.skipped:
                raise InputError(
                    f"the loss is {update.loss} at update {update.step} of a run at the base learning rate"
                )
            _note(course, learner, update)
            if learner.step >= due or watch.left(until) <= 0:
                _evaluate(course, learner, metric)
                due = max(next_evaluation(learner.step, every), learner.step + every)
                course.stopped = finished(course)
    finally:
        learner.close()
    course.seconds = time.perf_counter() - started
    return course


def _note(course: Course, learner: Learner, update: Update) -> None:
    if learner.noise is not None and learner.noise.pair is not None:
        course.pairs.append(learner.noise.pair)
    if update.noise is not None and update.noise.defined:
        course.points.append(NoisePoint(update.step, update.position, update.noise))


def _evaluate(course: Course, learner: Learner, metric: str) -> None:
    started = time.perf_counter()
    values = learner.evaluate()
    course.evaluation_seconds.append(time.perf_counter() - started)
    if metric not in values:
        raise InputError(f"target metric {metric!r} is not among the measured {sorted(values)}")
    if not math.isfinite(values[metric]):
        raise InputError(f"{metric} is {values[metric]} on the validation data after {learner.step} updates")
    course.evaluations.append((learner.step, values[metric]))


def time_updates(
    job: Job, plans: Sequence[Plan], watch: Stopwatch, *, until: float, count: int, seed: int, device: torch.device
) -> list[tuple[float, ...]]:
    """Seconds of updates as `train` does them, in turn by each plan, the first round, which warms up, left out."""
    learners = [Learner(job, plan, seed=seed, device=device) for plan in plans]
    rounds: list[tuple[float, ...]] = []
    try:
        while len(rounds) <= count and watch.left(until) > 0:
            rounds.append(tuple(_timed_update(learner) for learner in learners))
    finally:
        for learner in learners:
            learner.close()
    return rounds[1:]


def _timed_update(learner: Learner) -> float:
    started = time.perf_counter()
    learner.update()
    learner.wait()
    return time.perf_counter() - started


def flattened(evaluations: Sequence[tuple[int, float]], target: Target) -> bool:
    """Whether the last half of the updates improved the best by at most 1 % of the improvement since the start."""
    sign = 1.0 if target.direction == "min" else -1.0
    last = evaluations[-1][0]
    early = min(sign * value for step, value in evaluations if 2 * step <= last)
    best = min(sign * value for _, value in evaluations)
    return early - best <= FLAT_SHARE * (sign * evaluations[0][1] - best)


def derived_target(runs: Sequence[Sequence[tuple[int, float]]]) -> Target:
    """The validation loss at which 95 % of the improvement was made, of the best start and the run that came least far.

    So all runs reach it, and none begins with it.

    >>> derived_target([[(0, 2.0), (9, 0.0)], [(0, 2.0), (9, 1.0)]])
    Target(metric='loss', value=1.05, direction='min')
    """
    initial = min(evaluations[0][1] for evaluations in runs)
    best = max(min(value for _, value in evaluations) for evaluations in runs)
    if not best < initial:
        raise InputError(
            f"the reference runs did not lower the validation loss below {initial:.4g} in {runs[0][-1][0]} updates: "
            "give the probe a larger budget, or the job a target"
        )
    return Target("loss", best + TARGET_SHARE * (initial - best), "min")
