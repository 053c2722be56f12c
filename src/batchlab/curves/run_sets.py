"""Sets of runs as one row a batch size: the mean of ln steps, how many runs, and what the censored ones do to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_positive, holds
from batchlab.core.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RunSets:
    """One entry a batch size, ascending. sizes: examples. log_steps: ln of the updates to the target. counts: runs.

    by_median: whether the size counts by its median, as some of its runs did not reach the target.
    square_sum, free: the squares of ln steps about the mean of their size, summed, and their degrees of freedom; of
    the sizes where every run reached the target. 0 where no such size has two runs.
    censored: runs that did not reach the target. left_out: the sizes where half or more did not. notes: what was done
    about them, in sentences.
    """

    sizes: Array
    log_steps: Array
    counts: Array
    by_median: NDArray[np.bool_]
    square_sum: float
    free: int
    censored: int
    left_out: tuple[float, ...]
    notes: tuple[str, ...]


def by_size(batch_sizes: Sequence[float], steps: Sequence[float | None]) -> RunSets:
    """The runs of each batch size together, from one (batch size, steps to target) a run.

    steps: None or infinity for a run that did not reach the target: it took longer than any that did. Where such are
    fewer than half of a size's runs, the median stands for the mean; else the size is left out.
    """
    kept, notes, left_out = [], [], []
    square_sum, free, censored = 0.0, 0, 0
    for size, logs in sorted(_checked(batch_sizes, steps).items()):
        lost = int(np.isinf(logs).sum())
        censored += lost
        if 2 * lost >= len(logs):
            left_out.append(size)
            notes.append(f"batch size {size:g} is left out: {lost} of {len(logs)} runs did not reach the target")
            continue
        if lost:
            notes.append(
                f"batch size {size:g} counts by its median: {lost} of {len(logs)} runs did not reach the target"
            )
        else:
            square_sum += float(((logs - logs.mean()) ** 2).sum())
            free += len(logs) - 1
        kept.append((size, float(np.median(logs) if lost else logs.mean()), len(logs), lost))
    table = np.array(kept, dtype=np.float64).reshape(-1, 4).T
    return RunSets(
        table[0], table[1], table[2], table[3] > 0, square_sum, free, censored, tuple(left_out), tuple(notes)
    )


def _checked(batch_sizes: Sequence[float], steps: Sequence[float | None]) -> dict[float, Array]:
    """ln steps of each size's runs."""
    for name, values in (("batch_sizes", batch_sizes), ("steps", steps)):
        if not hasattr(values, "__len__"):
            raise InputError(f"{name} must be a sequence of numbers, got {values!r:.80}")
    if len(batch_sizes) != len(steps):
        raise InputError(f"batch_sizes and steps must be of one length, got {len(batch_sizes)} and {len(steps)}")
    runs: dict[float, list[float]] = {}
    for size, count in zip(batch_sizes, steps, strict=True):
        check_positive(batch_sizes=size)
        if count is not None and not holds(lambda steps: steps > 0, count):
            raise InputError(f"steps must be > 0, or None where the target was not reached, got {count!r}")
        value = math.inf if count is None else float(count)
        runs.setdefault(float(size), []).append(math.log(value))
    return {size: np.array(logs) for size, logs in runs.items()}
