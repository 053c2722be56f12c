"""`pystdlib`: the sources of the running Python's own standard library, as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from batchlab.core.errors import InputError
from batchlab.core.job import Job, Target
from batchlab.workloads.corpus import read_up_to
from batchlab.workloads.text import language_model

_LEFT_OUT = frozenset({"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages"})
_TABLES = frozenset({"encodings", "pydoc_data"})
MAX_BYTES = 6_000_000


def pystdlib(
    *,
    context: int = 128,
    width: int = 96,
    layers: int = 2,
    heads: int = 3,
    valid_windows: int = 256,
    optimizer: str = "adamw",
    target: Target | None = None,
) -> Job:
    """A byte-level transformer of 283,584 weights learns Python: six megabytes of it; bits per byte.

    Tests, idlelib, installed packages and the tables in encodings and pydoc_data are left out; of the rest, files are
    sampled by the hash of their names up to 6,000,000 bytes, a tenth of them whole files held out. The text is that
    of the running interpreter: another version of Python is another corpus. Arguments as in `batchlab.workloads.text`.
    Forward and backward of 16 windows take about 40 ms on one core.

    >>> job = pystdlib(context=64)
    >>> job.unit, job.units_per_example, len(job.valid)
    ('token', 64, 256)
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents, _ = read_up_to(root, source_files(root), MAX_BYTES)
    if not documents:
        raise InputError(f"this Python came without the sources of its standard library: no .py file in {root}")
    return language_model(
        "pystdlib",
        documents,
        source="the standard library",
        notes=[],
        context=context,
        width=width,
        layers=layers,
        heads=heads,
        valid_share=0.1,
        valid_windows=valid_windows,
        optimizer=optimizer,
        target=target,
    )


def source_files(root: Path) -> list[Path]:
    """The library's own .py files, sorted by name."""
    unwanted = _LEFT_OUT | _TABLES
    return [file for file in sorted(root.rglob("*.py")) if not unwanted & set(file.relative_to(root).parts[:-1])]
