"""JSON lines that many processes may append to: whole lines under a lock, a torn last one put right."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchlab.core.errors import BatchlabError
from batchlab.core.files import naming_storage_errors
from batchlab.core.jsonio import dumps


def append_line(path: str | Path, value: Any) -> None:
    """Appends one line, whole or not at all, under an exclusive lock on the file.

    A torn last line that a killed writer left is cut off first. A refused write leaves the file as it was
    and raises `StorageError`.
    """
    path = Path(path)
    data = dumps(value).encode() + b"\n"
    with naming_storage_errors(path, f"{len(data)} bytes"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = _cut_torn_tail(descriptor)
            try:
                _write_all(descriptor, data)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines as dicts, in order; a torn last line is left out.

    Safe while others append. Damage in the middle raises `BatchlabError` with the line number.
    """
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            value = _parse(line)
            if value is not None:
                yield value
            elif not file.read().strip(b"\0\n\r "):
                return
            else:
                raise BatchlabError(f"{path} is damaged in line {number}: not a whole JSON object")


def keep_lines(path: str | Path, count: int) -> None:
    """Cuts the file down to its first `count` lines, durably."""
    path = Path(path)
    if not path.exists():
        return
    with naming_storage_errors(path), path.open("rb+") as file:
        for _ in range(count):
            file.readline()
        file.truncate(file.tell())
        os.fsync(file.fileno())


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _cut_torn_tail(descriptor: int) -> int:
    """Cuts what follows the last newline; returns the size of what is left."""
    size = os.fstat(descriptor).st_size
    end, block = size, 4096
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
    return end


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
