"""Flat TOML: read by `tomllib`, written so that reading gives the same values back."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from batchlab.core.errors import InputError


def read_toml(text: str, *, source: str = "TOML") -> dict[str, Any]:
    """The tables and values of a TOML text; `InputError` naming `source` where it is none."""
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"{source} is not valid TOML: {error}") from None


def write_toml(
    settings: Mapping[str, Any], *, comments: Mapping[str, str] | None = None, head: Sequence[str] = ()
) -> str:
    """One line `name = value` a setting. comments: by name, put after the value. head: lines of comment before all.

    Values: booleans, integers, floats, texts, and lists of them; names must be bare TOML keys.

    >>> print(write_toml({"eps": 1e-8, "unit": "tokens"}, comments={"eps": "kept"}), end="")
    eps = 1e-08  # kept
    unit = "tokens"
    """
    notes = comments or {}
    lines = [f"# {_one_line(line)}" for line in head]
    for name, value in settings.items():
        lines.append(f"{name} = {_value(value)}" + (f"  # {_one_line(notes[name])}" if notes.get(name) else ""))
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item) for item in value)}]"
    raise TypeError(f"cannot be written as TOML: {type(value).__name__} {value!r}")


def _one_line(text: str) -> str:
    """A comment's text: TOML allows no control character in it but the tab."""
    return "".join(c if c.isprintable() else " " for c in text)
