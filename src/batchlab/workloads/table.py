"""`table`: predict one column of the user's own table from the others."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.files import existing
from batchlab.core.job import Job, Target
from batchlab.workloads.columns import Column, read_columns
from batchlab.workloads.examples import Batch, Examples, collate
from batchlab.workloads.features import encode, standardise
from batchlab.workloads.models import mlp
from batchlab.workloads.objectives import accuracy, cross_entropy, errors, squared_error
from batchlab.workloads.split import hold_out

Task = Literal["regression", "classification"]
FEWEST_ROWS = 20
MOST_INTEGER_CLASSES = 10


def table(
    path: str | Path,
    target: str | None = None,
    *,
    task: Task | None = None,
    drop: str | Sequence[str] = (),
    max_categories: int = 32,
    hidden: int = 128,
    valid_share: float = 0.2,
    optimizer: str = "adamw",
    reach: Target | None = None,
) -> Job:
    """An MLP that predicts the column `target` of a CSV, TSV or Parquet file from its other columns.

    path: .csv, .tsv, .txt (each also .gz) with a header line, or .parquet.
    target: the name of the column to predict; rows without it are dropped, and counted in `job.train.notes`.
    task: "classification" or "regression"; if None, a column of texts, of true and false, or of integers with at
        most 10 different values is classified, and any other is regressed. Classification measures the accuracy,
        regression the mean absolute and squared error in the column's own unit; its loss is in squared deviations.
    drop: a column, or several, not to predict from.
    max_categories: of a text column, so many columns of zeros and ones at most; see `features.encode` for these, for
        missing cells and for the standardisation, which uses the training rows only.
    valid_share: share of the rows held out, each class in proportion, by the hash of the row's number.
    reach: the job's target, when a run has learned enough.

    Raises `InputError` where there is no path, no such column, nothing to predict or to predict from, or fewer than
    20 rows with a target.
    """
    check_count(max_categories=max_categories, hidden=hidden)
    file, left_out = existing(path), [drop] if isinstance(drop, str) else list(drop)
    columns = {column.name: column for column in read_columns(file)}
    if target is None:
        raise InputError(f"{path} needs target, the column to predict; its columns are {_listed(list(columns))}")
    for name in (target, *left_out):
        if name not in columns:
            close = difflib.get_close_matches(name, columns, n=1)
            meant = f", did you mean {close[0]!r}?" if close else "."
            raise InputError(f"{path} has no column {name!r}{meant} Its columns are {_listed(list(columns))}")
    features = [column for name, column in columns.items() if name != target and name not in left_out]
    return tabular(
        f"table:{file.resolve().name}",
        features,
        columns[target],
        task=task,
        max_categories=max_categories,
        hidden=hidden,
        valid_share=valid_share,
        optimizer=optimizer,
        reach=reach,
    )


class _Lesson(NamedTuple):
    """What the network is taught: a target a row, and how its outputs are judged."""

    targets: Tensor
    outputs: int
    loss: Callable[[nn.Module, Batch], Tensor]
    metric: Callable[[nn.Module, Batch], dict[str, Tensor]]


def tabular(
    name: str,
    columns: Sequence[Column],
    target: Column,
    *,
    task: Task | None = None,
    max_categories: int = 32,
    hidden: int = 64,
    valid_share: float = 0.2,
    optimizer: str = "adamw",
    reach: Target | None = None,
) -> Job:
    """The job over columns that are in memory; arguments as in `table`."""
    task = _checked_task(name, task, target)
    rows = np.flatnonzero(~target.missing)
    if len(rows) < FEWEST_ROWS:
        raise InputError(f"{name} has {len(rows)} rows with a {target.name!r}, but needs at least {FEWEST_ROWS}")
    without = len(target.values) - len(rows)
    notes = (f"rows dropped, for they have no {target.name!r}: {without}",) if without else ()
    target = target.at(rows)
    strata = target.values.tolist() if task == "classification" else None
    train, valid = hold_out([str(row) for row in rows], valid_share, strata)
    lesson = _classified(name, target) if task == "classification" else _regressed(name, target, train)
    features = encode([column.at(rows) for column in columns], train, max_categories=max_categories)
    if not features.names:
        raise InputError(f"{name} has no column to predict {target.name!r} from that is not constant")
    inputs = torch.from_numpy(features.matrix)
    return Job(
        name,
        lambda: mlp(len(features.names), lesson.outputs, hidden=hidden),
        lesson.loss,
        train=Examples(inputs[train], lesson.targets[train], notes + features.notes),
        valid=Examples(inputs[valid], lesson.targets[valid]),
        metric=lesson.metric,
        collate=collate,
        optimizer=optimizer,
        target=reach,
    )


def _checked_task(name: str, task: Task | None, target: Column) -> Task:
    """The task asked for, or by the rule in `table`."""
    if task is None:
        few = target.kind == "integer" and len(np.unique(target.values[~target.missing])) <= MOST_INTEGER_CLASSES
        return "classification" if few or target.kind in ("truth", "text") else "regression"
    if task not in ("classification", "regression"):
        raise InputError(f'task must be "classification" or "regression", got {task!r}')
    if task == "regression" and target.kind == "text":
        raise InputError(f"{name}: column {target.name!r} holds texts, which cannot be regressed")
    return task


def _comma_hint(values: Sequence[Any]) -> str:
    """What to say of texts that are numbers with a decimal comma."""
    commas = all(re.fullmatch(r"[+-]?\d+,\d+", str(value).strip()) for value in values)
    return ": numbers need a decimal point, these have a comma" if commas else ""


def _classified(name: str, target: Column) -> _Lesson:
    classes, labels = np.unique(target.values, return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"{name}: column {target.name!r} holds one class only, {classes.tolist()[0]!r}")
    if len(classes) > len(labels) / 2:
        raise InputError(
            f"{name}: column {target.name!r} holds {len(classes)} different values in {len(labels)} rows, "
            f"too many to be classes{_comma_hint(classes.tolist())}"
        )
    return _Lesson(torch.as_tensor(labels, dtype=torch.int64), len(classes), cross_entropy, accuracy)


def _regressed(name: str, target: Column, train: NDArray[np.int64]) -> _Lesson:
    scaled = standardise(target.values, train)
    if scaled is None:
        raise InputError(f"{name}: column {target.name!r} is constant, there is nothing to predict")
    values, _, deviation = scaled
    return _Lesson(torch.as_tensor(values, dtype=torch.float32), 1, squared_error, errors(deviation))


def _listed(names: Sequence[str], most: int = 30) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
