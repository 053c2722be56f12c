"""Documents of tokens, one after the other in one array: decomposition and packing cut them by offsets, not by copy."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from batchlab.core.checks import is_whole
from batchlab.core.errors import InputError


class Documents:
    """Tokens of all documents in a row, and where each begins.

    tokens: of any integer dtype, shape (tokens,): a tensor, an array or a `numpy.memmap`; it is not copied. lengths:
    tokens of each document; together they are all of `tokens`. An end-of-text token, where there is one, counts as the
    document's last: `Documents.of` appends it.

    >>> documents = Documents.of([[5, 6, 7], [8]], end=0)
    >>> documents.tokens.tolist(), documents.lengths.tolist(), documents.rows([1, 4], 2).tolist()
    ([5, 6, 7, 0, 8, 0], [4, 2], [[6, 7], [8, 0]])
    """

    def __init__(self, tokens: Tensor | NDArray[Any], lengths: ArrayLike) -> None:
        self.lengths = as_lengths(lengths)
        self.offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        if not isinstance(tokens, (Tensor, np.ndarray)):
            raise InputError(f"tokens must be a tensor or an array, got {type(tokens).__name__}: see Documents.of")
        if tokens.ndim != 1 or len(tokens) != self.offsets[-1]:
            raise InputError(
                f"tokens must be of one dimension and {self.offsets[-1]} long, the sum of lengths, "
                f"got shape {tuple(tokens.shape)}"
            )
        if not _are_integers(tokens):
            raise InputError(f"tokens must be integers, got {tokens.dtype}")
        self.tokens = tokens

    @classmethod
    def of(cls, documents: Sequence[ArrayLike], *, end: int | None = None) -> Documents:
        """The documents copied into one array of int64. end: the token appended to each."""
        if end is not None and not is_whole(end):
            raise InputError(f"end must be an integer, got {end!r}")
        tail = np.array([] if end is None else [operator.index(end)], dtype=np.int64)
        parts = [np.concatenate([_tokens(at, document), tail]) for at, document in enumerate(documents)]
        joined = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        return cls(torch.from_numpy(joined), [len(part) for part in parts])

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, starts: ArrayLike, length: int) -> Tensor:
        """`length` tokens from each of the places in `tokens` on: int64, shape (places, length)."""
        return self.at(np.asarray(starts, dtype=np.int64)[:, None] + np.arange(length))

    def at(self, places: NDArray[np.int64]) -> Tensor:
        """The tokens at these places in `tokens`, as int64."""
        if isinstance(self.tokens, Tensor):
            return self.tokens[torch.from_numpy(places)].long()
        return torch.from_numpy(np.asarray(self.tokens[places]).astype(np.int64))


def _tokens(at: int, document: ArrayLike) -> NDArray[np.int64]:
    try:
        array = np.asarray(document)
    except ValueError:
        raise InputError(f"documents must be rows of integers, got rows of unequal length at {at}") from None
    if array.ndim != 1:
        raise InputError(f"documents must be rows of integers, got shape {array.shape} at {at}")
    if array.size and not _are_integers(array):
        raise InputError(f"documents must be of integers, got {array.dtype} at {at}")
    if array.dtype.kind == "u" and array.size and int(array.max()) >= 2**63:
        raise InputError(f"documents must be of integers below 2^63, got {array.max()} at {at}")
    return array.astype(np.int64)


def _are_integers(tokens: Tensor | NDArray[Any]) -> bool:
    if isinstance(tokens, Tensor):
        return not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool)
    return tokens.dtype.kind in "iu"


def check_within(documents: Documents, document: NDArray[np.int64], end: NDArray[np.int64], done: str) -> None:
    """Refuses documents that parts, of which document and up to where in it, are not of. done: what made the parts."""
    if not len(document):
        return
    if document.max() >= len(documents):
        raise InputError(f"documents must be those that were {done}, got {len(documents)} of them")
    if len(wrong := np.flatnonzero(end > documents.lengths[document])):
        at = int(document[wrong[0]])
        raise InputError(
            f"documents must be those that were {done}: document {at} had {int(end[wrong[0]])} tokens at least, got "
            f"one of {int(documents.lengths[at])}"
        )


def as_lengths(lengths: ArrayLike) -> NDArray[np.int64]:
    """Document lengths as int64, shape (documents,); refused where they are none.

    >>> as_lengths([3, -1])
    Traceback (most recent call last):
    batchlab.core.errors.InputError: lengths must be integers of at least 0, got -1 at place 1
    """
    try:
        array = np.asarray(lengths)
    except ValueError:
        raise InputError("lengths must have one dimension, got rows of unequal length") from None
    if array.ndim != 1:
        raise InputError(f"lengths must have one dimension, got shape {array.shape}")
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"lengths must be integers of at least 0, got {array.dtype}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**52:
        at = int(array.argmin()) if array.min() < 0 else int(array.argmax())
        right = "of at least 0" if array.min() < 0 else "below 2^52"
        raise InputError(f"lengths must be integers {right}, got {array[at]} at place {at}")
    return array.astype(np.int64)
