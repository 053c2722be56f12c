"""JSON both ways for the frozen nouns: strict JSON on disk, non-finite floats as strings.

Every noun is a dataclass of numbers, strings, mappings, tuples and other such dataclasses; `to_plain`
and `from_plain` walk its type hints, so that a new field needs no code here. Numbers of other libraries are written as
Python's.
Where a field may hold anything (`Any`), "inf", "-inf" and "nan" are numbers too, and a text that reads so is told
apart as {"text": "inf"}.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import operator
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from batchlab.core.checks import is_whole
from batchlab.core.errors import InputError

T = TypeVar("T")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def to_plain(value: Any) -> Any:
    """Dataclasses, mappings, sequences and numbers as what `json.dumps(allow_nan=False)` takes."""
    return _plain(value, free=False)


def _plain(value: Any, *, free: bool) -> Any:
    """free: whether it is read back as `Any`, with no type that tells a text from a number."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        names = (field.name for field in dataclasses.fields(value))
        return {name: _plain(getattr(value, name), free=_is_free(hints[name])) for name in names}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, free=free) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, free=free) for item in value]
    if isinstance(value, str):
        return {"text": value} if free and value in _NON_FINITE else value
    if type(value) in (bool, int, type(None)):
        return value
    if is_whole(value):
        return int(operator.index(value))
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot be written as JSON: {type(value).__name__} {value!r}")


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON text of `to_plain(value)`, on one line unless `indent` is given."""
    return json.dumps(to_plain(value), allow_nan=False, ensure_ascii=False, indent=indent)


def loads(text: str | bytes, *, source: str = "JSON") -> Any:
    """The value of a JSON text; `InputError` naming `source` where it is none."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"{source} is not valid JSON: {error}") from None


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_plain(cls: type[T], plain: Any, *, source: str = "JSON") -> T:
    """A dataclass from what `to_plain` made; unknown and missing fields are refused by name."""
    if not isinstance(plain, Mapping):
        raise InputError(f"{source}: expected an object for {cls.__name__}, got {type(plain).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(plain) - set(fields)):
        raise InputError(f"{source}: {cls.__name__} has no field {unknown[0]!r}")
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(plain)):
        raise InputError(f"{source}: {cls.__name__} lacks the field {missing[0]!r}")
    hints = _hints(cls)  # type: ignore[arg-type]
    values = {name: _convert(hints[name], item, f"{source}: {cls.__name__}.{name}") for name, item in plain.items()}
    return cls(**values)


def settle_fields(noun: Any, name: str) -> None:
    """Makes each field what would be read back: plain numbers, tuples where the type says so.

    `InputError` where it is not of its type, or none of its choices. noun: in its `__post_init__`, for it may be
    frozen. name: the noun's, for errors.
    """
    cls: Any = type(noun)
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        value, where = getattr(noun, field.name), f"{name} {field.name}"
        try:
            plain = _plain(value, free=_is_free(hints[field.name]))
        except TypeError as error:
            raise InputError(f"{where} {error}") from None
        object.__setattr__(noun, field.name, _convert(hints[field.name], plain, where))


def _is_free(hint: Any) -> bool:
    return hint is Any or Any in typing.get_args(hint)


def _revived(item: Any) -> Any:
    """What `_plain` made of a value that may be anything; sequences are lists."""
    if isinstance(item, str):
        return _NON_FINITE.get(item, item)
    if isinstance(item, list):
        return [_revived(part) for part in item]
    if not isinstance(item, Mapping):
        return item
    if set(item) == {"text"} and isinstance(item["text"], str) and item["text"] in _NON_FINITE:
        return item["text"]
    return {key: _revived(part) for key, part in item.items()}


def _convert(hint: Any, item: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _revived(item)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, item, where)
    if origin is typing.Literal:
        if item not in arguments:
            raise InputError(f"{where} must be one of {list(arguments)}, got {item!r}")
        return item
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, item, source=where)
    if origin is tuple:
        if not isinstance(item, list):
            raise InputError(f"{where} must be a list, got {item!r}")
        inner = arguments[:1] * len(item) if len(arguments) == 2 and arguments[1] is Ellipsis else arguments
        if len(inner) != len(item):
            raise InputError(f"{where} must hold {len(inner)} values, got {len(item)}")
        return tuple(_convert(each, part, where) for each, part in zip(inner, item, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(item, Mapping):
            raise InputError(f"{where} must be an object, got {item!r}")
        return {key: _convert(arguments[1], part, where) for key, part in item.items()}
    if hint is float:
        if isinstance(item, str) and item in _NON_FINITE:
            return _NON_FINITE[item]
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            raise InputError(f"{where} must be a number, got {item!r}")
        return float(item)
    if hint in (int, str, bool, type(None)):
        if type(item) is not hint:
            raise InputError(f"{where} must be {hint.__name__}, got {item!r}")
        return item
    raise TypeError(f"{where}: no JSON form for the type {hint!r}")


def _convert_union(options: tuple[Any, ...], item: Any, where: str) -> Any:
    for option in options:
        try:
            return _convert(option, item, where)
        except InputError:
            continue
    raise InputError(f"{where} does not fit its type, got {item!r}")


class JsonNoun:
    """Gives a frozen dataclass `to_json`/`from_json`. Reading back what was written gives an equal value."""

    def to_json(self, *, indent: int | None = 2) -> str:
        """Strict JSON text."""
        return dumps(self, indent=indent)

    @classmethod
    def from_json(cls: type[T], text: str | bytes, *, source: str = "JSON") -> T:
        """The noun that `to_json` wrote; `InputError` naming `source` and the field where it does not fit."""
        return from_plain(cls, loads(text, source=source), source=source)
