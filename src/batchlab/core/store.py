"""Writing a run folder: one writer at a time, whole lines, `run.json` replaced in one move."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchlab.core.errors import InputError, RunLockedError
from batchlab.core.files import naming_storage_errors, write_atomic
from batchlab.core.jsonio import dumps, loads
from batchlab.core.jsonl import append_line, keep_lines, read_lines
from batchlab.core.run import CHECKPOINTS, LOCK_FILE, RUN_FILE, STEPS_FILE, Run


class RunWriter:
    """The one writer of a run folder; a context manager that holds the folder's lock.

    path: the folder; made if it is not there. meta: what `run.json` says. With `resume`, the folder must hold
    a run and its `run.json` is kept, updated with `meta`; without, it must not hold one.

    Raises `RunLockedError`, naming its process and host, while another writer holds the folder.
    """

    def __init__(self, path: str | Path, meta: dict[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path)
        holds_run = (self.path / RUN_FILE).is_file()
        if resume and not holds_run:
            raise InputError(f"nothing to resume: {self.path} has no {RUN_FILE}")
        with naming_storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.path / LOCK_FILE)
        if (self.path / RUN_FILE).is_file() and not resume:
            self.close()
            raise InputError(f"{self.path} already holds a run: resume it (--resume), or name another folder")
        try:
            before = loads((self.path / RUN_FILE).read_bytes(), source=str(self.path / RUN_FILE)) if resume else {}
            self.meta = {**before, **meta}
            self.write_meta()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def write_meta(self, **changes: Any) -> None:
        """Replaces `run.json`, with `changes` made to it."""
        self.meta.update(changes)
        write_atomic(self.path / RUN_FILE, dumps(self.meta, indent=1))

    def append_step(self, line: dict[str, Any]) -> None:
        """Adds one line to `steps.jsonl`."""
        append_line(self.path / STEPS_FILE, line)

    def keep_steps(self, step: int) -> None:
        """Cuts `steps.jsonl` down to the lines up to `step`, the last one that a checkpoint knows."""
        path = self.path / STEPS_FILE
        keep_lines(path, sum(1 for line in read_lines(path) if line["step"] <= step))

    def run(self) -> Run:
        """The run as it stands."""
        return Run.open(self.path)

    def close(self) -> None:
        """Gives the folder free."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


_reserved: dict[tuple[int, Path], int] = {}


@contextlib.contextmanager
def reserved(folder: str | Path) -> Iterator[None]:
    """Holds a run folder for a writer that this process is yet to make in it; `RunLockedError` where another has it.

    Leaves nothing behind where no writer took it over.
    """
    path = Path(folder)
    made = [each for each in (path, *path.parents) if not each.exists()]
    with naming_storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    file = path.resolve() / LOCK_FILE
    key, had_lock = (os.getpid(), file), file.exists()
    _reserved[key] = _take_lock(file)
    try:
        yield
    finally:
        if (lock := _reserved.pop(key, -1)) >= 0:
            if not had_lock:
                file.unlink(missing_ok=True)
            os.close(lock)
            with contextlib.suppress(OSError):  # not empty: another process has begun to use it
                for each in made:
                    each.rmdir()


def check_folder(out: str | Path) -> None:
    """`InputError` where no folder can be made of `out`: it, or what it would lie in, is a file."""
    path = Path(out)
    standing = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not standing.is_dir():
        raise InputError(f"out must name a folder, {path} cannot be one: {standing} is a file")


def _take_lock(path: Path) -> int:
    if (held := _reserved.pop((os.getpid(), path.resolve()), -1)) >= 0:
        return held
    with naming_storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise RunLockedError(f"{path.parent} is being written by {holder}") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor
