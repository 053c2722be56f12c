"""Batches of packed sequences: as many of them in each, every rank its equal part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed
from batchlab.data.batch_sampler import BatchSampler
from batchlab.data.documents.pack import Packing
from batchlab.data.stream import SampleStream


class PackedBatches(BatchSampler):
    """Shuffled batches of `sequences` packed sequences, of all ranks together; what is left of an epoch is left out.

    packing: of `pack`; indices are its sequences, as in `PackedDocuments`. sequences: a multiple of the world size.
    shuffle: anew in every epoch; else in the packing's order. seed, rank, world_size, state: as in `BatchSampler`; the
    state is the same for any world size.

    Each sequence has `capacity` tokens of work and `packing.used` of use: the numbers of targets differ from rank to
    rank, so that a loss over several is the sum over all targets by their number, not the mean of the ranks' means.

    >>> from batchlab.data.documents.pack import pack
    >>> sampler = PackedBatches(pack([3, 2, 4, 1, 4, 2], capacity=4), sequences=2, shuffle=False)
    >>> len(sampler), list(sampler)
    (2, [[0, 1], [2, 3]])
    """

    def __init__(
        self,
        packing: Packing,
        sequences: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(seed, rank=rank, world_size=world_size)
        if not isinstance(packing, Packing):
            raise InputError(f"packing must be a Packing, as pack gives it, got {type(packing).__name__}")
        check_count(sequences=sequences)
        if sequences % self.world_size:
            raise InputError(f"sequences must be a multiple of world_size {self.world_size}, got {sequences}")
        if sequences > len(packing):
            raise InputError(f"sequences must be at most the {len(packing)} of the packing, got {sequences}")
        self.packing, self.sequences, self.shuffle = packing, int(sequences), bool(shuffle)
        self._stream = SampleStream(len(packing), derive_seed(self.seed, "packed"))

    def epoch_length(self, epoch: int) -> int:
        """Whole batches in the packing."""
        return len(self.packing) // self.sequences

    def identity(self) -> dict[str, Any]:
        """The packing's size and the batch."""
        sizes = {"packed": len(self.packing), "capacity": self.packing.capacity, "parts": len(self.packing.document)}
        return sizes | {"sequences": self.sequences, "shuffle": self.shuffle}

    def plan(self, epoch: int, first: int) -> Iterator[NDArray[np.int64]]:
        """This rank's sequences of each batch."""
        share = self.sequences // self.world_size
        for batch in range(first, self.epoch_length(epoch)):
            start = batch * self.sequences + self.rank * share
            if self.shuffle:
                yield self._stream.indices(epoch * len(self.packing) + start, share)
            else:
                yield np.arange(start, start + share)
