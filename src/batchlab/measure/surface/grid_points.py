"""Points of a grid, each evaluated once: shared out over ranks, and taken up again where some are there already."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError
from batchlab.parallel.agree import agree_min, device_of

Array = np.ndarray[Any, np.dtype[np.float64]]


def fill(
    values: Array,
    evaluate: Callable[[int], Sequence[float]],
    process_group: dist.ProcessGroup | None,
    report: Callable[[Array], None] | None,
) -> Array:
    """`values` (points, k) with every row that is NaN evaluated, the same on all ranks.

    A row that any rank has is evaluated by none. Of the others, in order, rank r of n takes each n-th from the r-th
    on. report: gets this rank's rows after each point; what it raises ends the work.
    """
    rank, world = place(process_group)
    held = _united(values, process_group)
    unfilled = np.flatnonzero(np.isnan(held[:, 0]))
    for point in unfilled[rank::world]:
        held[point] = evaluate(int(point))
        if report is not None:
            report(held)
    return _united(held, process_group)


def place(process_group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a group."""
    if process_group is None:
        return 0, 1
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise InputError("process_group must hold the process that calls, this one is not in it")
    return rank, dist.get_world_size(process_group)


def check_alike(numbers: Sequence[float], process_group: dist.ProcessGroup | None, what: str) -> None:
    """Refuses, on every rank, numbers that differ between ranks by more than a millionth."""
    if process_group is None:
        return
    least = agree_min([*numbers, *(-number for number in numbers)], process_group)
    half = len(numbers)
    for low, high in zip(least[:half], least[half:], strict=True):
        if not math.isclose(low, -high, rel_tol=1e-6, abs_tol=1e-12):
            raise InputError(f"all ranks must hold the same {what}: they differ, from {low:.6g} to {-high:.6g}")


def _united(values: Array, process_group: dist.ProcessGroup | None) -> Array:
    """A copy in which each row is that of the first rank that has it."""
    if process_group is None:
        return values.copy()
    mine = torch.from_numpy(values.copy()).to(device_of(process_group))
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(parts, mine, group=process_group)
    united = np.full_like(values, math.nan)
    for part in parts:
        unfilled = np.isnan(united[:, 0])
        united[unfilled] = part.cpu().numpy()[unfilled]
    return united


def symmetric(points: int, span: float) -> tuple[float, ...]:
    """From -span to span with 0 itself among the points."""
    if isinstance(points, bool) or not isinstance(points, int) or points < 3 or points % 2 == 0:
        raise InputError(f"points must be an odd integer of at least 3, so that one of them is 0, got {points!r}")
    check_positive(span=span)
    half = points // 2
    return tuple(span * k / half for k in range(-half, half + 1))


def given_axis(coordinates: Sequence[float], name: str, least: int) -> tuple[float, ...]:
    """The caller's own coordinates, if they ascend."""
    axis = tuple(float(each) for each in coordinates)
    ascend = all(low < high for low, high in pairwise(axis))
    if len(axis) < least or not ascend or not all(map(math.isfinite, axis)):
        raise InputError(f"{name} must be at least {least} finite ascending numbers, got {list(axis)!r:.80}")
    return axis
