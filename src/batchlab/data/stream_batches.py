"""Plain batches of the sample stream: uniform shuffles, a batch size that may change at any batch, exact resuming."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.data.batch_sampler import BatchSampler, share_of
from batchlab.data.stream import SampleStream


class StreamBatches(BatchSampler):
    """Consecutive positions of the `SampleStream` of n examples, cut into batches: what to use by default.

    The order of examples is a function of (seed, position) alone. Batch size, world size, workers and interruptions
    only say where it is cut, so that runs at two batch sizes see the same examples in the same order.

    n: examples. batch_size: of the batch over all ranks, in examples, at least world_size. Rank r of R gets the
    positions r·b/R to (r+1)·b/R of a batch of b: its batches put together are the global one in its order. Where R does
    not divide b, shares differ by one: then weigh a rank's mean loss by its examples, as a mean of ranks' means is not
    the mean over the batch.
    drop_last: leave out the last, smaller batch of an epoch. endless: batches reach across the end of an epoch, so that
    all are full and none is left out; there is then one endless `iter()`. With neither, the last batch of an epoch is
    smaller; it is refused where there would be less than one example for each rank.

    Setting `batch_size` holds from the next batch on: from the next one handed out, which with a `DataLoader`'s workers
    is some batches later in training. With drop_last the batch size also says which examples an epoch leaves out.

    Not for examples of very different lengths, whose batches are mostly padding: see `BucketBatchSampler`.

    >>> batches = StreamBatches(10, batch_size=4, seed=0)
    >>> first = [len(batch) for batch in batches]
    >>> batches.batch_size = 8
    >>> first, [len(batch) for batch in batches]
    ([4, 4, 2], [8, 2])
    """

    EQUAL_EPOCHS = False

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int = 0,
        *,
        drop_last: bool = False,
        endless: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(seed, rank=rank, world_size=world_size)
        check_count(n=n)
        self.n = int(n)
        self.drop_last, self.endless = bool(drop_last), bool(endless)
        if drop_last and endless:
            raise InputError("drop_last and endless cannot both be True: an endless stream has no last batch")
        self._stream = SampleStream(self.n, self.seed)
        self._cuts: list[Cut] = []
        self._check_size(batch_size, 0)
        self._cuts.append(Cut(0, 0, int(batch_size)))

    @property
    def batch_size(self) -> int:
        """Examples of the next batch, over all ranks; an epoch's last one may be smaller."""
        return self._cut(self._taken).size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        position = self.position()
        self._check_size(size, position)
        if size == self.batch_size and not any(cut.batch >= self._taken for cut in self._cuts):
            return
        earlier = [cut for cut in self._cuts if cut.batch < self._taken]
        self._cuts = self._needed([*earlier, Cut(self._taken, position, int(size))], position)

    def position(self, batches: int | None = None) -> int:
        """Positions of the stream that `batches` batches of the run (default: those handed out) have gone through."""
        batches = self._taken if batches is None else batches
        cut = self._cut(batches)
        ahead = batches - cut.batch
        if self.endless:
            return cut.position + ahead * cut.size
        epoch, offset = divmod(cut.position, self.n)
        rest = self._count(self.n - offset, cut.size)
        if ahead < rest:
            return cut.position + ahead * cut.size
        epochs, ahead = divmod(ahead - rest, self._count(self.n, cut.size))
        return (epoch + 1 + epochs) * self.n + ahead * cut.size

    def start_of(self, epoch: int) -> int:
        """Batches of the run before the epoch."""
        if self.endless:
            return 0
        at = bisect_right(self._cuts, epoch * self.n, key=lambda cut: cut.position) - 1
        if at < 0:
            known = -(-self._cuts[0].position // self.n)
            raise InputError(f"epoch must be at least {known}, what came before is forgotten: {epoch}")
        cut = self._cuts[at]
        begun, offset = divmod(cut.position, self.n)
        rest = self._count(self.n - offset, cut.size)
        return cut.batch + (rest + (epoch - begun - 1) * self._count(self.n, cut.size) if epoch > begun else 0)

    def locate(self, batches: int) -> tuple[int, int]:
        """The epoch and the place within it of the batch that comes after `batches` batches of the run."""
        if self.endless:
            return 0, batches
        epoch = self.position(batches) // self.n
        return epoch, batches - self.start_of(epoch)

    def epoch_length(self, epoch: int) -> int | None:
        """Batches of the epoch, as far as sizes are known by now; None where endless."""
        return None if self.endless else self.start_of(epoch + 1) - self.start_of(epoch)

    def plan(self, epoch: int, first: int) -> Iterator[NDArray[np.int64]]:
        """This rank's share of each batch."""
        batch, end = self.start_of(epoch) + first, (epoch + 1) * self.n
        while (at := self.position(batch)) < end or self.endless:
            size = self._cut(batch).size
            whole = size if self.endless else min(size, end - at)
            if whole < self.world_size:
                raise InputError(
                    f"epoch {epoch} was cut for fewer ranks, and a batch of it has {whole} examples for "
                    f"{self.world_size}: go on in the present epoch"
                )
            low, high = share_of(whole, self.rank, self.world_size)
            yield self._stream.indices(at + low, high - low)
            batch += 1

    def identity(self) -> dict[str, Any]:
        """What a state must have in common; the batch size is the state's."""
        return {"n": self.n, "drop_last": self.drop_last, "endless": self.endless}

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """As of every batch sampler; with every batch size of the present epoch, and those set for batches to come."""
        state = super().state_dict(batches)
        self.locate(state["batches"])
        return state | {"cuts": [list(cut) for cut in self._needed(self._cuts, self.position(batches))]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where the state was taken, at its batch sizes and with any number of ranks that they suffice for."""
        before = self._taken, self._cuts
        super().load_state_dict(state_dict)
        try:
            self._cuts = [Cut(*map(int, cut)) for cut in state_dict["cuts"]]
            for cut in self._cuts[self._cuts.index(self._cut(self._taken)) :]:
                self._check_size(cut.size, self.position() if cut.batch <= self._taken else cut.position)
            self.locate(self._taken)
        except (KeyError, TypeError, IndexError) as error:
            self._taken, self._cuts = before
            raise InputError("state_dict must hold the batch sizes of a StreamBatches as 'cuts'") from error
        except InputError:
            self._taken, self._cuts = before
            raise

    def _cut(self, batches: int) -> Cut:
        at = bisect_right(self._cuts, batches, key=lambda cut: cut.batch) - 1
        if at < 0:
            raise InputError(
                f"batches must be at least {self._cuts[0].batch}, what came before is forgotten: {batches}"
            )
        return self._cuts[at]

    def _needed(self, cuts: list[Cut], position: int) -> list[Cut]:
        """Those of the present epoch, of the one before, and of all to come."""
        first = bisect_right(cuts, (position // self.n - 1) * self.n, key=lambda cut: cut.position) - 1
        return cuts[max(first, 0) :]

    def _count(self, examples: int, size: int) -> int:
        return examples // size if self.drop_last else -(-examples // size)

    def _check_size(self, size: int, position: int) -> None:
        check_count(self.world_size, batch_size=size)
        if self.drop_last and size > self.n:
            raise InputError(f"batch_size must be at most n={self.n} with drop_last, got {size}")
        if self.endless or self.drop_last:
            return
        for rest in ((self.n - position % self.n) % size, self.n % size):
            if 0 < rest < self.world_size:
                raise InputError(
                    f"batch_size {size} leaves {rest} of n={self.n} examples for the last batch of {self.world_size} "
                    "ranks: take another, drop_last=True or endless=True"
                )


class Cut(NamedTuple):
    """From which batch of the run on, at which position of the stream, batches have which size."""

    batch: int
    position: int
    size: int
