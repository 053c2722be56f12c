"""What a mixture of sources is made of, and RRGS (Shen et al. 2023, SlimPajama-DC, arXiv 2309.10818)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import cast

import numpy as np

from batchlab.core.checks import check_inside, check_not_negative, check_positive, check_share, is_count
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.data.duplicates.duplicates import KEPT, Deduplication


@dataclass(frozen=True)
class SourceShare(JsonNoun):
    """One source of a mixture. documents, tokens: what there is of it, after deduplication if one was given.

    share_of_documents, share_of_tokens: of all sources' together, in [0, 1]. weight: its share of the tokens that are
    trained on. epochs: how often each of its tokens is seen on average, None without a budget; above 1 it wraps.
    within, across: documents that went for one of the same source, and for one of another. short: that were too short.
    """

    name: str
    documents: int
    tokens: int
    share_of_documents: float
    share_of_tokens: float
    weight: float
    epochs: float | None
    within: int = 0
    across: int = 0
    short: int = 0


def mixture_report(
    sources: Iterable[str],
    tokens: Iterable[int],
    *,
    weights: Mapping[str, float] | None = None,
    budget: float | None = None,
    deduplication: Deduplication | None = None,
) -> tuple[SourceShare, ...]:
    """Each source's part, in the order in which sources first come; both iterables are read once.

    sources, tokens: of each document, its source and its length in tokens. weights: of each source in training, by
    tokens, normalised here; by default as the tokens are. budget: tokens of the run, for epochs. deduplication: of the
    same documents in the same order, whatever it was told of their sources: then only kept ones count.

    >>> of, lengths = ["web", "web", "books"], [300, 300, 200]
    >>> for each in mixture_report(of, lengths, weights={"web": 1, "books": 1}, budget=600):
    ...     print(each.name, each.tokens, each.share_of_tokens, each.weight, each.epochs)
    web 600 0.75 0.5 0.5
    books 200 0.25 0.5 1.5
    """
    for what, given in (("sources", sources), ("tokens", tokens)):
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise InputError(f"{what} must hold an entry for each document, got {given!r:.80}")
    documents: dict[str, int] = {}
    lengths: dict[str, int] = {}
    names: list[str] = []
    kept = None if deduplication is None else (deduplication.verdict == KEPT).tolist()
    at, missing = -1, object()
    for at, (source, length) in enumerate(zip_longest(sources, tokens, fillvalue=missing)):
        if source is missing or length is missing:
            shorter = "sources" if source is missing else "tokens"
            raise InputError(f"sources and tokens must have one entry for each document: {shorter} end after {at}")
        if not is_count(length, 0):
            raise InputError(f"tokens must be integers of at least 0, got {length!r} at {at}")
        if not isinstance(source, str):
            raise InputError(f"sources must be texts, got {source!r} at {at}")
        names += [source] if deduplication is not None else []
        name, counted = source, kept is None or (at < len(kept) and kept[at])
        documents[name] = documents.get(name, 0) + counted
        lengths[name] = lengths.get(name, 0) + (int(cast(int, length)) if counted else 0)
    if deduplication is not None and at + 1 != len(deduplication):
        raise InputError(f"deduplication must be of the {at + 1} documents given, got one of {len(deduplication)}")
    removed = {} if deduplication is None else _of_sources(deduplication, names).counts()
    return _report(documents, lengths, weights, budget, removed)


def _of_sources(deduplication: Deduplication, names: list[str]) -> Deduplication:
    """The same with these sources of its documents, whatever it was told of them."""
    sources = tuple(dict.fromkeys(names))
    number = {name: at for at, name in enumerate(sources)}
    source = np.array([number[name] for name in names], dtype=np.int32)
    return replace(deduplication, sources=sources, source=source)


def _report(
    documents: dict[str, int],
    lengths: dict[str, int],
    weights: Mapping[str, float] | None,
    budget: float | None,
    removed: Mapping[str, Mapping[str, int]],
) -> tuple[SourceShare, ...]:
    all_documents, all_tokens = sum(documents.values()), sum(lengths.values())
    if all_tokens == 0:
        raise InputError("tokens must not all be 0, and some documents must be kept")
    wanted = _weights(weights, lengths)
    if budget is not None:
        check_positive(budget=budget)
    for name, weight in wanted.items():
        if weight and not lengths[name]:
            raise InputError(f"weights[{name!r}] must be 0, for the source has no token left, got {weight!r}")
    return tuple(
        SourceShare(
            name=name,
            documents=documents[name],
            tokens=lengths[name],
            share_of_documents=documents[name] / all_documents,
            share_of_tokens=lengths[name] / all_tokens,
            weight=wanted[name],
            epochs=None if budget is None else wanted[name] * budget / lengths[name] if lengths[name] else 0.0,
            **{kind: removed.get(name, {}).get(kind, 0) for kind in ("within", "across", "short")},
        )
        for name in documents
    )


def _weights(weights: Mapping[str, float] | None, lengths: Mapping[str, int]) -> dict[str, float]:
    given: Mapping[str, float] = lengths if weights is None else weights
    if not isinstance(given, Mapping) or given.keys() != lengths.keys():
        found = sorted(given) if isinstance(given, Mapping) else repr(given)
        raise InputError(f"weights must name the sources {sorted(lengths)}, got {found}")
    for name, weight in given.items():
        check_not_negative(**{f"weights[{name!r}]": weight})
    total = math.fsum(given.values())
    check_positive(**{"sum of weights": total})
    return {name: given[name] / total for name in lengths}


def rrgs(scores: Sequence[float], chance: float = 0.25) -> float:
    """Risk of random guessing, 1 - mean|s_i - c| over sub-tasks: 1 where every score is at chance, lower is better.

    scores: the accuracy on each sub-task, in [0, 1]. chance: c, 0.25 for four choices (the paper's). It is no accuracy:
    a model whose errors lie evenly about chance, or that is always far below it, scores low as well.

    >>> rrgs([0.25, 0.25]), rrgs([0.25, 0.75]), rrgs([1.0, 1.0])
    (1.0, 0.75, 0.25)
    """
    check_inside(chance=chance)
    if not len(scores):
        raise InputError("scores must hold one number at least, got none")
    check_share(**{f"scores[{at}]": score for at, score in enumerate(scores)})
    return 1.0 - math.fsum(abs(score - chance) for score in scores) / len(scores)
