"""A table of runs from where runs are kept: a CSV file, a study's folder, a folder of runs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchlab.core.errors import InputError
from batchlab.core.run import RUN_FILE, Run
from batchlab.core.study import STUDY_FILE, Study
from batchlab.rules.fit.table import RunTable


def read_runs(path: str | Path, *, diverged: str = "refuse") -> RunTable:
    """The runs of a CSV file, of a study's folder, or of the run folders under a folder.

    A CSV has a head of column names that carry the units, as `rules.fit.table` lists them, and one row a run; it is
    read by tabs where it is a .tsv, else by the comma, semicolon or tab that its head holds; numbers have a decimal
    point. A study gives batch_examples, learning_rate and steps_to_target, as `from_study` says; run folders
    also steps, and the loss where each run has one. diverged: of rows whose loss is not finite, "refuse" or "drop".

    Raises `InputError` naming the column, the row and what would be right.
    """
    path = Path(path)
    if path.is_dir():
        return from_study(Study.open(path)) if (path / STUDY_FILE).is_file() else _from_folder(path, diverged)
    if not path.is_file():
        raise InputError(f"path must be a CSV file or a folder of runs, got {str(path)!r}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            text = file.read()
            lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text, path)))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} is not a CSV file: {error}") from None
    lines = [[cell.strip() for cell in line] for line in lines if any(cell.strip() for cell in line)]
    if len(lines) < 2:
        raise InputError(f"{path} must hold a head of column names and at least one row, got {len(lines)} lines")
    head, *rows = lines
    for number, row in enumerate(rows, 1):
        if len(row) != len(head):
            raise InputError(f"{path}: row {number} has {len(row)} cells, the head {len(head)}")
    if twice := {name for name in head if head.count(name) > 1}:
        raise InputError(f"{path}: the column {sorted(twice)[0]!r} comes twice")
    try:
        return RunTable.of({name: [row[at] for row in rows] for at, name in enumerate(head)}, diverged=diverged)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _delimiter(text: str, path: Path) -> str:
    """What parts the cells: a tab in a .tsv, else the first of comma, semicolon and tab that the head holds."""
    head = text.lstrip().splitlines()[:1]
    return "\t" if path.suffix.lower() == ".tsv" else next((mark for mark in ",;\t" if head and mark in head[0]), ",")


def from_study(study: Study) -> RunTable:
    """batch_examples, learning_rate and steps_to_target of a study's tuned rates, one row a fresh seed.

    A batch size that was not run again with fresh seeds has the steps of its search, which are too good on average; the
    notes say so, and which best rates lie at the edge of those tried. Sizes where no run reached the target are left
    out.
    """
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for found in study.rows():
        size, rate = found["batch_size"], found["learning_rate"]
        if rate is None:
            notes.append(f"batch size {size:g} was left out: no run of it reached the target")
            continue
        steps = [math.inf if taken is None else taken for taken in found["steps"] or [found["search_steps"]]]
        if 0 in steps:
            notes.append(f"batch size {size:g} was left out: it met the target before any update")
            continue
        if not found["steps"]:
            notes.append(f"batch size {size:g} has the steps of its search, which are too good on average")
        if found["at_edge"]:
            notes.append(f"the best learning rate at batch size {size:g} lies at the edge of those tried")
        for taken in steps:
            row = {"batch_examples": size, "learning_rate": rate, "steps_to_target": taken}
            rows.append(row | {"learning_rate_at_edge": int(found["at_edge"])})
    if not rows:
        raise InputError(f"{study.path} must hold a batch size that reached its target, got none")
    return _table(rows, notes)


def _from_folder(path: Path, diverged: str) -> RunTable:
    folders = sorted(file.parent for file in path.rglob(RUN_FILE))
    if not folders:
        raise InputError(f"{path} must hold a {STUDY_FILE}, or folders with a {RUN_FILE}, got neither")
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for folder in folders:
        run = Run.open(folder)
        if run.plan.batch_schedule != "fixed":
            notes.append(f"{folder.relative_to(path)} was left out: its batch size is not fixed")
            continue
        rows.append({"run": str(folder.relative_to(path))} | _row(run))
    if not rows:
        raise InputError(f"{path} must hold a run of a fixed batch size, got none")
    shared = set.intersection(*map(set, rows))
    return _table([{name: row[name] for name in row if name in shared} for row in rows], notes, diverged)


def _row(run: Run) -> dict[str, Any]:
    """A run's numbers; those that it does not have are not there."""
    summary, plan = run.summary, run.plan
    row: dict[str, Any] = {"batch_examples": plan.batch_size, "learning_rate": plan.learning_rate}
    if isinstance(decay := plan.hyperparameters.get("weight_decay"), int | float):
        row["weight_decay"] = decay
    if summary["steps"]:
        row["steps"] = summary["steps"]
    if plan.target is not None and summary["target_step"] != 0:
        row["steps_to_target"] = math.inf if summary["target_step"] is None else summary["target_step"]
    if isinstance(loss := summary["final"].get("loss"), int | float | str):
        row["loss"] = loss
    return row


def _table(
    rows: list[Mapping[str, Any]] | list[dict[str, Any]], notes: list[str], diverged: str = "refuse"
) -> RunTable:
    table = RunTable.of({name: [row[name] for row in rows] for name in rows[0]}, diverged=diverged)
    return RunTable(table.columns, table.texts, (*notes, *table.notes))
