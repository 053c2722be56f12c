"""Files that are whole or not there: write beside, fsync, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from batchlab.core.errors import InputError, StorageError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def existing(path: str | Path) -> Path:
    """`path` as a `Path`, "~" expanded; `InputError` where there is nothing."""
    found = Path(path).expanduser()
    if not found.exists():
        raise InputError(f"{path} does not exist")
    return found


@contextlib.contextmanager
def naming_storage_errors(path: Path, needed: str = "") -> Iterator[None]:
    """Turns the operating system's refusal to write `path` into a `StorageError` that names it."""
    try:
        yield
    except OSError as error:
        room = f"; {needed} needed" if needed and error.errno in _NO_ROOM else ""
        raise StorageError(f"cannot write {path}: {error.strerror or error}{room}") from error


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_atomic(path: Path, fill: Callable[[Path], None], *, name: Callable[[Path], Path] | None = None) -> Path:
    """Writes a file through `fill(temporary path)` and gives it its name only when it is whole on disk.

    path: the final name; with `name`, a function of the finished temporary file, the folder's own choice of it.
    An existing target keeps its mode, and a link keeps pointing where it did. Returns the final path.
    """
    target = Path(os.path.realpath(path))
    with naming_storage_errors(path):
        descriptor, temporary_name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(descriptor)
    temporary = Path(temporary_name)
    try:
        with naming_storage_errors(path):
            fill(temporary)
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            temporary.chmod(target.stat().st_mode & 0o7777 if target.exists() else 0o666 & ~_umask())
            final = name(temporary) if name else target
            os.replace(temporary, final)
            fsync_folder(final.parent)
            return final
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Writes a whole file or nothing; `StorageError` naming the path and the bytes needed where the disk refuses."""
    path, data = Path(path), content.encode() if isinstance(content, str) else content
    with naming_storage_errors(path, f"{len(data)} bytes"):
        path.parent.mkdir(parents=True, exist_ok=True)
    return replace_atomic(path, lambda temporary: _write(temporary, data, path))


def _write(temporary: Path, data: bytes, path: Path) -> None:
    with naming_storage_errors(path, f"{len(data)} bytes"):
        temporary.write_bytes(data)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
