"""R-MinHash signatures of texts, in this process or in several, by the package rensa (the extra "dedup")."""

from __future__ import annotations

import hashlib
import importlib
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchlab.core.errors import BatchlabError
from batchlab.data.duplicates.shingles import Shingle, normalised, shingle_hashes


class Signing(NamedTuple):
    """How texts are signed. permutations: slots of a signature. keep_shingles: whether their hashes are wanted too."""

    shingle: Shingle
    ngram: int
    permutations: int
    seed: int
    keep_shingles: bool


class Signed(NamedTuple):
    """Of n documents: digests (n, 2), 128 bits of the normalised text's hash; characters (n,), blanks not counted;
    signatures (n, permutations); shingles: sorted distinct hashes of each, where they are kept.
    """

    digests: NDArray[np.uint64]
    characters: NDArray[np.int64]
    signatures: NDArray[np.uint32]
    shingles: list[NDArray[np.uint64]]


def rensa() -> Any:
    """The package; `BatchlabError` where it is not installed."""
    try:
        return importlib.import_module("rensa")
    except ImportError as error:
        raise BatchlabError("deduplicate needs rensa: pip install 'batchlab[dedup]'") from error


def sign(texts: list[str], how: Signing) -> Signed:
    """Each text's signature; a pure function of that text."""
    plain = [normalised(text) for text in texts]
    characters = np.array([len(text) - text.count(" ") for text in plain], dtype=np.int64)
    digests = b"".join(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in plain
    )
    hashes, offsets = shingle_hashes(plain, how.shingle, how.ngram)
    matrix = rensa().RMinHash.digest_matrix_from_flat_token_hashes(
        hashes, offsets.astype(np.uint64), how.permutations, how.seed
    )
    rows = np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(texts), how.permutations)
    spans = itertools.pairwise(offsets) if how.keep_shingles else ()
    kept = [np.unique(hashes[start:end]) for start, end in spans]
    return Signed(np.frombuffer(digests, dtype="<u8").reshape(-1, 2), characters, rows, kept)


def sign_all(chunks: Iterator[list[str]], how: Signing, workers: int) -> Iterator[Signed]:
    """The chunks' signatures, in order; at most two chunks a worker are held. workers: 0 is this process."""
    if not workers:
        yield from (sign(texts, how) for texts in chunks)
        return
    waiting: deque[Future[Signed]] = deque()
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn")
    ) as pool:  # threads of rensa do not survive a fork
        for texts in chunks:
            waiting.append(pool.submit(sign, texts, how))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
