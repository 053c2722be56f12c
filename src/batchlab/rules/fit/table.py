"""A table of runs, one row a run or a checkpoint, whose column names carry the units.

| column | what it counts |
| --- | --- |
| params, tokens | N and D, plain counts; also params_millions, tokens_billions and the like |
| batch_tokens, or batch_sequences with sequence_length, or batch_examples | one update's batch, over all devices |
| steps | updates of the whole run; tokens = steps x batch_tokens where tokens is left out |
| steps_to_target | updates until a fixed target was met; blank or inf where it was not |
| learning_rate, weight_decay | the peak η and λ; under μP the width-scaled η |
| learning_rate_at_edge | 1 where the best rate is the smallest or largest tried, else 0 |
| loss | nats a token, of one tokenizer and data set, at the end of a finished schedule |
| replicas | M of DiLoCo; blank or 0 for data-parallel training |
| run | which run a row is of, where a run has several rows |
| optimizer | torch's name, as adamw |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import holds
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.rules.fit.power_laws import plain
from batchlab.rules.fit.table_units import BATCH, SCALED, SCALES, odd_units, refuse_unclear

Array = NDArray[np.float64]
Rows = NDArray[np.intp]
Check = tuple[Callable[[Any], Any], str]

_POSITIVE: Check = (lambda value: 0 < value < math.inf, "be finite and > 0")
_NOT_NEGATIVE: Check = (lambda value: 0 <= value < math.inf, "be finite and >= 0")
_REACHED: Check = (lambda value: value > 0, "be > 0, or blank where the target was not reached")
_REPLICAS: Check = (
    lambda value: 0 <= value < math.inf and value == int(value),
    "be a whole number, or blank for data-parallel training",
)
_EDGE: Check = (lambda value: value in (0, 1), "be 0 or 1")
NUMBERS: Mapping[str, Check] = {
    "params": _POSITIVE,
    "tokens": _POSITIVE,
    "batch_tokens": _POSITIVE,
    "batch_sequences": _POSITIVE,
    "sequence_length": _POSITIVE,
    "batch_examples": _POSITIVE,
    "steps": _POSITIVE,
    "steps_to_target": _REACHED,
    "learning_rate": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "loss": _POSITIVE,
    "replicas": _REPLICAS,
    "learning_rate_at_edge": _EDGE,
}
BLANK: Mapping[str, float] = {"steps_to_target": math.inf, "replicas": 0.0}
TEXTS = ("run", "optimizer")
_AGREE = 0.02  # steps x batch against tokens: a ragged last update, or a rounded count


@dataclass(frozen=True)
class RunTable(JsonNoun):
    """Runs as columns of one length, units as the module says. `read_runs` and `RunTable.of` make and check one.

    columns: numbers by name: steps_to_target is infinite where the target was not met, replicas 0 for data-parallel
    training. texts: labels by name; `run` is always there, one a row where it was not given. notes: what was left out
    or looks odd, in sentences.

    >>> table = RunTable.of({"batch_sequences": [256, 512], "sequence_length": [512, 512], "loss": [3.1, 3.0]})
    >>> table["batch_tokens"].tolist(), len(table)
    ([131072.0, 262144.0], 2)
    """

    columns: Mapping[str, tuple[float, ...]]
    texts: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[Any]], *, diverged: str = "refuse") -> RunTable:
        """From columns by name, numbers or the texts of a file. diverged: of rows whose loss is not finite, "refuse" or
        "drop", and then a note says how many.
        """
        if diverged not in ("refuse", "drop"):
            raise InputError(f'diverged must be "refuse" or "drop", got {diverged!r}')
        if not hasattr(columns, "items"):
            raise InputError(f"columns must be a mapping of names to values, got {columns!r:.80}")
        columns = {str(name): plain(values, str(name)) for name, values in columns.items()}
        named, ignored = _names(columns)
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"columns must be of one length, got {lengths}")
        rows = next(iter(lengths.values()), 0)
        if rows == 0:
            raise InputError("a table of runs must hold at least one row, got none")
        texts = {name: [str(value) for value in columns[name]] for name in TEXTS if name in columns}
        texts.setdefault("run", [str(row + 1) for row in range(rows)])
        numbers = {name: _numbers(name, column, columns[column], scale) for name, (column, scale) in named.items()}
        kept, notes = _finite(numbers, diverged)
        numbers = {name: values[kept] for name, values in numbers.items()}
        _check_numbers(numbers, np.flatnonzero(kept))
        asked = [] if "batch_sequences" in numbers else ["batch_tokens"]
        _complete(numbers)
        notes += [f"columns that no law uses were left out: {', '.join(ignored)}"] if ignored else []
        notes += odd_units({name: numbers[name] for name in ("params", "tokens", *asked) if name in numbers})
        return cls(
            {name: tuple(map(float, values)) for name, values in numbers.items()},
            {name: tuple(np.array(values)[kept].tolist()) for name, values in texts.items()},
            tuple(notes),
        )

    def __len__(self) -> int:
        return len(self.texts["run"])

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> Array:
        self.need(name)
        return np.array(self.columns[name], dtype=np.float64)

    def need(self, *names: str, law: str = "what was asked") -> None:
        """`InputError` naming the first column that is not there."""
        for name in names:
            if name not in self.columns:
                also = f" (or {BATCH})" if name == "batch_tokens" else ""
                raise InputError(f"{law} needs the column {name}{also}, got {', '.join(self.columns)}")

    def batch(self, law: str = "what was asked") -> tuple[str, Array]:
        """The batch column's name, which is its unit, and its values: tokens where known, else examples."""
        for name in ("batch_tokens", "batch_examples"):
            if name in self:
                return name, self[name]
        raise InputError(f"{law} needs a batch column, {BATCH}, got {', '.join(self.columns)}")

    def groups(self, *names: str) -> list[tuple[tuple[float, ...], Rows]]:
        """The rows that share a value in every one of those columns, with the values, in ascending order."""
        return groups(*(self[name] for name in names))

    def take(self, rows: Sequence[int] | Rows) -> RunTable:
        """The rows of those indices, in that order; a row may come twice."""
        return RunTable(
            {name: tuple(values[row] for row in rows) for name, values in self.columns.items()},
            {name: tuple(values[row] for row in rows) for name, values in self.texts.items()},
            self.notes,
        )


def groups(*columns: Array) -> list[tuple[tuple[float, ...], Rows]]:
    """The rows that share a value in every column, to 9 digits; with those values, in ascending order."""
    with np.errstate(divide="ignore"):
        keys = np.round(np.log(np.stack(columns, 1)) * 1e9)
    _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    return [
        (tuple(float(column[first[group]]) for column in columns), np.flatnonzero(which == group))
        for group in range(len(first))
    ]


def _names(columns: Mapping[str, Any]) -> tuple[dict[str, tuple[str, float]], list[str]]:
    """Each known number's column and factor, and the columns that no law uses."""
    named: dict[str, tuple[str, float]] = {}
    ignored = []
    for column in columns:
        stem, _, last = column.rpartition("_")
        scaled = stem in SCALED and last in SCALES
        name, scale = (stem, SCALES[last]) if scaled else (column, 1.0)
        if name in NUMBERS:
            if name in named:
                raise InputError(f"{column} and {named[name][0]} are one column twice: keep one")
            named[name] = (column, scale)
        elif column not in TEXTS:
            refuse_unclear(column, (*NUMBERS, *TEXTS))
            ignored.append(column)
    if "batch_sequences" in named and "sequence_length" not in named:
        raise InputError("batch_sequences needs sequence_length, the tokens of each; or name the batch batch_tokens")
    return named, ignored


def _numbers(name: str, column: str, values: Sequence[Any], scale: float) -> Array:
    found = np.empty(len(values))
    for row, value in enumerate(values):
        blank = value is None or (isinstance(value, str) and not value.strip())
        if blank and name in BLANK:
            found[row] = BLANK[name]
            continue
        try:
            found[row] = float(value) * scale
        except (TypeError, ValueError):
            comma = (
                ": write it with a decimal point and no other mark" if isinstance(value, str) and "," in value else ""
            )
            raise InputError(f"{column} must be a number, got {value!r} in row {row + 1}{comma}") from None
    return found


def _finite(numbers: Mapping[str, Array], diverged: str) -> tuple[NDArray[np.bool_], list[str]]:
    rows = len(next(iter(numbers.values()))) if numbers else 0
    if rows == 0:
        raise InputError(f"a table of runs must hold a column that a law uses: {', '.join(NUMBERS)}")
    kept = np.ones(rows, dtype=bool)
    if "loss" not in numbers:
        return kept, []
    kept = np.isfinite(numbers["loss"])
    if kept.all():
        return kept, []
    first = int(np.argmin(kept))
    if diverged == "refuse":
        raise InputError(
            f"loss must be finite, got {numbers['loss'][first]} in row {first + 1}: leave diverged runs out, or say "
            'diverged="drop" (--drop-diverged)'
        )
    if not kept.any():
        raise InputError("loss must be finite in at least one row, got none")
    return kept, [f"{int((~kept).sum())} of {rows} rows were left out: their loss is not finite"]


def _check_numbers(numbers: Mapping[str, Array], rows: Rows) -> None:
    for name, values in numbers.items():
        condition, right = NUMBERS[name]
        for row, value in zip(rows, values, strict=True):
            if not holds(condition, value):
                raise InputError(f"{name} must {right}, got {value:g} in row {row + 1}")
    if "tokens" in numbers and "steps" in numbers and "batch_tokens" in numbers:
        _check_agree("tokens", numbers["tokens"], numbers["steps"] * numbers["batch_tokens"], "steps x batch_tokens")
    if "batch_tokens" in numbers and "batch_sequences" in numbers:
        made = numbers["batch_sequences"] * numbers["sequence_length"]
        _check_agree("batch_tokens", numbers["batch_tokens"], made, "batch_sequences x sequence_length")


def _check_agree(name: str, given: Array, made: Array, how: str) -> None:
    off = np.abs(given / made - 1)
    if (worst := int(np.argmax(off))) >= 0 and not off[worst] <= _AGREE:
        raise InputError(f"{name} must be {how}, got {given[worst]:.6g} and {made[worst]:.6g}: is one in another unit?")


def _complete(numbers: dict[str, Array]) -> None:
    """What follows from the columns given."""
    if "batch_sequences" in numbers:
        numbers.setdefault("batch_tokens", numbers["batch_sequences"] * numbers["sequence_length"])
    if "steps" in numbers and "batch_tokens" in numbers:
        numbers.setdefault("tokens", numbers["steps"] * numbers["batch_tokens"])
    if "tokens" in numbers and "batch_tokens" in numbers:
        numbers.setdefault("steps", numbers["tokens"] / numbers["batch_tokens"])
        short = np.flatnonzero(numbers["tokens"] < numbers["batch_tokens"] * (1 - 1e-9))
        if len(short):
            tokens, batch = numbers["tokens"][short[0]], numbers["batch_tokens"][short[0]]
            raise InputError(
                f"tokens must be those of the whole run, at least one batch of {batch:.6g}, got {tokens:.6g}: is one "
                "in another unit?"
            )
