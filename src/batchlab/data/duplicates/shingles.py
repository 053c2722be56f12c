"""The shingles of a text as 64-bit hashes: what near-duplicate detection compares.

A text is brought to lower case, the 32 punctuation characters of ASCII are taken out, each run of white space becomes
one blank, and blanks at the ends go. Its shingles are all runs of `ngram` units, characters or words; a text of fewer
units is one shingle. This is what the pipeline behind SlimPajama does (Cerebras/modelzoo, `dedup/to_hash.py`, with
characters), but for the short text, which has no shingle there, so that all short texts are alike.

A shingle's hash is Σ h(unit_k)·Bᵏ modulo 2⁶⁴, then mixed; h of a character is its mixed code point, h of a word the
same sum over its characters. Two shingles share a hash by chance once in 2⁶⁴.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.random import mix64

Shingle = Literal["char", "word"]
SHINGLE_HASH = 1  # raised whenever the same text gets other hashes
NORMALISATION = "lower case, ASCII punctuation removed, white space to single blanks, ends stripped"

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_WORD = 1 << 64


def normalised(text: str) -> str:
    """The text that is compared.

    >>> normalised("  Don't\\n PANIC! ")
    'dont panic'
    """
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def shingle_hashes(
    texts: Sequence[str], shingle: Shingle = "char", ngram: int = 13
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hashes of all shingles of normalised texts, one text after another, with repeats.

    Returns hashes (total,) and offsets (texts + 1,): text i has hashes[offsets[i] : offsets[i + 1]], at least one.
    What one text gets does not depend on the others. About 50 bytes of memory a character while it runs.

    >>> hashes, offsets = shingle_hashes(["abcde", "bcd", "a"], ngram=3)
    >>> offsets.tolist(), bool(hashes[1] == hashes[3])
    ([0, 3, 4, 5], True)
    """
    check_count(ngram=ngram)
    if shingle not in ("char", "word"):
        raise InputError(f'shingle must be "char" or "word", got {shingle!r}')
    units, counts = _characters(texts) if shingle == "char" else _words(texts)
    return _windows(units, counts, ngram)


@cache
def _unit_of_code() -> NDArray[np.uint64]:
    """The hash of each code point: 9 MB, of which a text's script stays in the processor's cache."""
    return mix64(np.arange(0x110000, dtype=np.uint64) + np.uint64(_BASE))


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _characters(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    return _unit_of_code()[_codes("".join(texts))], np.array([len(text) for text in texts], dtype=np.int64)


def _words(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Each word's Σ h(character_k)·Bᵏ, from one running sum: the sum up to its end, less that to its start, over Bˢ."""
    whole = " ".join(text for text in texts if text)
    codes = _codes(whole)
    terms = _unit_of_code()[codes] * _powers(_BASE, len(codes))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
    blanks = np.flatnonzero(codes == ord(" "))
    edge = int(whole != "")
    starts = np.concatenate([np.zeros(edge, np.int64), blanks + 1])
    ends = np.concatenate([blanks, np.full(edge, len(codes), np.int64)])
    back = _powers(pow(_BASE, -1, _WORD), len(codes))
    units = mix64((sums[ends] - sums[starts]) * back[starts])
    return units, np.array([text.count(" ") + 1 if text else 0 for text in texts], dtype=np.int64)


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """1, B, B², ... modulo 2⁶⁴."""
    found = np.full(count, base % _WORD, dtype=np.uint64)
    found[:1] = 1
    return np.cumprod(found, dtype=np.uint64)


def _windows(
    units: NDArray[np.uint64], counts: NDArray[np.int64], n: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hash of each run of n units within a text; a text of fewer is filled up with zeros."""
    missing = np.maximum(n - counts, 0)
    if missing.any():
        units = np.insert(units, np.repeat(np.cumsum(counts), missing), np.uint64(0))
    ends = np.cumsum(counts + missing)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts + missing - n + 1)])
    if not len(counts):
        return units, offsets
    inside = np.ones(len(units) - n + 1, dtype=bool)
    inside[(ends[:-1, None] - np.arange(1, n)).ravel()] = False  # runs that reach into the next text
    return mix64(_runs(units, n)[inside]), offsets


def _runs(units: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Σ_k units[i + k]·Bᵏ for k < n at each i, put together from runs of 1, 2, 4, ... units."""
    total = np.zeros(len(units) - n + 1, dtype=np.uint64)
    run, width, done = units, 1, 0
    while done < n:
        if n & width:
            total += run[done : done + len(total)] * np.uint64(pow(_BASE, done, _WORD))
            done += width
        if done < n:
            run = run[: len(run) - width] + run[width:] * np.uint64(pow(_BASE, width, _WORD))
            width *= 2
    return total
