"""Any of the laws by its name, with one kind of result: constants with intervals, errors, warnings, a table."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.core.study import Study
from batchlab.rules.fit.law_names import SAYS
from batchlab.rules.fit.reading import from_study, read_runs
from batchlab.rules.fit.table import RunTable


@dataclass(frozen=True)
class Fit(JsonNoun):
    """What a law fitted to runs came to.

    law: its name. formula, source: for the reader. constants: by the formula's letters, each with its interval.
    leave_one_out: the mean |ln(measured/predicted)| of what was left out, by quantity. residuals: by quantity, in the
    law's own measure. runs: rows of the table. warnings: what the reader must know, in sentences.
    """

    law: str
    formula: str
    source: str
    constants: Mapping[str, Estimate]
    leave_one_out: Mapping[str, float]
    residuals: Mapping[str, tuple[float, ...]]
    runs: int
    warnings: tuple[str, ...] = ()

    def table(self) -> str:
        """The constants as lines of equal columns, the errors and the warnings under them."""
        rows: list[tuple[str, ...]] = [("constant", "value", "low", "high", "at", "how")]
        for name, constant in self.constants.items():
            numbers = (_figure(number) for number in (constant.value, constant.low, constant.high))
            rows.append((name, *numbers, f"{100 * constant.coverage:g} %", constant.method))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [f"{self.law}: {self.formula}", f"{self.source}; {self.runs} rows", ""]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:5], widths[1:]))]
            lines.append("  ".join([*cells, row[5]]).rstrip())
        lines += [""] if self.leave_one_out else []
        for name, error in self.leave_one_out.items():
            lines.append(f"{name}: off by {_percent(error)} where it was left out")
        return "\n".join([*lines, *(f"! {warning}" for warning in self.warnings)])


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _percent(error: float) -> str:
    """|ln(measured/predicted)| in per cent to two digits; beyond tenfold as a factor."""
    if error > math.log(11):
        return "more than a factor of 10"
    percent = float(f"{100 * math.expm1(error):.2g}")
    return f"{percent:,.0f} %" if percent >= 100 else f"{percent:g} %"


def fit(table: RunTable | Study | str | Path, law: str, **options: Any) -> Fit:
    """The law of that name, fitted to a table of runs, a study, or the path of either (`read_runs`).

    law: one of `fit_laws()`. options: that law's own, as x="tokens", y="loss" for "power_law".

    Raises `InputError` for a law or an option that is not known, a column that is not there, and runs that do not tell
    the law.

    >>> table = RunTable.of({"tokens": [1e9, 1e10, 1e11], "batch_tokens": [2e5, 4e5, 8e5]})
    >>> round(fit(table, "power_law", x="tokens", y="batch_tokens").constants["b"].value, 4)
    0.301
    """
    from batchlab.rules.fit.named_laws import LAWS

    if not isinstance(law, str) or law not in LAWS:
        raise InputError(f"law must be one of {', '.join(LAWS)}, got {law!r}")
    takes = {n: each for n, each in inspect.signature(LAWS[law]).parameters.items() if each.kind == each.KEYWORD_ONLY}
    known = list(takes)
    for option in options:
        if option not in known:
            raise InputError(f"{law} takes the options {', '.join(known) or 'none'}, got {option!r}")
    needed = [name for name, each in takes.items() if each.default is each.empty and name not in options]
    if needed:
        raise InputError(f"{law} needs the options {', '.join(needed)}")
    return LAWS[law](_table(table), **options)


def fit_laws() -> dict[str, str]:
    """The laws' names, each with what it says.

    >>> fit_laws()["chinchilla"]
    'loss = E + A/N^α + B/D^β'
    """
    return dict(SAYS)


def _table(given: RunTable | Study | str | Path) -> RunTable:
    if isinstance(given, RunTable):
        return given
    if isinstance(given, Study):
        return from_study(given)
    if isinstance(given, str | Path):
        return read_runs(given)
    raise InputError(f"table must be a RunTable, a Study or a path, got {type(given).__name__}")


def warnings_of(table: RunTable, *notes: str, seen: Sequence[str] = ()) -> tuple[str, ...]:
    """The table's notes and a law's, each once, without the empty ones."""
    return tuple(dict.fromkeys(note for note in (*table.notes, *seen, *notes) if note))
