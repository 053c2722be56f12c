"""Buckets of examples by length, and a batch size for each: what a sampler with fixed sizes per bucket runs by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from batchlab.core.checks import holds
from batchlab.core.errors import InputError
from batchlab.measure.memory.size_finder import MicroBatch

Bucket: TypeAlias = float | tuple[float, ...]


@dataclass(frozen=True)
class MicroBatchTable:
    """The largest micro-batch of each bucket. buckets: ascending; found: what was found for each, in the same order.

    A bucket is the greatest length in it, or (greatest input length, greatest output length). Where memory grows with
    length, sizes do not grow with it: of two buckets of which one is longer in no dimension, it has no smaller size.

    Batches of unequal size weigh their examples unequally in a mean over batches: let the loss be a sum over examples
    or tokens divided by a constant. The learning rate is not changed by a table; it was tuned for the mean batch.
    """

    buckets: tuple[Bucket, ...]
    found: tuple[MicroBatch, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the buckets, in their order; each was run."""
        return tuple(each.size for each in self.found)

    @property
    def steps(self) -> int:
        """The sizes that were run, of all buckets."""
        return sum(each.steps for each in self.found)

    def __getitem__(self, bucket: Bucket) -> MicroBatch:
        """What was found for `bucket`."""
        if bucket not in self.buckets:
            raise InputError(f"bucket must be one of {list(self.buckets)}, got {bucket!r}")
        return self.found[self.buckets.index(bucket)]

    def size_for(self, *lengths: float) -> int | None:
        """The size of the first bucket that an example of `lengths` fits in; None if it is too long for all.

        First in ascending order, so that a long output may put a short input among longer ones.
        """
        kinds = {1 if not isinstance(bucket, tuple) else len(bucket) for bucket in self.buckets}
        if {len(lengths)} != kinds:
            raise InputError(f"lengths must be {kinds.pop()} of them, as in the buckets, got {lengths!r}")
        for bucket, each in zip(self.buckets, self.found, strict=True):
            if all(length <= edge for length, edge in zip(lengths, edges(bucket), strict=True)):
                return each.size
        return None

    def merged(self) -> MicroBatchTable:
        """The same with neighbours of one size made one bucket, that of the longer; for lengths of one dimension."""
        if any(isinstance(bucket, tuple) for bucket in self.buckets):
            raise InputError("only buckets of one length can be merged: pairs have no neighbours")
        sizes = [*self.sizes, None]
        kept = [at for at in range(len(self.found)) if sizes[at] != sizes[at + 1]]
        return MicroBatchTable(tuple(self.buckets[at] for at in kept), tuple(self.found[at] for at in kept))


def ascending(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """The buckets sorted; `InputError` where they are no table's.

    >>> ascending([(20, 5), (10, 7), (10, 3)])
    ((10, 3), (10, 7), (20, 5))
    """
    if not isinstance(buckets, (list, tuple)) or not buckets:
        raise InputError(f"buckets must be a list or tuple of at least one length or tuple of lengths, got {buckets!r}")
    for bucket in buckets:
        for edge in edges(bucket):
            if isinstance(edge, bool) or not holds(lambda edge: 0 < edge < math.inf, edge):
                raise InputError(f"buckets must hold finite lengths > 0, got {bucket!r}")
    if len({len(edges(bucket)) if isinstance(bucket, tuple) else 0 for bucket in buckets}) > 1:
        raise InputError(f"buckets must be all lengths, or all tuples of as many lengths, got {list(buckets)!r}")
    if len(set(buckets)) < len(buckets):
        raise InputError(f"buckets must differ, got {list(buckets)!r}")
    return tuple(sorted(buckets, key=edges))


def edges(bucket: Bucket) -> tuple[float, ...]:
    """The greatest lengths in a bucket, as a tuple."""
    return bucket if isinstance(bucket, tuple) else (bucket,)


def within(bucket: Bucket, longer: Bucket) -> bool:
    """Whether all that is in `bucket` would fit into `longer`."""
    return all(edge <= other for edge, other in zip(edges(bucket), edges(longer), strict=True))
