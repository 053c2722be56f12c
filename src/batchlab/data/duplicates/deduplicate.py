"""Deduplication within and across sources by MinHash (Shen et al. 2023, SlimPajama-DC, arXiv 2309.10818).

(a) documents of fewer than 200 characters, punctuation and white space aside, go; (b) of documents whose 13-grams of
lower-case text have a Jaccard similarity of 0.8 or more, one stays. Global: one index over all sources in a fixed
order of priority, the first seen stays. Local: an index for each source. Signatures are R-MinHash of the package rensa.

The paper does not say whether its 13-grams are of characters or words; the released pipeline takes characters, so that
is the default here. That pipeline keeps one document of each connected component of similar pairs; here a document is
compared with kept ones alone, so that every removed one resembles the one it went for. It also finds candidates by 9
bands of 13 slots, a recall of 0.41 at the threshold; here it is 16 of 8, 0.95.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import zip_longest
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import as_count, check_count, check_inside
from batchlab.core.errors import InputError
from batchlab.data.duplicates.duplicates import EXACT, KEPT, NEAR, SHORT, Deduplication, DeduplicationHeader
from batchlab.data.duplicates.near_duplicates import bands_for, near_duplicates
from batchlab.data.duplicates.shingles import NORMALISATION, SHINGLE_HASH, Shingle, shingle_hashes
from batchlab.data.duplicates.signatures import Signed, Signing, rensa, sign_all

Scope = Literal["global", "local"]
Texts = Iterable[str] | Mapping[str, Iterable[str]]
_CHUNK = 1 << 16  # characters signed at a time: about 3 MB of memory, which a processor's cache still holds


def deduplicate(
    texts: Texts,
    *,
    scope: Scope = "global",
    sources: Iterable[str] | None = None,
    priority: Sequence[str] | None = None,
    threshold: float = 0.8,
    shingle: Shingle = "char",
    ngram: int = 13,
    permutations: int = 128,
    bands: int | None = None,
    exact: bool = True,
    min_characters: int = 200,
    verify: bool = False,
    seed: int = 0,
    workers: int = 0,
    progress: Callable[[str, int], object] | None = None,
) -> Deduplication:
    """Which documents to keep, and for each other one why it goes and for which kept one.

    texts: the documents, any iterable, read once and not held; or a mapping from a source's name to its documents.
    sources: the source of each document, as many as texts; without, there is one source, "".
    scope: "global" compares across sources, "local" within each alone. priority: all sources, that whose documents stay
    first; by default as they first come. Within a source the earlier document stays.
    threshold: of Jaccard similarity, in (0, 1). shingle, ngram: what is compared, "char" or "word", and how many
    in a run. permutations: slots of a signature; the similarity's error is at most 0.5/√permutations. bands: of how
    many slots' groups one must agree for two documents to be compared; by default `bands_for`.
    exact: first remove documents whose normalised texts are equal, by hash. min_characters: shorter ones go, counted
    without ASCII punctuation and white space; 0 keeps all.
    verify: decide by the true Jaccard similarity of candidates. Else by the signatures': at 0.8 and 128 slots half the
    pairs of similarity 0.8 go, 0.7 % of those of 0.7.
    workers: processes that sign, 0 for this one; started by "spawn", so that a script needs `if __name__ ==
    "__main__"`. Neither they nor how texts are cut change the result. progress: called with "signed" and the documents
    so far, then with "compared" and their number.

    Memory: 8·permutations + about 60 bytes a document at the peak (1,090 in all with the defaults, of which 30 remain),
    none for texts; with verify 8 more for each distinct shingle, about 8 a character. Needs the extra "dedup".

    Not for duplicates inside documents, for paraphrases, or for finding a test set in training data by overlap of a
    few words: similarity is of whole documents.

    >>> page = "It is a truth universally acknowledged, that a single man in possession of a good fortune must be" * 3
    >>> found = deduplicate({"books": [page, "too short"], "web": [page.upper(), page + " in want of a wife."]})
    >>> found.kept.tolist(), [(each.index, each.kind, each.by) for each in found.removals()]
    ([0], [(1, 'short', None), (2, 'exact', 0), (3, 'near', 0)])
    """
    if scope not in ("global", "local"):
        raise InputError(f'scope must be "global" or "local", got {scope!r}')
    check_inside(threshold=threshold)
    if not isinstance(texts, Iterable):
        raise InputError(f"texts must be an iterable of documents, got {texts!r:.80}")
    permutations, ngram, seed = as_count(permutations=permutations), as_count(ngram=ngram), as_count(0, seed=seed)
    bands = None if bands is None else as_count(bands=bands)
    check_count(0, min_characters=min_characters, workers=workers)
    if seed >= 2**64:
        raise InputError(f"seed must be below 2^64, got {seed}")
    shingle_hashes([], shingle, ngram)  # refuses what it cannot do before anything is read
    algorithm = f"rensa {version('rensa')} RMinHash {rensa().RMinHash.ALGORITHM_VERSION}, shingle hash {SHINGLE_HASH}"
    bands, rows = _bands(bands, threshold, permutations)
    reader = _Reader(texts, sources, priority)
    signed = []
    for part in sign_all(reader.chunks(), Signing(shingle, ngram, permutations, seed, verify), workers):
        signed.append(part)
        if progress is not None:
            progress("signed", sum(map(_documents, signed)))
    header = DeduplicationHeader(
        scope=scope,
        priority=tuple(priority if priority is not None else reader.names),
        threshold=float(threshold),
        shingle=shingle,
        ngram=ngram,
        permutations=permutations,
        bands=bands,
        rows=rows,
        exact=bool(exact),
        min_characters=int(min_characters),
        verify=bool(verify),
        seed=seed,
        normalisation=NORMALISATION,
        signature=algorithm,
    )
    found = _decided(_joined(signed, permutations), np.array(reader.numbers, dtype=np.int32), header)
    if progress is not None:
        progress("compared", len(found))
    return found


def _documents(part: Signed) -> int:
    return len(part.characters)


def _bands(bands: int | None, threshold: float, permutations: int) -> tuple[int, int]:
    if bands is None:
        return bands_for(threshold, permutations)
    check_count(bands=bands)
    if bands > permutations:
        raise InputError(f"bands must be at most the {permutations} permutations, got {bands}")
    return int(bands), permutations // bands


class _Reader:
    """Reads texts once, in chunks; keeps the sources' names, numbered by priority, and each document's number."""

    def __init__(self, texts: Texts, sources: Iterable[str] | None, priority: Sequence[str] | None) -> None:
        self.pairs = _pairs(texts, sources)
        self.priority = priority
        self.names: dict[str, int] = {}
        if priority is not None:
            self.names = {name: at for at, name in enumerate(priority)}
            if isinstance(priority, str) or len(self.names) < len(priority):
                raise InputError(f"priority must be distinct names of sources, got {priority!r}")
        self.numbers = array("i")

    def chunks(self) -> Iterator[list[str]]:
        """Texts of about `_CHUNK` characters together."""
        texts: list[str] = []
        size = 0
        for text, source in self.pairs:
            if not isinstance(text, str):
                raise InputError(f"texts must be str, got {type(text).__name__} at {len(self.numbers)}")
            if not isinstance(source, str):
                raise InputError(f"sources must be str, got {type(source).__name__} at {len(self.numbers)}")
            if source not in self.names and self.priority is not None:
                raise InputError(f"priority must name every source, got {list(self.priority)} without {source!r}")
            self.numbers.append(self.names.setdefault(source, len(self.names)))
            texts.append(text)
            size += len(text) + 64
            if size >= _CHUNK:
                yield texts
                texts, size = [], 0
        if texts:
            yield texts


def _pairs(texts: Texts, sources: Iterable[str] | None) -> Iterator[tuple[str, str]]:
    """Text and source of each document."""
    if isinstance(texts, str):
        raise InputError("texts must be an iterable of documents, got one str")
    if isinstance(texts, Mapping):
        if sources is not None:
            raise InputError("sources must be None where texts is a mapping: its keys name the sources")
        for source, documents in texts.items():
            if isinstance(documents, str):
                raise InputError(f"texts[{source!r}] must be an iterable of documents, got one str")
            for text in documents:
                yield text, source
        return
    if sources is None:
        for text in texts:
            yield text, ""
        return
    missing = object()
    for at, (text, name) in enumerate(zip_longest(texts, sources, fillvalue=missing)):
        if text is missing or name is missing:
            shorter = "texts" if text is missing else "sources"
            raise InputError(f"sources must have one entry for each text: {shorter} end after {at}")
        yield cast(str, text), cast(str, name)


def _joined(parts: list[Signed], permutations: int) -> Signed:
    """One of all; the parts' signatures are let go on the way, as they are most of the memory."""
    n = sum(map(_documents, parts))
    signatures = np.empty((n, permutations), dtype=np.uint32)
    start = 0
    for at, part in enumerate(parts):
        signatures[start : start + _documents(part)] = part.signatures
        start += _documents(part)
        parts[at] = part._replace(signatures=signatures[:0])
    return Signed(
        np.concatenate([np.empty((0, 2), np.uint64), *(part.digests for part in parts)]),
        np.concatenate([np.empty(0, np.int64), *(part.characters for part in parts)]),
        signatures,
        [hashes for part in parts for hashes in part.shingles],
    )


def _decided(signed: Signed, source: NDArray[np.int32], header: DeduplicationHeader) -> Deduplication:
    verdict = np.where(signed.characters < header.min_characters, SHORT, KEPT).astype(np.uint8)
    keeper = np.where(verdict == SHORT, -1, np.arange(len(verdict)))
    similarity = np.where(verdict == SHORT, np.nan, 1.0).astype(np.float32)
    order = np.argsort(source, kind="stable")
    order = order[verdict[order] == KEPT]
    apart = source if header.scope == "local" else np.zeros_like(source)
    if header.exact:
        first = _first_equal(signed.digests, apart, order)
        verdict[order[first != order]] = EXACT
        keeper[order] = first
        order = order[first == order]
    near = near_duplicates(
        signed.signatures,
        order,
        threshold=header.threshold,
        bands=header.bands,
        rows=header.rows,
        apart=apart,
        shingles=signed.shingles if header.verify else None,
    )
    for match in near:
        verdict[match.removed], keeper[match.removed], similarity[match.removed] = NEAR, match.by, match.similarity
    equal = np.flatnonzero(verdict == EXACT)
    moved = equal[verdict[keeper[equal]] == NEAR]  # their twin is gone itself, as near to a third
    verdict[moved], similarity[moved], keeper[moved] = NEAR, similarity[keeper[moved]], keeper[keeper[moved]]
    return Deduplication(header, header.priority, source, verdict, keeper, similarity, signed.characters)


def _first_equal(digests: NDArray[np.uint64], apart: NDArray[np.int32], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each document of the order the first one in it of equal digest, itself maybe."""
    keys = np.column_stack([digests[order], apart[order].astype(np.uint64)])
    _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return order[first[which.reshape(-1)]]
