"""The columns of a CSV, TSV or Parquet file, read through DuckDB, which sniffs their types over all rows."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchlab.core.errors import InputError

MISSING = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NULL", "null", "None")
"""What a cell says when it holds nothing: pandas' own list, without its rarest spellings."""

_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz", ".parquet")
_INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
_REALS = ("FLOAT", "DOUBLE", "DECIMAL", "HUGEINT", "UHUGEINT")
_TIMES = ("DATE", "TIME", "TIMESTAMP", "INTERVAL")
_TEXTS = ("VARCHAR", "ENUM", "UUID")

Kind = Literal["integer", "real", "truth", "time", "text"]


class Column(NamedTuple):
    """One column. values: float64 with NaN where missing (times in seconds), or, for "text", str with "" there."""

    name: str
    kind: Kind
    values: NDArray[Any]

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Where there is no value."""
        absent: NDArray[np.bool_] = self.values == "" if self.kind == "text" else np.isnan(self.values)
        return absent

    def at(self, rows: NDArray[np.int64]) -> Column:
        """The same column with these rows only."""
        return self._replace(values=self.values[rows])


def read_columns(file: Path) -> list[Column]:
    """All columns, in the file's order and with its rows in order.

    Text files have a header line; the separator is whichever of comma, semicolon, tab and bar that line holds most;
    a cell may be quoted with ". Every row must have as many cells as the header.

    Raises `InputError` where the file is no such table, holds no row or infinities, or has a column of another kind.
    """
    import duckdb

    if not file.is_file():
        raise InputError(f"{file} is not a file")
    if not file.name.lower().endswith(_SUFFIXES):
        raise InputError(f"{file} must be a table with one of the suffixes {', '.join(_SUFFIXES)}")
    closed: dict[str, Any] = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    with duckdb.connect(":memory:", config=closed) as connection:
        try:
            _load(connection, file)
            described = connection.execute("DESCRIBE cells").fetchall()
            columns = [_column(connection, file, name, kind) for name, kind, *_ in described]
        except duckdb.Error as error:
            raise InputError(f"{file} cannot be read as a table: {_why(file, error)}") from None
    if len(columns[0].values) == 0:
        raise InputError(f"{file} holds no rows")
    return columns


def _load(connection: Any, file: Path) -> None:
    name = str(file).replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")  # it is no pattern
    if file.suffix.lower() == ".parquet":
        connection.execute("CREATE TABLE cells AS SELECT * FROM read_parquet(?)", [name])
        return
    if not _header(file).strip():
        raise InputError(f"{file} holds no rows")
    reader = "read_csv(?, header=true, delim=?, quote='\"', escape='\"', comment='', skip=0, sample_size=-1, nullstr=?)"
    connection.execute(f"CREATE TABLE cells AS SELECT * FROM {reader}", [name, _separator(file), list(MISSING)])


def _column(connection: Any, file: Path, name: str, kind: str) -> Column:
    quoted = '"' + name.replace('"', '""') + '"'
    ours = _kind(kind)
    if ours is None:
        raise InputError(f"{file}: column {name!r} is of type {kind}, which is neither a number nor a text")
    as_ours = {"text": f"CAST({quoted} AS VARCHAR)", "time": f"epoch({quoted})"}.get(ours, f"CAST({quoted} AS DOUBLE)")
    values = connection.execute(f"SELECT {as_ours} AS v FROM cells").fetchnumpy()["v"]
    if ours == "text":
        return Column(name, ours, np.ma.filled(values.astype(object), "").astype(object))
    numbers = np.ma.filled(values.astype(np.float64), np.nan)
    if np.isinf(numbers).any():
        row = int(np.flatnonzero(np.isinf(numbers))[0]) + 1
        raise InputError(f"{file}: column {name!r} is infinite in row {row}")
    return Column(name, ours, numbers)


def _kind(duckdb_type: str) -> Kind | None:
    if duckdb_type.endswith("]"):
        return None
    if duckdb_type in _INTEGERS:
        return "integer"
    if duckdb_type == "BOOLEAN":
        return "truth"
    if duckdb_type.startswith(_REALS):
        return "real"
    if duckdb_type.startswith(_TIMES):
        return "time"
    return "text" if duckdb_type.startswith(_TEXTS) else None


def _open(file: Path) -> io.TextIOBase:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", errors="replace", newline="")
    return file.open(encoding="utf-8-sig", errors="replace", newline="")


def _header(file: Path) -> str:
    try:
        with _open(file) as stream:
            return stream.readline()
    except (OSError, EOFError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None


def _separator(file: Path) -> str:
    unquoted = "".join(_header(file).split('"')[::2])
    return max(",;\t|", key=unquoted.count)


def _why(file: Path, error: Exception) -> str:
    """The first row that does not fit the header, where that is what is wrong; else the reader's own words."""
    if file.suffix.lower() != ".parquet" and (misfit := _misfit(file)):
        return misfit
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines[:3] if not line.startswith("Original Line"))


def _misfit(file: Path) -> str | None:
    with contextlib.suppress(csv.Error), _open(file) as stream:
        rows = csv.reader(stream, delimiter=_separator(file))
        expected = len(next(rows))
        for row in rows:
            if row and len(row) != expected:
                return f"line {rows.line_num} has {len(row)} cells, the header has {expected}"
    return None
