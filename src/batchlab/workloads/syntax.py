"""`syntax`: is a byte of Python code, of a string, or of a comment? Told from the bytes before it, by an LSTM."""

from __future__ import annotations

import io
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchlab.core.errors import InputError
from batchlab.core.job import Job, Target
from batchlab.workloads.corpus import read_up_to
from batchlab.workloads.examples import Examples, collate
from batchlab.workloads.models import LstmClassifier
from batchlab.workloads.objectives import accuracy, cross_entropy
from batchlab.workloads.pystdlib import source_files
from batchlab.workloads.split import hold_out, name_hash

CODE, STRING, COMMENT = 0, 1, 2
MAX_BYTES = 1_500_000
TRAIN, VALID = 12_000, 2_000

Labels = NDArray[np.uint8]


def syntax(*, context: int = 32, hidden: int = 64, optimizer: str = "adamw", target: Target | None = None) -> Job:
    """12,000 training and 2,000 validation windows of `context` bytes; an LSTM of 33,475 weights; accuracy.

    The class of a window is that of its last byte, by Python's own tokenizer: code (0), string (1) or comment (2),
    each a third of the windows. The text is a sample of the running interpreter's standard library, as in `pystdlib`;
    a tenth of the files is held out. Forward and backward of a batch of 64 take about 10 ms on one core.

    >>> job = syntax(context=16)
    >>> len(job.train), len(job.valid), tuple(job.train[0][0].shape)
    (12000, 2000, (16,))
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents, _ = read_up_to(root, source_files(root), MAX_BYTES)
    known = {name: (text, labels) for name, text in documents.items() if (labels := label_bytes(text)) is not None}
    train, valid = hold_out(list(known), 0.1) if known else (np.array([]), np.array([]))
    parts = list(known.values())
    return Job(
        "syntax",
        lambda: LstmClassifier(256, 3, hidden=hidden),
        cross_entropy,
        train=_windows([parts[i] for i in train], context, TRAIN, "train"),
        valid=_windows([parts[i] for i in valid], context, VALID, "valid"),
        metric=accuracy,
        collate=collate,
        optimizer=optimizer,
        target=target,
    )


def label_bytes(source: bytes) -> Labels | None:
    """The class of each byte of a file; None where it is not ASCII or no Python of this interpreter.

    >>> label_bytes(b"x = 'a'  # b").tolist()
    [0, 0, 0, 0, 1, 1, 1, 0, 0, 2, 2, 2]
    """
    if not source.isascii():
        return None
    labels = np.zeros(len(source), dtype=np.uint8)
    starts = np.cumsum([0] + [len(line) for line in source.splitlines(keepends=True)])
    try:
        for token in tokenize.tokenize(io.BytesIO(source).readline):
            name = tokenize.tok_name[token.type]
            kind = COMMENT if name == "COMMENT" else STRING if name.endswith("STRING") or "STRING_" in name else CODE
            if kind != CODE:
                (first, column), (last, end) = token.start, token.end
                labels[starts[first - 1] + column : starts[last - 1] + end] = kind
    except (tokenize.TokenError, SyntaxError):
        return None
    return labels


def _windows(files: list[tuple[bytes, Labels]], context: int, count: int, part: str) -> Examples:
    """`count` windows, the same number of each class, drawn without replacement by a generator of their own."""
    text = torch.from_numpy(np.frombuffer(b"".join(file for file, _ in files), dtype=np.uint8).copy())
    labels = np.concatenate([labels for _, labels in files]) if files else np.zeros(0, dtype=np.uint8)
    drawn = np.random.default_rng(name_hash(part))
    ends: list[NDArray[np.int64]] = []
    for kind in (CODE, STRING, COMMENT):
        places = np.flatnonzero(labels[context:] == kind) + context
        wanted = count // 3 + (kind < count % 3)
        if len(places) < wanted:
            raise InputError(f"this Python came without enough of its standard library's sources for {wanted} windows")
        ends.append(drawn.choice(places, wanted, replace=False))
    last = torch.from_numpy(drawn.permutation(np.concatenate(ends)))
    windows: Tensor = text[last[:, None] + torch.arange(1 - context, 1)]
    return Examples(windows.long(), torch.from_numpy(labels[last.numpy()].astype(np.int64)))
