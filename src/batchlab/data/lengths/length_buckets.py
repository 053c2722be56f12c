"""Buckets of examples by length, in one dimension or by input and output: bins of equal mass, and which bin is whose.

Żelasko et al. 2024 (EMMeTT, arXiv 2409.13523); one dimension as lhotse's `estimate_duration_buckets`, two as NeMo's
`estimate_duration_bins_2d.py` but for its slips: there the sub-bins of every bucket are cut from all longer examples
too, the last example is left out, a bucket of one constant ratio drops everything, bins come twice, and rounding to
three digits can put the last edge below the longest example.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError

REJECTED = -1


def estimate_bins(lengths: ArrayLike, buckets: int) -> list[float]:
    """At most `buckets` - 1 inner edges, so that the bins hold equal total length. lengths: shape (n,), any unit.

    Walks through the lengths in ascending order and begins a bin at the length that finds more than Σ/buckets in the
    bin. Each bin but the last so holds more than that by less than its longest example; the last has what is left, and
    there may be fewer. Equal to `lhotse.dataset.sampling.dynamic_bucketing.estimate_duration_buckets`, to the last bit.

    >>> estimate_bins(range(1, 101), 4)
    [51.0, 72.0, 88.0]
    """
    ascending = np.sort(checked_lengths(lengths, dimensions=1))
    check_count(2, buckets=buckets)
    if buckets > len(ascending):
        raise InputError(f"buckets must be at most the number of lengths, {len(ascending)}, got {buckets}")
    return [float(ascending[at]) for at in _cuts(ascending, buckets)]


class Bins(NamedTuple):
    """Two-dimensional bins in ascending order, and for each the greatest output/input that was no outlier."""

    edges: list[tuple[float, float]]
    max_ratio: list[float]


def estimate_bins_2d(lengths: ArrayLike, buckets: int = 30, sub_buckets: int = 2, outlier: float = 4.0) -> Bins:
    """Bins (greatest input, greatest output): by input as `estimate_bins`, and within each by output.

    lengths: shape (n, 2), input and output. outlier: examples whose output/input lies more than so many standard
    deviations above the mean of their input bin are left out; only the upper tail is. Each input bin's outputs are then
    cut into `sub_buckets` bins of equal total; where edges coincide, in skewed data, the merged bin gets as many as its
    parts would have. Defaults of NeMo.

    >>> estimate_bins_2d([(1, 1), (1, 1), (1, 2), (3, 1), (4, 3), (5, 9)], buckets=2).edges
    [(5.0, 3.0), (5.0, 9.0)]
    """
    pairs = checked_lengths(lengths, dimensions=2)
    check_count(sub_buckets=sub_buckets)
    check_positive(outlier=outlier)
    if not (pairs[:, 0] > 0).all():
        raise InputError("lengths must have inputs > 0, for the ratio of output to input is bounded in each bin")
    tops_of_inputs = [*estimate_bins(pairs[:, 0], buckets), float(pairs[:, 0].max())]
    edges, ratios = Bins([], [])
    below, parts = 0.0, 0
    for edge, following in itertools.pairwise([*tops_of_inputs, math.inf]):
        parts += sub_buckets
        if edge == following:
            continue
        within = pairs[(pairs[:, 0] > below) & (pairs[:, 0] <= edge)]
        within, ratio = _without_outliers(within, outlier)
        outputs = np.sort(within[:, 1])
        tops = [*(float(outputs[at]) for at in _cuts(outputs, parts)), float(outputs[-1])]
        for top in dict.fromkeys(tops):
            edges.append((edge, top))
            ratios.append(ratio)
        below, parts = edge, 0
    return Bins(edges, ratios)


def _cuts(ascending: NDArray[np.float64], bins: int) -> list[int]:
    """Where each bin but the first begins."""
    mass = ascending.sum() / bins
    total = np.cumsum(ascending)
    cuts: list[int] = []
    begin, n = 0, len(ascending)
    while True:
        before = total[begin - 1] if begin else 0.0
        end = int(np.searchsorted(total, before + mass, side="right")) + 64  # rounding may put it a few off
        running = np.cumsum(ascending[begin:end])  # from the bin's own start, as the sum that lhotse keeps
        if end < n and running[-1] <= mass:
            running = np.cumsum(ascending[begin:])
        begin += int(np.searchsorted(running, mass, side="right")) + 1
        if begin >= n:
            return cuts
        cuts.append(begin)


def _without_outliers(pairs: NDArray[np.float64], outlier: float) -> tuple[NDArray[np.float64], float]:
    ratios = pairs[:, 1] / pairs[:, 0]
    kept = ratios - ratios.mean() <= outlier * ratios.std()  # a constant ratio: none is one, but for rounding
    kept |= ratios.std() <= 1e-12 * abs(ratios.mean())
    return pairs[kept], float(ratios[kept].max())


@dataclass(frozen=True)
class LengthBuckets:
    """Buckets, and the one that each example belongs to.

    edges: ascending; the greatest length in each bucket, or (greatest input, greatest output), as in a
    `measure.MicroBatchTable`. max_ratio: of each bucket, the most output/input it takes; for two dimensions, strict.
    strict: the first input edge that holds the input, and among its buckets the first that holds the output, else the
    example is rejected. Lenient takes the first bucket that holds both: less is rejected, more is padding, and
    `max_ratio` is not asked. In one dimension the two are the same, and what exceeds the last edge is rejected.

    >>> buckets = LengthBuckets([(10, 5), (10, 10), (20, 12), (20, 18)])
    >>> buckets.choose([(8, 5), (10, 10), (8, 11), (21, 1)]).tolist()
    [0, 1, -1, -1]
    >>> LengthBuckets(buckets.edges, strict=False).choose([(8, 11)]).tolist()
    [2]
    """

    edges: Sequence[float] | Sequence[tuple[float, float]]
    max_ratio: Sequence[float] | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        table = checked_lengths(self.edges, name="edges")
        if table.ndim == 1:
            edges: tuple[Any, ...] = tuple(table.tolist())
        else:
            edges = tuple((float(a), float(b)) for a, b in table)
        if any(a >= b for a, b in itertools.pairwise(edges)):
            raise InputError(f"edges must ascend, got {list(self.edges)!r}")
        object.__setattr__(self, "edges", edges)
        if self.max_ratio is not None:
            if table.ndim == 1 or not self.strict:
                raise InputError("max_ratio is for strict buckets of two dimensions")
            ratios = tuple(float(ratio) for ratio in self.max_ratio)
            if len(ratios) != len(edges) or not all(ratio >= 0 for ratio in ratios):
                raise InputError(f"max_ratio must be a number >= 0 for each of {len(edges)} buckets, got {ratios!r}")
            object.__setattr__(self, "max_ratio", ratios)

    @classmethod
    def fitted(
        cls, lengths: ArrayLike, buckets: int = 30, sub_buckets: int = 2, *, strict: bool = True
    ) -> LengthBuckets:
        """Of equal mass on the lengths, shape (n,) or (n, 2); ratios bounded where these are pairs and strict."""
        array = checked_lengths(lengths)
        if array.ndim == 1:
            edges = [*estimate_bins(array, buckets), float(array.max())]
            return cls(sorted(set(edges)), strict=strict)
        bins = estimate_bins_2d(array, buckets, sub_buckets)
        return cls(bins.edges, bins.max_ratio if strict else None, strict=strict)

    @property
    def dimensions(self) -> int:
        """1, or 2 where edges are pairs."""
        return 2 if isinstance(self.edges[0], tuple) else 1

    def __len__(self) -> int:
        return len(self.edges)

    def choose(self, lengths: ArrayLike) -> NDArray[np.int64]:
        """The bucket of each example, -1 where it is rejected. lengths: (n,) or (n, 2); returns (n,)."""
        array = checked_lengths(lengths, dimensions=self.dimensions)
        table = np.asarray(self.edges, dtype=np.float64)
        if self.dimensions == 1:
            at = np.searchsorted(table, array, side="left")
            return np.where(at < len(table), at, REJECTED)
        return self._strict(array, table) if self.strict else self._lenient(array, table)

    def _strict(self, pairs: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.int64]:
        inputs, outputs = pairs[:, 0], pairs[:, 1]
        at = np.searchsorted(table[:, 0], inputs, side="left")  # the first of those with this input edge
        fits = at < len(table)
        last = np.searchsorted(table[:, 0], table[:, 0], side="right") - 1  # of those with the same input edge
        at = np.where(fits, at, 0)
        end = last[at]
        longer = outputs > table[at, 1]
        while (longer & (at < end)).any():
            at = np.where(longer & (at < end), at + 1, at)
            longer = outputs > table[at, 1]
        fits &= ~longer
        if self.max_ratio is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                fits &= ~(outputs / inputs > np.asarray(self.max_ratio)[at])
        return np.where(fits, at, REJECTED)

    def _lenient(self, pairs: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.int64]:
        chosen = np.full(len(pairs), REJECTED)
        left = np.arange(len(pairs))
        for bucket, edge in enumerate(table):
            fits = (pairs[left] <= edge).all(1)
            chosen[left[fits]] = bucket
            left = left[~fits]
        return chosen


def padding_share(lengths: ArrayLike, batches: Iterable[Sequence[int]]) -> float:
    """The share of padding in all that a model is given: 1 - Σ length / Σ (examples x longest of the batch).

    lengths: shape (n,), or (n, 2), where each side is padded to its own longest and the two are added. batches: the
    indices of each, of all ranks, as each rank pads its own.

    >>> padding_share([1, 1, 4, 4], [[0, 1], [2, 3]]), padding_share([1, 1, 4, 4], [[0, 2], [1, 3]])
    (0.0, 0.375)
    """
    array = checked_lengths(lengths)
    array = array[:, None] if array.ndim == 1 else array
    real = padded = 0.0
    for batch in batches:
        which = np.asarray(batch)
        if which.dtype.kind not in "iu" or which.min() < 0 or which.max() >= len(array):
            raise InputError(f"batches must hold indices of the {len(array)} lengths, got {batch!r}")
        of = array[which]
        real += float(of.sum())
        padded += float(len(of) * of.max(0).sum())
    if not padded:
        raise InputError("batches must hold at least one example of length > 0")
    return 1 - real / padded


def checked_lengths(lengths: ArrayLike, *, dimensions: int | None = None, name: str = "lengths") -> NDArray[np.float64]:
    """As an array of shape (n,) or (n, 2) of finite numbers >= 0, n >= 1."""
    try:
        array = np.asarray(lengths, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be numbers, or pairs of numbers (input, output), got {lengths!r}") from None
    if not len(array.shape) or not array.size or array.ndim > 2 or (array.ndim == 2 and array.shape[1] != 2):
        raise InputError(f"{name} must have shape (n,) or (n, 2) and n >= 1, got {array.shape}")
    if dimensions not in (None, array.ndim):
        shape = "(n,)" if dimensions == 1 else "(n, 2)"
        raise InputError(f"{name} must have shape {shape} as the buckets have, got {array.shape}")
    wrong = ~(np.isfinite(array) & (array >= 0))
    if wrong.any():
        raise InputError(f"{name} must be finite and >= 0, got {array[wrong][0]} at {np.argwhere(wrong)[0].tolist()}")
    return array
