"""Intervals by drawing the runs again with replacement, for laws that have no closed one (Efron 1979).

Whole runs are drawn, never their checkpoints, which are correlated. The percentile interval is approximate: with few
runs it is too narrow. At 90 % it held a power law's exponent in 82, 86 and 87 % of 200 tables of 10, 20 and 40 points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_count, check_inside
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate

Array = NDArray[np.float64]
Rows = NDArray[np.intp]
MOST_FAILED = 0.1


@dataclass(frozen=True)
class Draws:
    """What the drawn tables gave. values: one row a draw, one column a number; NaN where it had none."""

    values: Array

    def estimate(self, column: int, value: float, method: str, coverage: float) -> Estimate:
        """`value` with the percentile interval of a column; unbounded where over a tenth of the draws had no value."""
        known = self.values[:, column]
        known = known[~np.isnan(known)]
        failed = len(self.values) - len(known)
        if failed > MOST_FAILED * len(self.values):
            why = f"{method}; no interval: {failed} of {len(self.values)} drawn tables could not be fitted"
            return Estimate(value, -math.inf, math.inf, why, coverage)
        low, high = np.quantile(known, [(1 - coverage) / 2, (1 + coverage) / 2])
        return Estimate(value, min(float(low), value), max(float(high), value), method, coverage)


def bootstrap(
    statistic: Callable[[Rows], Sequence[float]],
    runs: Sequence[Hashable],
    *,
    within: Sequence[Hashable] | None = None,
    draws: int = 200,
    seed: int = 0,
    coverage: float = 0.95,
) -> Draws:
    """`statistic` of tables made of as many runs, drawn with replacement.

    statistic: takes the indices of a drawn table's rows, those of a run drawn twice twice; an `InputError` of its own
    counts as a draw that could not be fitted. runs: the run of each row. within: a group of each run, in which it is
    drawn for one of its kind, so that no group is ever empty; None for one group of all. Deterministic in `seed`.
    """
    check_count(2, draws=draws)
    check_count(0, seed=seed)
    check_inside(coverage=coverage)
    generator = np.random.default_rng(seed)
    groups = _groups(runs, within)
    found: list[Sequence[float] | None] = []
    for _ in range(draws):
        drawn = [
            members[int(pick)] for members in groups for pick in generator.integers(len(members), size=len(members))
        ]
        try:
            found.append(list(statistic(np.concatenate(drawn))))
        except InputError:
            found.append(None)
    width = max((len(row) for row in found if row is not None), default=1)
    blank = [math.nan] * width
    return Draws(np.array([blank if row is None else row for row in found], dtype=np.float64))


def _groups(runs: Sequence[Hashable], within: Sequence[Hashable] | None) -> list[list[Rows]]:
    """The rows of each run, by group, in the order of the table."""
    rows: dict[Hashable, list[int]] = {}
    home: dict[Hashable, Hashable] = {}
    for index, run in enumerate(runs):
        rows.setdefault(run, []).append(index)
        home.setdefault(run, None if within is None else within[index])
    groups: dict[Hashable, list[Rows]] = {}
    for run, members in rows.items():
        groups.setdefault(home[run], []).append(np.array(members, dtype=np.intp))
    return list(groups.values())
