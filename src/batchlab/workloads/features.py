"""From columns to a matrix of standardised numbers, with the statistics of the training rows only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchlab.workloads.columns import Column


class Features(NamedTuple):
    """matrix: (rows, features), float32. names: one a feature. notes: what was dropped or lumped together."""

    matrix: NDArray[np.float32]
    names: tuple[str, ...]
    notes: tuple[str, ...]


def encode(columns: Sequence[Column], train: NDArray[np.int64], *, max_categories: int) -> Features:
    """Numbers standardised, texts as one column a category.

    train: the rows whose mean, deviation and categories are used for all rows.
    A missing number becomes the mean, and a column of its own says where. A missing text is a category. Beyond
    `max_categories` the rarest share one, which also takes what only other rows have; without it that is all zeros.
    Columns with one value in all training rows are dropped.
    """
    pieces: list[tuple[str, NDArray[np.float64]]] = []
    constant, lumped = [], []
    for column in columns:
        made = _categories(column, train, max_categories) if column.kind == "text" else _numbers(column, train)
        pieces += made
        if not made:
            constant.append(column.name)
        elif column.kind == "text" and made[-1][0] == f"{column.name}: other":
            lumped.append(column.name)
    notes = [f"constant columns were dropped: {', '.join(constant)}"] if constant else []
    notes += [f"rare texts share one category in: {', '.join(lumped)}"] if lumped else []
    rows = len(columns[0].values) if columns else 0
    matrix = np.stack([values for _, values in pieces], axis=1) if pieces else np.zeros((rows, 0))
    return Features(matrix.astype(np.float32), tuple(name for name, _ in pieces), tuple(notes))


def standardise(
    values: NDArray[np.float64], train: NDArray[np.int64]
) -> tuple[NDArray[np.float64], float, float] | None:
    """((values - mean) / deviation, mean, deviation) of the training rows that have a value; None if they are constant.

    deviation: the root mean square distance from the mean. NaN stays NaN.
    """
    known = values[train]
    known = known[~np.isnan(known)]
    if len(known) == 0 or known.min() == known.max():
        return None
    largest = np.abs(known).max()  # so that no square overflows
    mean, deviation = (known / largest).mean(), (known / largest).std()
    return (values / largest - mean) / deviation, float(mean * largest), float(deviation * largest)


def _numbers(column: Column, train: NDArray[np.int64]) -> list[tuple[str, NDArray[np.float64]]]:
    made = []
    if (scaled := standardise(column.values, train)) is not None:
        made.append((column.name, np.where(column.missing, 0.0, scaled[0])))
    if column.missing[train].any() and not column.missing[train].all():
        made.append((f"{column.name} is missing", column.missing.astype(np.float64)))
    return made


def _categories(column: Column, train: NDArray[np.int64], max_categories: int) -> list[tuple[str, NDArray[np.float64]]]:
    levels, counts = np.unique(column.values[train], return_counts=True)
    if len(levels) < 2:
        return []
    kept = levels
    if len(levels) > max_categories:
        kept = levels[np.argsort(-counts, kind="stable")[: max_categories - 1]]
    made = [(f"{column.name}: {level or 'missing'}", (column.values == level).astype(np.float64)) for level in kept]
    if len(kept) < len(levels):
        made.append((f"{column.name}: other", (~np.isin(column.values, kept)).astype(np.float64)))
    return made
