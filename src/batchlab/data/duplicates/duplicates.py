"""What a deduplication found: kept and removed documents, by whom, with every choice that was made on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchlab.core.jsonio import JsonNoun

KINDS = ("kept", "short", "exact", "near")
KEPT, SHORT, EXACT, NEAR = range(4)


@dataclass(frozen=True)
class DeduplicationHeader(JsonNoun):
    """Every choice that the result depends on, beside the texts: two results with unequal headers are not comparable.

    priority: the sources, the first to keep first. bands, rows: of the candidates' search. signature: algorithms and
    their versions. Other names: arguments of `deduplicate`.
    """

    scope: str
    priority: tuple[str, ...]
    threshold: float
    shingle: str
    ngram: int
    permutations: int
    bands: int
    rows: int
    exact: bool
    min_characters: int
    verify: bool
    seed: int
    normalisation: str
    signature: str


@dataclass(frozen=True)
class Removal:
    """One removed document. kind: "short", "exact" or "near"; by, by_source, similarity are None where it is short."""

    index: int
    source: str
    kind: str
    by: int | None
    by_source: str | None
    similarity: float | None


@dataclass(frozen=True, eq=False)
class Deduplication:
    """The result for n documents, by their place in the input.

    header: all choices. sources: their names by priority; source (n,): the number of each document's. verdict (n,): a
    place in `KINDS`. keeper (n,): the kept document that a removed one went for, itself where kept, -1 where too short.
    similarity (n,): to the keeper: 1 for itself and for equals, NaN where too short. characters (n,): without
    punctuation and white space.
    """

    header: DeduplicationHeader
    sources: tuple[str, ...]
    source: NDArray[np.int32]
    verdict: NDArray[np.uint8]
    keeper: NDArray[np.int64]
    similarity: NDArray[np.float32]
    characters: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.verdict)

    @property
    def kept(self) -> NDArray[np.int64]:
        """The documents to keep, in the order of the input."""
        return np.flatnonzero(self.verdict == KEPT)

    @property
    def groups(self) -> dict[int, list[int]]:
        """For each kept document that others went for: these, in the order of the input."""
        found: dict[int, list[int]] = {}
        for document in np.flatnonzero(self.verdict >= EXACT).tolist():
            found.setdefault(int(self.keeper[document]), []).append(document)
        return dict(sorted(found.items()))

    def removals(self) -> Iterator[Removal]:
        """Each removed document, in the order of the input."""
        for index in np.flatnonzero(self.verdict != KEPT).tolist():
            kind, source = int(self.verdict[index]), self.sources[self.source[index]]
            if kind == SHORT:
                yield Removal(index, source, KINDS[kind], None, None, None)
            else:
                by = int(self.keeper[index])
                by_source = self.sources[self.source[by]]
                yield Removal(index, source, KINDS[kind], by, by_source, float(self.similarity[index]))

    def counts(self) -> dict[str, dict[str, int]]:
        """By source: documents, kept, short, removed within (for a document of the same source) and across sources."""
        gone = self.verdict >= EXACT
        own = np.where(gone, self.source[self.keeper] == self.source, False)
        masks = {
            "documents": np.ones(len(self), dtype=bool),
            "kept": self.verdict == KEPT,
            "short": self.verdict == SHORT,
            "within": gone & own,
            "across": gone & ~own,
        }
        tallies = {name: np.bincount(self.source[mask], minlength=len(self.sources)) for name, mask in masks.items()}
        return {
            source: {name: int(each[at]) for name, each in tallies.items()} for at, source in enumerate(self.sources)
        }
