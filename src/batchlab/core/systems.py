"""The published systems that batchlab implements: `systems.toml` as rows."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files

from batchlab.core.jsonio import JsonNoun, from_plain


@dataclass(frozen=True)
class System(JsonNoun):
    """One system. A row is there only when its tests pass.

    number: its specification's. name: the field's short name. paper: authors, year, title. arxiv: its id there.
    symbols: the public names that implement it. tests: the files that prove it, with `::name` for one test.
    benchmark: the script that holds it against a peer, or None.
    """

    number: int
    name: str
    paper: str
    symbols: tuple[str, ...]
    tests: tuple[str, ...]
    arxiv: str | None = None
    benchmark: str | None = None


def systems() -> tuple[System, ...]:
    """All rows, by number."""
    text = (files("batchlab") / "systems.toml").read_text("utf-8")
    rows = [from_plain(System, row, source="systems.toml") for row in tomllib.loads(text).get("system", [])]
    return tuple(sorted(rows, key=lambda row: row.number))
