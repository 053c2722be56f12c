"""A good learning rate at the base batch size: a range test, then short runs of equally many examples around it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from batchlab.core.errors import InputError
from batchlab.core.job import Job, MapDataset
from batchlab.core.plan import Plan
from batchlab.measure.course.learning_rate import RATIO, Choice, Trial, choose, range_test
from batchlab.spine.learner import Learner
from batchlab.spine.stopwatch import Stopwatch

RANGE_LOW, RANGE_HIGH, RANGE_STEPS, RANGE_SMOOTHING = 1e-5, 3.0, 60, 0.1
RUN_STEPS, FEWEST_RUN_STEPS = 25, 8
EXPECTED_RUNS, MOST_RUNS = 4, 8
LONGER, STILL_FALLING = 4, 0.1
DEFAULT_RATES = {"sgd": 0.05}
DEFAULT_RATE = 1e-3


class Spread:
    """Every n-th example of a data set, about `count` of them."""

    def __init__(self, data: MapDataset, count: int) -> None:
        self._data, self._places = data, [i * len(data) // count for i in range(count)]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Any:
        return self._data[self._places[index]]


def base_rate(
    job: Job,
    plan: Plan,
    watch: Stopwatch,
    *,
    until: float,
    update_seconds: float,
    seed: int,
    device: torch.device,
) -> tuple[Choice, list[str]]:
    """The learning rate for `plan`'s batch, from runs that are otherwise as planned; and warnings.

    until: the share of the budget to end at. update_seconds: what an update is expected to take, for the choice of
    how long the runs are. Of short runs the least score wins: the geometric mean over updates 2 to 25 of the averaged
    weights' validation loss, which is steadier than the loss at the end; the mean, where a loss is not positive.
    Where the best run still fell by a tenth of its improvement in its last third, so short runs favour rates that are
    too high: runs four times as long follow from half that rate on, if there is time.
    Where there is time for nothing, the optimizer's common default is taken, and a warning says so.
    """
    affordable = watch.left(until) / update_seconds
    wanted = RANGE_STEPS + EXPECTED_RUNS * RUN_STEPS
    run_steps = min(RUN_STEPS, math.floor(RUN_STEPS * affordable / wanted))
    if run_steps < FEWEST_RUN_STEPS:
        rate = DEFAULT_RATES.get(job.optimizer, DEFAULT_RATE)
        note = (
            f"the learning rate {rate:g} is {job.optimizer}'s common default, not measured: the budget allows only "
            f"{max(0, math.floor(affordable))} updates for it"
        )
        return Choice(rate, (Trial(rate, math.nan),), True, "a common default"), [note]
    ramp_steps = max(20, round(RANGE_STEPS * run_steps / RUN_STEPS))
    start = _start(job, plan, ramp_steps, watch, seed=seed, device=device)
    choice, falling = _short_runs(job, plan, start, run_steps, watch, until=until, seed=seed, device=device)
    longer = LONGER * run_steps
    if falling and watch.left(until) > 3 * longer * update_seconds:
        rate = choice.learning_rate / RATIO
        choice, _ = _short_runs(job, plan, rate, longer, watch, until=until, seed=seed, device=device)
    watch.report("learning rate", 1.0)
    if choice.at_edge:
        tried = f"{choice.trials[0].learning_rate:.3g} to {choice.trials[-1].learning_rate:.3g}"
        return choice, [
            f"the best learning rate lies at the edge of those tried, {tried}: a longer probe may find better"
        ]
    return choice, []


def _short_runs(
    job: Job,
    plan: Plan,
    start: float,
    steps: int,
    watch: Stopwatch,
    *,
    until: float,
    seed: int,
    device: torch.device,
) -> tuple[Choice, bool]:
    """The best of runs of `steps` updates, and whether the best run was still falling at its end."""
    courses: dict[float, list[float]] = {}

    def run(rate: float) -> float:
        planned = dataclasses.replace(plan, learning_rate=rate)
        courses[rate] = _losses(job, planned, steps, seed=seed, device=device)
        watch.report("learning rate", (1 + len(courses)) / (2 + EXPECTED_RUNS))
        return _score(courses[rate])

    choice = choose(run, start, most=MOST_RUNS, may_go_on=lambda: len(courses) < 3 or watch.left(until) > 0)
    best = min(courses.values(), key=_score)
    late = best[2 * len(best) // 3] - best[-1]
    return choice, late > STILL_FALLING * (best[0] - best[-1])


def _start(job: Job, plan: Plan, steps: int, watch: Stopwatch, *, seed: int, device: torch.device) -> float:
    """Where a range test with the plan's own update, without warm-up, falls fastest.

    Not its suggestion, which lies higher: the search goes up from here, and with little time it must not end too high.
    """
    learner = Learner(job, dataclasses.replace(plan, warmup_examples=0, average_power=None), seed=seed, device=device)
    bare = learner.plan

    def update(rate: float) -> float:
        learner.plan = dataclasses.replace(bare, learning_rate=rate)
        done = learner.update()
        watch.report("learning rate", done.step / steps / (2 + EXPECTED_RUNS))
        return math.nan if done.skipped else done.loss

    try:
        test = range_test(update, low=RANGE_LOW, high=RANGE_HIGH, steps=steps, smoothing=RANGE_SMOOTHING)
    finally:
        learner.close()
    return test.steepest


def _losses(job: Job, plan: Plan, steps: int, *, seed: int, device: torch.device) -> list[float]:
    """The validation loss after updates 2, 3, .. of a run; it ends early, not finite, where the run diverged."""
    learner = Learner(job, plan, seed=seed, device=device)
    every = math.ceil(steps / RUN_STEPS)
    losses: list[float] = []
    try:
        while learner.step < steps:
            if learner.update().skipped:
                return [*losses, math.inf]
            if learner.step >= 2 and learner.step % every == 0:
                losses.append(learner.evaluate()["loss"])
    finally:
        learner.close()
    return losses


def _score(losses: list[float]) -> float:
    """The geometric mean, or the mean where a loss is not positive; infinite where the run diverged."""
    if not all(math.isfinite(loss) for loss in losses):
        return math.inf
    if min(losses) > 0:
        return math.exp(math.fsum(map(math.log, losses)) / len(losses))
    return math.fsum(losses) / len(losses)


def check_first_loss(job: Job, plan: Plan, *, seed: int, device: torch.device) -> None:
    """`InputError` if the loss of fresh weights is not finite on the first micro-batch."""
    learner = Learner(job, plan, seed=seed, device=device)
    try:
        loss = learner.first_loss()
    finally:
        learner.close()
    if not math.isfinite(loss):
        raise InputError(
            f"job loss is {loss} on the first micro-batch, before any update: check the data and the model"
        )
