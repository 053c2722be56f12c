"""What a study of learning rate and batch size says, as plain numbers: for JSON, for tables, for pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun

Verdict = Literal["high", "low", "curved", "not the ratio", "none"]


@dataclass(frozen=True)
class RatioCell(JsonNoun):
    """One setting of a grid. learning_rate: η. batch_size: B. steps: updates. ratio: η/B. product: η·B."""

    learning_rate: float
    batch_size: int
    steps: int
    ratio: float
    product: float


@dataclass(frozen=True)
class RatioPoint(JsonNoun):
    """The mean score over all cells of one ratio. score: with its interval over seeds. cells: how many they are."""

    ratio: float
    score: Estimate
    cells: int


@dataclass(frozen=True)
class TaskRatio(JsonNoun):
    """What a grid says of one task. Slopes are of the score, in its unit, for a factor of e.

    direction: "max" if a higher score is better, else "min".
    verdict: "high" or "low", the task is better at a high or a low ratio, by the slope; "curved", no slope, but no
    regression without the ratio holds; "not the ratio", something else explains it; "none", nothing is seen.
    ratio_slope, product_slope: b and c, at the centre of the grid. batch_exponent: e, the score goes with η/B^e.
    p_any: of no effect at all. p_alone: quantity -> p of its regression being all there is ("ratio", "product",
    "learning_rate", "batch_size"). shares: of the cells' variance that each of them explains, and "both".
    p_fit: of the quadratic in both being all there is. best: the index of the best cell. interior: whether that lies
    inside the grid; else it is no optimum. scores: of each cell. by_ratio: their means along lines of equal ratio.
    """

    task: str
    direction: Literal["max", "min"]
    verdict: Verdict
    ratio_slope: Estimate
    product_slope: Estimate
    batch_exponent: Estimate
    p_any: float
    p_alone: Mapping[str, float]
    shares: Mapping[str, float]
    p_fit: float
    best: int
    interior: bool
    scores: tuple[Estimate, ...]
    by_ratio: tuple[RatioPoint, ...]

    @property
    def sufficient(self) -> tuple[str, ...]:
        """The single quantities that may be all that counts; none where learning rate and batch both do, or nothing."""
        level = 1 - self.ratio_slope.coverage
        return tuple(name for name, p in self.p_alone.items() if p >= level) if self.p_any < level else ()


@dataclass(frozen=True)
class TaskSplit(JsonNoun):
    """Whether two tasks want different ratios. how: in words. apart: the share of bootstrap draws over seeds in which
    their best ratios are more than a step of the grid apart."""

    first: str
    second: str
    found: bool
    how: str
    apart: float


@dataclass(frozen=True)
class LrToBatch(JsonNoun):
    """What a grid says. budget: what all cells have equal, "examples" or "steps". seeds: of every cell.

    compromise: the index of the cell of the best mean rank over tasks, of equal ones the one of the lowest learning
    rate and batch. prices: task -> how much worse it is there than at its best cell, in its unit; the best of many
    noisy cells is too good on average. notes: what the reader must know.
    """

    cells: tuple[RatioCell, ...]
    tasks: tuple[TaskRatio, ...]
    splits: tuple[TaskSplit, ...]
    budget: Literal["examples", "steps"]
    seeds: tuple[int, ...]
    compromise: int
    prices: Mapping[str, float]
    notes: tuple[str, ...]

    def task(self, name: str) -> TaskRatio:
        """What is said of one task."""
        for each in self.tasks:
            if each.task == name:
                return each
        raise InputError(f"task must be one of {[each.task for each in self.tasks]}, got {name!r}")

    def summary(self) -> str:
        """A line for each task, for each split, and for the compromise."""
        lines = []
        for each in self.tasks:
            best, e = self.cells[each.best], each.batch_exponent
            enough = " or ".join(each.sufficient) or ("both" if each.verdict != "none" else "nothing")
            where = "" if each.interior else " (at the edge)"
            lines.append(
                f"{each.task}: {each.verdict}; what is enough to explain it: {enough}; exponent of the batch "
                f"{e.value:.3g} [{e.low:.3g}, {e.high:.3g}]; best ratio {best.ratio:.3g}{where}"
            )
        lines += [f"{each.first} against {each.second}: {each.how}" for each in self.splits]
        cell, prices = self.cells[self.compromise], ", ".join(f"{k} {v:.3g}" for k, v in self.prices.items())
        lines.append(
            f"compromise: learning rate {cell.learning_rate:.3g}, batch size {cell.batch_size}; costs {prices}"
        )
        return "\n".join([*lines, *self.notes])
