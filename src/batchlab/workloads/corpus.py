"""Documents of bytes: reading them from disk, holding some out, cutting them into windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchlab.core.checks import check_inside
from batchlab.core.errors import InputError
from batchlab.workloads.examples import Batch
from batchlab.workloads.split import name_hash

SEPARATOR = b"\0"
_FILES_TO_SPLIT_BY = 10


class Windows:
    """A map-style data set of windows of context + 1 bytes: the first `context` are the input, the last the targets.

    bytes_: uint8, one document after the other. Windows start every `context` bytes, so that every byte but the
    first is a target once; what is left at the end is no window. at_most: keep so many windows, evenly spaced.
    notes: what the reader of a report should know of how the data came about, a sentence each.

    >>> data = Windows(torch.arange(10, dtype=torch.uint8), context=4)
    >>> len(data), data[1]
    (2, (tensor([4, 5, 6, 7]), tensor([5, 6, 7, 8])))
    """

    def __init__(
        self, bytes_: Tensor, context: int, *, at_most: int | None = None, notes: tuple[str, ...] = ()
    ) -> None:
        whole = max(len(bytes_) - 1, 0) // context
        self.windows = bytes_.unfold(0, context + 1, context) if whole else bytes_.new_zeros(0, context + 1)
        if at_most is not None and whole > at_most:
            self.windows = self.windows[torch.arange(at_most) * whole // at_most]
        self.notes = notes

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.windows[index].long()
        return window[:-1], window[1:]

    def __getitems__(self, indices: list[int]) -> Batch:
        windows = self.windows[indices].long()
        return Batch(windows[:, :-1], windows[:, 1:])


class Corpus(NamedTuple):
    """Bytes to learn from and bytes held out, uint8 each; how, in a sentence."""

    train: Tensor
    valid: Tensor
    split: str


def read_up_to(root: Path, files: Sequence[Path], max_bytes: int) -> tuple[dict[str, bytes], int]:
    """Contents by name relative to `root`, in the order of the names, and how many bytes were left out.

    Beyond `max_bytes` files are taken in the order of their names' hashes, which is a sample of all folders alike;
    the last one is cut.
    """
    names = {file: file.relative_to(root).as_posix() for file in files}
    documents, left, left_out = {}, max_bytes, 0
    for file in sorted(files, key=lambda file: name_hash(names[file])):
        try:
            size = file.stat().st_size
            if left > 0:
                with file.open("rb") as stream:
                    documents[names[file]] = stream.read(left)
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from None
        left_out += max(size - left, 0)
        left = max(left - size, 0)
    return dict(sorted(documents.items())), left_out


def split_documents(documents: Mapping[str, bytes], valid_share: float) -> Corpus:
    """Holds out `valid_share` of the bytes: whole documents where there are ten or more, else every document's tail.

    Documents are held out in the order of their names' hashes, each that still fits into the share. Should that come
    to less than half the share, for some are too large, tails are held out instead.
    """
    check_inside(valid_share=valid_share)
    budget = valid_share * sum(map(len, documents.values()))
    held, room = set(), budget
    for name in sorted(documents, key=name_hash):
        if len(documents[name]) <= room:
            held.add(name)
            room -= len(documents[name])
    if len(documents) >= _FILES_TO_SPLIT_BY and room <= budget / 2:
        train = [text for name, text in documents.items() if name not in held]
        valid = [text for name, text in documents.items() if name in held]
        return Corpus(_joined(train), _joined(valid), f"files held out: {len(valid)} of {len(documents)}")
    cuts = {name: len(text) - round(valid_share * len(text)) for name, text in documents.items()}
    train = [text[: cuts[name]] for name, text in documents.items()]
    valid = [text[cuts[name] :] for name, text in documents.items()]
    return Corpus(_joined(train), _joined(valid), f"the last {100 * valid_share:.3g} % of each file is held out")


def _joined(documents: Sequence[bytes]) -> Tensor:
    """One document after the other, a zero byte between two."""
    return torch.from_numpy(np.frombuffer(SEPARATOR.join(documents), dtype=np.uint8).copy())
