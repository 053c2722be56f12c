"""Binary decomposition: pieces of 2^k + 1 tokens, each of one document (Pouransari et al. 2024, arXiv 2405.13226).

From the front of a document of n tokens, again and again:

    k = ⌊log₂(n - 1)⌋;  k < i_min: stop, the rest is dropped;  emit 2^k + 1 tokens;  n ← n - (2^k + 1)

and where k > i_max, k is drawn from i_max .. i_min instead with P(j) ∝ 2^(i_max - j), so that in the mean every
length gets as many tokens; or is i_max, with `randomize=False`. A piece's inputs are its first 2^k tokens, its targets
its last 2^k. `allenai/OLMo-core` cuts pieces of 2^k tokens and gives one target a piece away. Without draws the pieces
are those of `get_binary` in `apple/ml-dataset-decomposition`, on 1,500 random lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset

from batchlab.core.checks import as_count
from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed, mix64
from batchlab.data.documents.documents import Documents, as_lengths, check_within

Ints = NDArray[np.int64]
Cut = tuple[Ints, Ints, Ints]  # document, start and k of some pieces, by document and then by place
_DRAWS = 2**18  # at a time, so that documents of any length fit into memory


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents, bucket after bucket, within a bucket by document and place: offsets, no tokens.

    i_min, i_max: log₂ of the shortest and the longest input. document, start: of each piece, which document it is of
    and its first token there, shape (pieces,). first: where each bucket begins among the pieces, and their end, shape
    (buckets + 1,). dropped_tokens: of the documents' tails, together; each is of at most 2^i_min tokens.
    """

    i_min: int
    i_max: int
    document: Ints
    start: Ints
    first: Ints
    dropped_tokens: int

    def __len__(self) -> int:
        return len(self.document)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Inputs a piece, of each bucket, ascending: 2^i."""
        return tuple(2**i for i in range(self.i_min, self.i_max + 1))

    @property
    def counts(self) -> tuple[int, ...]:
        """Pieces in each bucket."""
        return tuple(np.diff(self.first).tolist())

    def bucket_of(self, index: int) -> int:
        """The bucket of a piece, from 0 for the shortest."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in [0, {len(self)}), got {index}")
        return int(np.searchsorted(self.first, index, side="right")) - 1


def decompose(lengths: ArrayLike, i_min: int = 8, i_max: int = 13, *, randomize: bool = True, seed: int = 0) -> Pieces:
    """Cuts documents of these lengths, in tokens, the end-of-text token of each included.

    i_min, i_max: log₂ of the shortest and the longest input; 8 and 13 are the paper's, for 256 to 8192 tokens.
    randomize: draw the lengths that a document of more than 2^(i_max + 1) tokens is cut into. A document's pieces
    depend on the seed, its place among the documents and its length alone.

    Not for documents that are mostly shorter than 2^i_min: they are dropped, `dropped_tokens` says how much. Two
    million documents take 0.4 s on one core. Raises `InputError` where i_min >= i_max, and for lengths that are none.

    >>> pieces = decompose([12, 5, 3], i_min=1, i_max=3)
    >>> [(int(d), int(s)) for d, s in zip(pieces.document, pieces.start)], pieces.lengths, pieces.counts
    ([(0, 9), (2, 0), (1, 0), (0, 0)], (2, 4, 8), (2, 1, 1))
    """
    i_min, i_max, seed = as_count(0, i_min=i_min), as_count(0, i_max=i_max), as_count(0, seed=seed)
    if not i_min < i_max <= 40:
        raise InputError(f"i_min and i_max must satisfy i_min < i_max <= 40, got i_min={i_min}, i_max={i_max}")
    n = as_lengths(lengths)
    found, taken = _drawn(n, i_min, i_max, derive_seed(seed, "decompose")) if randomize else _repeated(n, i_max)
    for k in range(i_max, i_min - 1, -1):
        left = np.flatnonzero(n - taken > 2**k)
        found.append((left, taken[left], np.full(len(left), k, dtype=np.int64)))
        taken[left] += 2**k + 1
    document, start, exponent = (np.concatenate(column) for column in zip(*found, strict=True))
    buckets = [np.flatnonzero(exponent == k) for k in range(i_min, i_max + 1)]
    order = np.concatenate([each[np.argsort(document[each], kind="stable")] for each in buckets])
    first = np.cumsum([0] + [len(each) for each in buckets], dtype=np.int64)
    return Pieces(i_min, i_max, document[order], start[order], first, int((n - taken).sum()))


def _repeated(n: Ints, i_max: int) -> tuple[list[Cut], Ints]:
    """The pieces of 2^i_max + 1 tokens before the last of them, and how many tokens they take of each document."""
    size = 2**i_max + 1
    many = np.maximum(n // size - 1, 0)
    document = np.repeat(np.arange(len(n)), many)
    number = np.arange(len(document)) - np.repeat(np.cumsum(many) - many, many)
    return [(document, number * size, np.full(len(document), i_max, dtype=np.int64))], many * size


def _drawn(n: Ints, i_min: int, i_max: int, seed: int) -> tuple[list[Cut], Ints]:
    """The pieces cut while n - 1 >= 2^(i_max + 1), and how many tokens they take."""
    found: list[Cut] = []
    taken, done = np.zeros_like(n), 0
    active = np.flatnonzero(n > 2 ** (i_max + 1))
    while len(active):
        most = int((n[active] - taken[active]).max()) // (2**i_min + 1)
        width = max(1, min(most, _DRAWS // len(active)))
        k = drawn_exponents(active[:, None], done + np.arange(width), i_min, i_max, seed)
        ends = taken[active, None] + np.cumsum(2**k + 1, axis=1)
        starts = ends - (2**k + 1)
        cut = n[active, None] - starts > 2 ** (i_max + 1)
        many = cut.sum(1)
        found.append((np.repeat(active, many), starts[cut], k[cut]))
        taken[active] = ends[np.arange(len(active)), many - 1]
        active, done = active[n[active] - taken[active] > 2 ** (i_max + 1)], done + width
    return found, taken


def drawn_exponents(document: Ints, number: Ints, i_min: int, i_max: int, seed: int) -> Ints:
    """k of the piece of this number of a document: P(j) ∝ 2^(i_max - j) on i_min .. i_max, by a hash of all arguments.

    ⌊log₂ u⌋ of u uniform in 1 .. 2^m - 1 is t with P ∝ 2^t, and k = i_max - t.
    """
    key = mix64(document.astype(np.uint64) + np.uint64(seed))
    u = 1 + mix64(number.astype(np.uint64) + key) % np.uint64(2 ** (i_max - i_min + 1) - 1)
    return i_max + 1 - np.frexp(u.astype(np.float64))[1].astype(np.int64)


class PieceDataset(Dataset[tuple[Tensor, Tensor]]):
    """The pieces as examples: (inputs, targets), int64, 2^k each, positions from 0, no token of another document.

    Those of one bucket are of one length, so that torch's own `default_collate` stacks them.

    >>> documents = Documents.of([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    >>> PieceDataset(documents, decompose(documents.lengths, 1, 2))[0]
    (tensor([1, 2]), tensor([2, 3]))
    """

    def __init__(self, documents: Documents, pieces: Pieces) -> None:
        tokens = np.repeat(np.asarray(pieces.lengths) + 1, pieces.counts)
        check_within(documents, pieces.document, pieces.start + tokens, "cut")
        self.documents, self.pieces = documents, pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """As `DataLoader` asks for a batch; all of one bucket."""
        if not indices:
            return []
        at = np.asarray(indices, dtype=np.int64)
        lengths = {self.pieces.lengths[self.pieces.bucket_of(int(index))] for index in {at.min(), at.max()}}
        if len(lengths) > 1:
            raise InputError(f"indices must be of pieces of one length, got lengths {sorted(lengths)}")
        starts = self.documents.offsets[self.pieces.document[at]] + self.pieces.start[at]
        rows = self.documents.rows(starts, lengths.pop() + 1)
        return [(row[:-1], row[1:]) for row in rows]
