"""A grid over learning rate and batch size: which cells to run, and the runs of it as one table.

The lines of equal ratio ρ = η/B are the diagonals of a grid in ln η and ln B; ln(ηB) goes across them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from batchlab.core.checks import check_count, check_positive, holds
from batchlab.core.errors import InputError
from batchlab.rules.ratio_nouns import RatioCell
from batchlab.rules.replicates import Array

Direction = Literal["max", "min"]


class RatioRun(NamedTuple):
    """One run of a grid. learning_rate: the peak η. batch_size: B, of one update over all devices. steps: updates.

    seed: every cell has the same ones. scores: task -> score at the end of the run, finite.
    """

    learning_rate: float
    batch_size: int
    steps: int
    seed: int
    scores: Mapping[str, float]


def ratio(learning_rate: float, batch_size: float) -> float:
    """ρ = η/B. Papers print it times 1e6 or 1e7: mind which.

    >>> round(1e6 * ratio(9e-5, 8), 6)
    11.25
    """
    check_positive(learning_rate=learning_rate, batch_size=batch_size)
    return learning_rate / batch_size


def sweep(
    batch_sizes: Sequence[int],
    *,
    learning_rates: Sequence[float] | None = None,
    ratios: Sequence[float] | None = None,
    examples: int | None = None,
    steps: int | None = None,
) -> tuple[RatioCell, ...]:
    """The cells to run: every batch size with every learning rate, or along every line of equal ratio.

    batch_sizes: at least 3. Either learning_rates, at least 3: where neighbours are apart by one factor in both, the
    diagonals of the grid are lines of equal ratio. Or ratios ρ, at least 3: η = ρ·B at each batch size, so that all
    lines of equal ratio have the same batch sizes, and learning rates have a wider range.
    Either examples, the same for every cell and a multiple of every batch size: a smaller batch makes more updates. Or
    steps, the same updates for every cell: a larger batch sees more examples. Run every cell with the same seeds.

    >>> [(cell.learning_rate, cell.steps) for cell in sweep([8, 16, 32], ratios=[1, 2, 4], examples=64)][:3]
    [(8.0, 8), (16.0, 4), (32.0, 2)]
    """
    if (learning_rates is None) == (ratios is None):
        raise InputError("give either learning_rates or ratios")
    if (examples is None) == (steps is None):
        raise InputError("give either examples or steps, the same for every cell")
    name, lines = ("ratios", ratios) if learning_rates is None else ("learning_rates", learning_rates)
    sizes = _levels("batch_sizes", batch_sizes)
    rows = itertools.product(_levels(name, () if lines is None else lines), sizes)
    for size in sizes:
        check_count(batch_sizes=size)
    cells = [(line * size if learning_rates is None else line, size) for line, size in rows]
    return tuple(_cell(rate, size, _updates(size, sizes, examples, steps)) for rate, size in cells)


def _levels(name: str, values: Sequence[Any]) -> list[Any]:
    for value in values:
        check_positive(**{name: value})
    if len(set(values)) < 3 or len(set(values)) != len(values):
        raise InputError(f"{name} must be at least 3 different ones, got {list(values)!r}")
    return sorted(values)


def _updates(size: int, sizes: Sequence[int], examples: int | None, steps: int | None) -> int:
    if examples is None:
        check_count(steps=steps or 0)
        return int(steps or 0)
    check_count(examples=examples)
    if examples % size:
        common = math.lcm(*sizes)
        raise InputError(f"examples must be a multiple of every batch size (of {common} for these), got {examples}")
    return examples // size


def _cell(learning_rate: float, batch_size: int, steps: int) -> RatioCell:
    rate, size = float(learning_rate), int(batch_size)
    return RatioCell(rate, size, int(steps), rate / size, rate * size)


class RatioTable(NamedTuple):
    """All runs of a grid. cells: ascending in η, then B. scores: task -> (seeds, cells). seeds: ascending.

    budget: what is equal in all cells.
    """

    cells: tuple[RatioCell, ...]
    seeds: tuple[int, ...]
    scores: Mapping[str, Array]
    directions: Mapping[str, Direction]
    budget: Literal["examples", "steps"]

    @classmethod
    def of(cls, runs: Iterable[RatioRun], directions: Mapping[str, Direction]) -> RatioTable:
        """The runs of all cells, refused where they do not make a balanced grid."""
        found: dict[tuple[float, int, int], dict[int, Mapping[str, float]]] = {}
        for run in runs:
            _check_run(run)
            of_cell = found.setdefault((float(run.learning_rate), int(run.batch_size), int(run.steps)), {})
            if run.seed in of_cell:
                raise InputError(f"runs hold seed {run.seed} twice at {_at(run.learning_rate, run.batch_size)}")
            of_cell[int(run.seed)] = run.scores
        if not found:
            raise InputError("runs must hold at least one run, got none")
        places = sorted(found)
        cells, seeds, tasks = tuple(_cell(*place) for place in places), _seeds(found), _tasks(found)
        scores = {
            task: np.array([[float(found[place][seed][task]) for place in places] for seed in seeds]) for task in tasks
        }
        for task, direction in directions.items():
            if task not in scores or direction not in ("max", "min"):
                raise InputError(
                    f'directions must give "max" or "min" to tasks of {tasks}, got {task!r}: {direction!r}'
                )
        return cls(cells, seeds, scores, directions, _budget(cells))

    def direction(self, task: str) -> Direction:
        """Whether a higher or a lower score is better."""
        return self.directions.get(task, "max")

    def sign(self, task: str) -> int:
        """1 where a higher score is better, else -1."""
        return -1 if self.direction(task) == "min" else 1

    def goodness(self, task: str) -> Array:
        """The mean score of each cell, its sign so that larger is better."""
        means: Array = self.sign(task) * self.scores[task].mean(axis=0)
        return means


Found = Mapping[tuple[float, int, int], Mapping[int, Mapping[str, float]]]


def _seeds(found: Found) -> tuple[int, ...]:
    """The seeds that every cell has."""
    every = sorted({seed for of_cell in found.values() for seed in of_cell})
    for (rate, size, _), of_cell in sorted(found.items()):
        if missing := [seed for seed in every if seed not in of_cell]:
            raise InputError(f"every cell must have the same seeds: {_at(rate, size)} lacks {missing[0]}")
    if len(every) < 2:
        raise InputError("runs must have at least 2 seeds, got 1: one run a cell has no interval")
    return tuple(every)


def _tasks(found: Found) -> list[str]:
    """The tasks that every run scores."""
    tasks = [*next(iter(next(iter(found.values())).values()))]
    if not tasks:
        raise InputError("scores must hold at least one task, got none")
    for (rate, size, _), of_cell in found.items():
        for seed, scores in of_cell.items():
            if set(scores) != set(tasks):
                raise InputError(
                    f"every run must score the tasks {tasks}, got {sorted(scores)} at {_at(rate, size)}, seed {seed}"
                )
    return tasks


def _check_run(run: Any) -> None:
    if not isinstance(run, RatioRun):
        raise InputError(f"runs must hold RatioRun, got {type(run).__name__}")
    check_positive(learning_rate=run.learning_rate)
    check_count(batch_size=run.batch_size, steps=run.steps)
    check_count(0, seed=run.seed)
    if not isinstance(run.scores, Mapping):
        raise InputError(f"scores must map tasks to numbers, got {run.scores!r:.80}")
    for task, score in run.scores.items():
        if not holds(math.isfinite, score):
            where = f"{_at(run.learning_rate, run.batch_size)}, seed {run.seed}"
            raise InputError(f"scores must be finite, got {score!r} for {task!r} at {where}")


def _budget(cells: Sequence[RatioCell]) -> Literal["examples", "steps"]:
    if len({(cell.learning_rate, cell.batch_size) for cell in cells}) < len(cells):
        raise InputError("runs of one learning rate and batch size must have the same steps")
    if len({cell.steps * cell.batch_size for cell in cells}) == 1:
        return "examples"
    if len({cell.steps for cell in cells}) == 1:
        return "steps"
    raise InputError("all cells must have equal examples (steps x batch_size), or all equal steps")


def _at(rate: float, size: int) -> str:
    return f"learning rate {rate:g}, batch size {size}"
