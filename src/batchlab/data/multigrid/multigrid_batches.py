"""Batches for multigrid training: their size follows the shape, and each index carries the shape it is cut to.

The base is Wu et al. 2020 (arXiv 1912.00998); the shapes and their batches come from `schedule.multigrid.Multigrid`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.data.batch_sampler import BatchSampler, share_of
from batchlab.data.stream import SampleStream
from batchlab.schedule.grids.multigrid import Multigrid
from batchlab.schedule.grids.multigrid_cycles import GridShape, LongEntry


class MultigridBatches(BatchSampler):
    """Yields this rank's `(index, GridShape)` pairs of each batch, all of one shape; all ranks have the same shape.

    The shape travels in the index, because a `DataLoader`'s workers hold a copy of the data set that is told nothing
    later: its `__getitem__` gets the pair. Update j of an epoch has the shape j mod 3 of the short cycle.

    n: examples. multigrid: its batches are over all ranks, so that `multigrid.batch` must be a multiple of world_size.
    drop_last: leave out the last, smaller batch of an epoch (True, as a split BatchNorm needs it); with False every
    example comes once an epoch, and it is refused where the last batch had less than an example for each rank.
    After the schedule's last epoch its last shape goes on. With workers save `state_dict(batches=lr.seen)`, the updates
    that `MultigridLR` has counted.

    >>> schedule = Multigrid((8, 16, 16), batch=2, steps=[0, 4], epochs=6)
    >>> batches = MultigridBatches(100, schedule)
    >>> [(len(batch), batch[0][1].sizes) for batch in batches][:4]
    [(32, (2, 8, 8)), (16, (2, 11, 11)), (16, (2, 11, 11)), (32, (2, 8, 8))]
    """

    EQUAL_EPOCHS = False

    def __init__(
        self,
        n: int,
        multigrid: Multigrid,
        seed: int = 0,
        *,
        drop_last: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(seed, rank=rank, world_size=world_size)
        check_count(n=n)
        if not isinstance(multigrid, Multigrid):
            raise InputError(f"multigrid must be a Multigrid, got {type(multigrid).__name__}")
        self.n, self.multigrid, self.drop_last = int(n), multigrid, bool(drop_last)
        if multigrid.batch % self.world_size:
            raise InputError(f"batch must be a multiple of world_size {self.world_size}, got {multigrid.batch}")
        for entry in multigrid.entries:
            self._check(entry)
        self._stream = SampleStream(self.n, self.seed)

    def _check(self, entry: LongEntry) -> None:
        if entry.first == entry.end:
            return
        cycle = self.multigrid.cycle(entry.first)
        largest = max(batch for _, batch in cycle)
        if largest > self.n:
            raise InputError(f"n must be at least the largest batch, {largest} of shape {entry.sizes}, got {self.n}")
        last = self.n - self._position(cycle, self._count(cycle) - 1)
        if last < self.world_size and not self.drop_last:
            raise InputError(
                f"n={self.n} leaves {last} examples for the last batch of {self.world_size} ranks: take drop_last=True"
            )

    def _count(self, cycle: list[tuple[GridShape, int]]) -> int:
        """Batches of an epoch."""
        sizes = [batch for _, batch in cycle]
        whole, rest = divmod(self.n, sum(sizes))
        count = whole * len(sizes)
        for size in sizes:
            if rest < size:
                break
            rest, count = rest - size, count + 1
        return count + (rest > 0 and not self.drop_last)

    def _position(self, cycle: list[tuple[GridShape, int]], place: int) -> int:
        """Examples of the epoch before its batch `place`."""
        whole, rest = divmod(place, len(cycle))
        return min(whole * sum(batch for _, batch in cycle) + sum(batch for _, batch in cycle[:rest]), self.n)

    def epoch_length(self, epoch: int) -> int:
        """Batches of the epoch, on each rank."""
        return self._count(self.multigrid.cycle(epoch))

    def plan(self, epoch: int, first: int) -> Iterator[Any]:
        """This rank's share of each batch, every index with the shape."""
        cycle = self.multigrid.cycle(epoch)
        for place in range(first, self._count(cycle)):
            shape, _ = cycle[place % len(cycle)]
            at, end = self._position(cycle, place), self._position(cycle, place + 1)
            low, high = share_of(end - at, self.rank, self.world_size)
            indices = self._stream.indices(epoch * self.n + at + low, high - low)
            yield [(index, shape) for index in indices.tolist()]

    def identity(self) -> dict[str, Any]:
        """What a state must have in common."""
        return {"n": self.n, "drop_last": self.drop_last, "multigrid": self.multigrid.settings()}
