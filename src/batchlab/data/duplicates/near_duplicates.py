"""Near-duplicates among MinHash signatures: locality-sensitive hashing for candidates, then one pass in order.

A signature of P slots is cut into b bands of r slots; two documents of Jaccard similarity J agree in some band with the
probability 1 - (1 - Jʳ)ᵇ, and are then compared: by the share of slots in which they agree, whose mean is J and whose
standard deviation is √(J(1 - J)/P), or by J itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_count, check_inside
from batchlab.core.errors import InputError

LEAST_RECALL = 0.9  # ours: at 128 slots and 0.8 it makes 16 bands of 8, datasketch's rule 9 of 13 with a recall of 0.41


def candidate_recall(similarity: float, bands: int, rows: int) -> float:
    """1 - (1 - Jʳ)ᵇ: the probability that two documents of Jaccard similarity J are compared at all.

    >>> round(candidate_recall(0.8, 16, 8), 3), round(candidate_recall(0.9, 16, 8), 4)
    (0.947, 0.9999)
    """
    return 1.0 - (1.0 - similarity**rows) ** bands


def bands_for(threshold: float, permutations: int) -> tuple[int, int]:
    """Bands and rows: the longest bands, so the fewest candidates, that still find 0.9 of the pairs at the threshold.

    >>> bands_for(0.8, 128)
    (16, 8)
    """
    check_inside(threshold=threshold)
    check_count(permutations=permutations)
    for rows in range(permutations, 0, -1):
        if candidate_recall(threshold, permutations // rows, rows) >= LEAST_RECALL:
            return permutations // rows, rows
    raise InputError(
        f"threshold {threshold!r} is too low for {permutations} permutations: even bands of one slot find fewer than "
        f"{LEAST_RECALL:g} of the pairs at it"
    )


class Match(NamedTuple):
    """removed: the document. by: the kept one it is a near-duplicate of. similarity: of the two."""

    removed: int
    by: int
    similarity: float


def near_duplicates(
    signatures: NDArray[np.uint32],
    order: Sequence[int] | NDArray[np.int64],
    *,
    threshold: float,
    bands: int,
    rows: int,
    apart: NDArray[np.int32] | None = None,
    shingles: Sequence[NDArray[np.uint64]] | None = None,
) -> list[Match]:
    """Who goes: in the given order each document is compared with the candidates kept before it.

    It is removed if one has a similarity of at least `threshold`, by the most similar of them, of equals the first in
    order. So nothing is removed for its likeness to a document that went itself: no chains, and every removed document
    has its kept one.

    signatures: (documents, slots). order: the documents that take part, the first to keep first. apart: a number for
    each document; those with different ones are never compared. shingles: for each document its sorted distinct
    hashes; if given, similarity is the Jaccard similarity of these, else the share of slots that agree.
    Memory beside its arguments: about 4·rows + 60 bytes a document, 700 for each that shares a band with another. Time
    is linear but where very many documents share a band and are not alike: there it grows with their number's square.
    """
    if bands * rows > signatures.shape[1]:
        raise InputError(f"bands·rows must be at most the {signatures.shape[1]} slots, got {bands} times {rows}")
    order = np.asarray(order, dtype=np.int64)
    buckets = _shared_buckets(signatures, order, bands, rows, apart)
    kept: dict[int, list[int]] = {}
    found = []
    for position, mine in buckets.items():
        document = int(order[position])
        candidates = sorted({place for bucket in mine for place in kept.get(bucket, ())})
        if candidates:
            others = order[candidates]
            likeness = _similarities(document, others, signatures, shingles)
            best = int(likeness.argmax())
            if likeness[best] >= threshold:
                found.append(Match(document, int(others[best]), float(likeness[best])))
                continue
        for bucket in mine:
            kept.setdefault(bucket, []).append(position)
    return found


def _similarities(
    document: int,
    others: NDArray[np.int64],
    signatures: NDArray[np.uint32],
    shingles: Sequence[NDArray[np.uint64]] | None,
) -> NDArray[np.float64]:
    if shingles is None:
        return np.asarray((signatures[others] == signatures[document]).mean(1))
    return np.array([jaccard(shingles[document], shingles[other]) for other in others])


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """|a ∩ b|/|a ∪ b| of sorted distinct hashes; 1 for two empty sets.

    >>> jaccard(np.array([1, 2, 3], dtype=np.uint64), np.array([2, 3, 4], dtype=np.uint64))
    0.5
    """
    common = len(np.intersect1d(a, b, assume_unique=True))
    either = len(a) + len(b) - common
    return common / either if either else 1.0


def _shared_buckets(
    signatures: NDArray[np.uint32],
    order: NDArray[np.int64],
    bands: int,
    rows: int,
    apart: NDArray[np.int32] | None,
) -> dict[int, list[int]]:
    """By position in order: the buckets that hold the document and at least one other; most documents have none."""
    found: dict[int, list[int]] = {}
    first = 0
    for band in range(bands):
        keys = np.empty((len(order), rows + 1), dtype=np.uint32)
        keys[:, :rows] = signatures[order, band * rows : (band + 1) * rows]
        keys[:, rows] = 0 if apart is None else apart[order]
        raw = keys.view(np.dtype((np.void, keys.shape[1] * keys.itemsize)))[:, 0]
        _, bucket, sizes = np.unique(raw, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(sizes[bucket] > 1)
        for position, number in zip(shared.tolist(), (bucket[shared] + first).tolist(), strict=True):
            found.setdefault(position, []).append(number)
        first += len(sizes)
    return dict(sorted(found.items()))
