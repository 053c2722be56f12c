"""Steps to a goal on held-out data, one run or a table of runs at a time (Shallue et al. 2019, arXiv 1811.03600).

Everything is a function of the table of measurements (trial, batch size, step, value). A run that did not reach the
goal is censored: it has no number of steps, least of all those it was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from batchlab.core.errors import InputError
from batchlab.core.job import Target
from batchlab.core.jsonio import JsonNoun
from batchlab.core.run import Run
from batchlab.core.study import INTERRUPTED, SEARCH, Study


@dataclass(frozen=True)
class StepsToTarget(JsonNoun):
    """The updates after which a run was first seen to have reached its target; or that it was not.

    steps: updates; None if the run did not reach it. resolution: updates since the evaluation before, or since the
    start: the target was reached within the last `resolution` of `steps`. reached_at_start: whether the untrained
    model had reached it; then steps and resolution are 0.
    censored_at: the last evaluation of a run that did not reach it, in updates. diverged: whether a value was not
    finite at any evaluation; then the run counts as one that did not reach it, whatever it saw before.
    """

    steps: int | None
    resolution: int | None
    reached_at_start: bool = False
    censored_at: int | None = None
    diverged: bool = False

    @property
    def reached(self) -> bool:
        """Whether there is a number of steps."""
        return self.steps is not None


def steps_to_target(
    run: Run | Mapping[str, Any] | Sequence[tuple[int, float]], target: Target, *, strict: bool = False
) -> StepsToTarget:
    """The first evaluation of a run that reaches `target`.

    run: a `batchlab.Run`; a trial of `Study.trials()`; or (updates, value of target.metric) in ascending order, with
    (0, value) for the untrained model if it was evaluated. The metric must be one on held-out data.
    strict: whether equality falls short of the target, as in the source's scripts; `Target` lets it reach.

    Raises `InputError` where there is no evaluation, or only some of a run's measure target.metric.

    >>> steps_to_target([(10, 0.9), (20, 0.6), (30, 0.4), (40, 0.3)], Target("loss", 0.5))
    StepsToTarget(steps=30, resolution=10, reached_at_start=False, censored_at=None, diverged=False)
    """
    reached = _goal(target, strict)
    evaluations = _evaluations(run, target)
    if not all(math.isfinite(value) for _, value in evaluations):
        return StepsToTarget(None, None, censored_at=evaluations[-1][0], diverged=True)
    before = 0
    for step, value in evaluations:
        if reached(value):
            return StepsToTarget(step, step - before, reached_at_start=step == 0)
        before = step
    return StepsToTarget(None, None, censored_at=evaluations[-1][0])


def _goal(target: Target, strict: bool) -> Callable[[float], bool]:
    if not isinstance(target, Target):
        raise InputError(f"target must be a batchlab.Target, got {target!r}")
    return lambda value: target.reached(value) and not (strict and value == target.value)


def _evaluations(run: Any, target: Target) -> list[tuple[int, float]]:
    """(updates, value), checked to ascend."""
    if isinstance(run, Run):
        pairs: Iterable[Any] = _of_run(run, target)
    elif isinstance(run, Mapping):
        if "evaluations" not in run:
            raise InputError(f"run must be a trial with `evaluations`, got the keys {sorted(map(str, run))}")
        pairs = run["evaluations"]
    else:
        pairs = run
    evaluations = [_pair(pair) for pair in pairs]
    if not evaluations:
        raise InputError(f"run holds no evaluation of {target.metric!r}")
    last = -1
    for step, _ in evaluations:
        if step <= last:
            raise InputError(f"run must hold evaluations at ascending updates of at least 0, got {step} after {last}")
        last = step
    return evaluations


def _pair(pair: Any) -> tuple[int, float]:
    try:
        step, value = pair
        if int(step) == float(step):
            return int(step), float(value)
    except (TypeError, ValueError):
        pass
    raise InputError(f"run must hold pairs (updates, value), a whole number and a number, got {pair!r:.80}")


def _of_run(run: Run, target: Target) -> list[tuple[int, float]]:
    found, others = [], set()
    for line in run.steps():
        if "valid" not in line:
            continue
        if target.metric in line["valid"]:
            found.append((line["step"], line["valid"][target.metric]))
        else:
            others |= set(line["valid"])
    if others:
        raise InputError(
            f"{run.path} has evaluations without the target's metric {target.metric!r}; they measure {sorted(others)}"
        )
    return found


class Measurement(NamedTuple):
    """One evaluation. trial: a number or name, one a run within its batch size. batch_size: examples an update.

    step: updates before it. value: of the metric, on held-out data.
    """

    trial: int | str
    batch_size: int
    step: int
    value: float


def measurements(study: Study) -> list[Measurement]:
    """The evaluations of a study's search trials; of those that were interrupted none."""
    return [
        Measurement(trial["number"], trial["batch_size"], int(step), float(value))
        for trial in study.trials()
        if trial["kind"] == SEARCH and trial["status"] != INTERRUPTED
        for step, value in trial["evaluations"]
    ]


def fewest_steps(
    table: Iterable[Measurement],
    target: Target,
    *,
    step_budget: float | None = None,
    example_budget: float | None = None,
    strict: bool = False,
) -> dict[int, Measurement | None]:
    """Steps to result: for each batch size the first measurement that reaches the target, None where none does.

    Of equal steps the smaller trial. A trial with a value that is not finite, at any step, has no part in it. Budgets
    drop measurements before: those at more than `step_budget` updates, or more than `example_budget` examples, step
    times batch size. strict: as in `steps_to_target`. It is the fewest of many trials at one seed: too good on
    average, so run the winner again with fresh seeds before comparing sizes.

    >>> rows = [Measurement(0, 32, 10, 0.6), Measurement(0, 32, 20, 0.4), Measurement(1, 32, 20, 0.3)]
    >>> fewest_steps(rows, Target("loss", 0.5))[32].trial
    0
    """
    reached = _goal(target, strict)
    within = _within(table, step_budget, example_budget)
    return {
        size: min((row for row in rows if reached(row.value)), key=lambda row: (row.step, row.trial), default=None)
        for size, rows in within.items()
    }


def best_values(
    table: Iterable[Measurement],
    direction: Literal["min", "max"] = "min",
    *,
    step_budget: float | None = None,
    example_budget: float | None = None,
) -> dict[int, Measurement | None]:
    """For each batch size the measurement with the best value within the budgets; of equal ones the earliest.

    Budgets and diverged trials as in `fewest_steps`. A budget in steps favours large batches, one in examples (epochs)
    small ones: compare under both.
    """
    if direction not in ("min", "max"):
        raise InputError(f'direction must be "min" or "max", got {direction!r}')
    sign = 1.0 if direction == "min" else -1.0
    return {
        size: min(rows, key=lambda row: (sign * row.value, row.step, row.trial), default=None)
        for size, rows in _within(table, step_budget, example_budget).items()
    }


def _within(
    table: Iterable[Measurement], step_budget: float | None, example_budget: float | None
) -> dict[int, list[Measurement]]:
    """The rows of each batch size, ascending, of trials that did not diverge, within the budgets."""
    for name, budget in (("step_budget", step_budget), ("example_budget", example_budget)):
        if budget is not None and not budget > 0:
            raise InputError(f"{name} must be > 0, or None, got {budget!r}")
    rows = list(table)
    if not rows:
        raise InputError("table must hold at least one measurement, got none")
    diverged = {(row.batch_size, row.trial) for row in rows if not math.isfinite(row.value)}
    steps = math.inf if step_budget is None else step_budget
    examples = math.inf if example_budget is None else example_budget
    found: dict[int, list[Measurement]] = {size: [] for size in sorted({row.batch_size for row in rows})}
    for row in rows:
        if (row.batch_size, row.trial) not in diverged and row.step <= steps and row.batch_size * row.step <= examples:
            found[row.batch_size].append(row)
    return found
