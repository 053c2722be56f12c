"""Dataset decomposition: a step is of pieces of one length, its tokens always the same (arXiv 2405.13226)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed
from batchlab.data.batch_sampler import BatchSampler
from batchlab.data.documents.decompose import Pieces
from batchlab.data.documents.decomposition_curriculum import Curriculum, check_curriculum, cycle_order
from batchlab.data.documents.decomposition_plan import DecompositionPlan
from batchlab.data.stream import SampleStream

Ints = NDArray[np.int64]


class DatasetDecomposition(BatchSampler):
    """Batches of pieces of one length: many short ones or few long ones, `plan.tokens_per_step` tokens each.

    An epoch is the planned run: its cycles one after the other, each with other pieces, so that none comes twice before
    all have come once. Where the plan takes more than one pass, the cycle at their seam may have a piece of each twice.
    All ranks take their equal parts of the same batch. Average the loss over tokens, of which a
    step always has as many: do not move the learning rate with the number of sequences, and do not restart its
    schedule in a cycle. A piece's positions start at 0.

    pieces: of `decompose`; indices are theirs, as in `PieceDataset`. plan: of `plan_decomposition`, for all of their
    lengths or, where a bucket is too small, for some.
    curriculum: "grow_p2" (the paper's choice) and "grow_linear" begin a cycle with short pieces and end it with long
        ones; "natural", "uniform", or weights, see `bucket_odds`; "olmo_grow_p2" and "olmo_grow_linear" set the counts
        of each sub-cycle, see `sub_cycle_counts`.
    accumulation: equal micro-batches that a rank cuts its batch into; it must divide that of every bucket, and changes
        nothing else.
    longest_first: the run's first batch is of the longest bucket, so that memory fails early (OLMo-core does so).
    seed, rank, world_size, state: as in `BatchSampler`; the state is the same for any world size.

    Not where almost all documents are of one length: packing then wastes as little, and shuffles better. A new place in
    a run costs the order of one cycle: a quarter of a second for a million batches.

    >>> from batchlab.data.documents.decompose import decompose
    >>> from batchlab.data.documents.decomposition_plan import plan_decomposition
    >>> pieces = decompose([40] * 64, i_min=2, i_max=4)
    >>> plan = plan_decomposition(pieces.counts, pieces.lengths, tokens_per_step=64, cycles=2)
    >>> sampler = DatasetDecomposition(pieces, plan)
    >>> len(sampler), sorted({(len(batch), pieces.lengths[pieces.bucket_of(batch[0])]) for batch in sampler})
    (32, [(4, 16), (8, 8), (16, 4)])
    """

    def __init__(
        self,
        pieces: Pieces,
        plan: DecompositionPlan,
        *,
        curriculum: Curriculum = "grow_p2",
        accumulation: int = 1,
        longest_first: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(seed, rank=rank, world_size=world_size)
        for name, value, kind in (("pieces", pieces, Pieces), ("plan", plan, DecompositionPlan)):
            if not isinstance(value, kind):
                raise InputError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
        there = dict(zip(pieces.lengths, pieces.counts, strict=True))
        if any(there.get(length) != count for length, count in zip(plan.lengths, plan.available, strict=True)):
            raise InputError(
                f"plan must be of these pieces: they are {pieces.counts} of lengths {pieces.lengths}, "
                f"it is for {plan.available} of {plan.lengths}"
            )
        check_count(accumulation=accumulation)
        check_curriculum(curriculum, len(plan.lengths))
        for length, batch in zip(reversed(plan.lengths), reversed(plan.batch), strict=True):
            if batch % (self.world_size * accumulation):
                raise InputError(
                    f"the {batch} sequences of a step in the bucket of length {length} must be a multiple of "
                    f"world_size {self.world_size} times accumulation {accumulation}"
                )
        self.pieces, self.planned, self.accumulation = pieces, plan, int(accumulation)
        self.curriculum = curriculum if isinstance(curriculum, str) else tuple(float(each) for each in curriculum)
        self.longest_first = bool(longest_first)
        self._places = [pieces.lengths.index(length) for length in plan.lengths]  # of the plan's buckets among all
        streams = [derive_seed(self.seed, "decomposition", place) for place in self._places]
        self._streams = [SampleStream(count, each) for count, each in zip(plan.available, streams, strict=True)]
        self._cached: tuple[int, int, Ints, Ints] = (-1, -1, np.empty(0, np.int64), np.empty(0, np.int64))

    def epoch_length(self, epoch: int) -> int:
        """Steps of the planned run."""
        return self.planned.cycles * sum(self.planned.batches_per_cycle)

    def identity(self) -> dict[str, Any]:
        """The data, the plan and the curriculum."""
        plan = self.planned
        return {
            "pieces": list(self.pieces.counts),
            "lengths": list(plan.lengths),
            "batches_per_cycle": list(plan.batches_per_cycle),
            "cycles": plan.cycles,
            "tokens_per_step": plan.tokens_per_step,
            "curriculum": self.curriculum if isinstance(self.curriculum, str) else list(self.curriculum),
            "longest_first": self.longest_first,
        }

    def cycle_lengths(self, cycle: int, epoch: int = 0) -> Ints:
        """The length of the pieces of each batch of a cycle, in tokens; shape (batches,)."""
        check_count(0, cycle=cycle, epoch=epoch)
        if cycle >= self.planned.cycles:
            raise InputError(f"cycle must be below {self.planned.cycles}, got {cycle}")
        return np.asarray(self.planned.lengths, dtype=np.int64)[self._cycle(epoch, cycle)[0]]

    def plan(self, epoch: int, first: int) -> Iterator[Ints]:
        """This rank's batches: the same bucket on all ranks at each step."""
        per_cycle = sum(self.planned.batches_per_cycle)
        for at in range(first, self.epoch_length(epoch)):
            cycle, place = divmod(at, per_cycle)
            buckets, numbers = self._cycle(epoch, cycle)
            yield self._batch(epoch, cycle, int(buckets[place]), int(numbers[place]))

    def _batch(self, epoch: int, cycle: int, bucket: int, number: int) -> Ints:
        """This rank's part of the batch of this number, of a bucket in a cycle."""
        plan = self.planned
        in_cycle, available = plan.sequences_per_cycle[bucket], plan.available[bucket]
        per_epoch = max(available, plan.cycles * in_cycle)  # a pass over the data, or more: then the stream runs on
        share = plan.batch[bucket] // self.world_size
        start = epoch * per_epoch + cycle * in_cycle + number * plan.batch[bucket] + self.rank * share
        return self._streams[bucket].indices(start, share) + int(self.pieces.first[self._places[bucket]])

    def _cycle(self, epoch: int, cycle: int) -> tuple[Ints, Ints]:
        """Of each batch of a cycle, its bucket and how many of that bucket come before it."""
        if self._cached[:2] != (epoch, cycle):
            batches = self.planned.batches_per_cycle
            buckets = cycle_order(batches, self.curriculum, derive_seed(self.seed, "curriculum", epoch, cycle))
            if self.longest_first and epoch == cycle == 0:
                longest = int(np.argmax(buckets == len(batches) - 1))
                buckets[[0, longest]] = buckets[[longest, 0]]
            numbers = np.empty_like(buckets)
            for bucket, count in enumerate(batches):
                numbers[buckets == bucket] = np.arange(count)
            self._cached = (epoch, cycle, buckets, numbers)
        return self._cached[2], self._cached[3]
