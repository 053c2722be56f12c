"""What every batch sampler here is: an endless run of batches, cut into epochs, a function of (seed, batches taken)."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import Sampler

from batchlab.core.checks import as_count, check_count
from batchlab.core.errors import InputError


class BatchSampler(Sampler[list[int]], ABC):
    """Yields this rank's indices of each batch: give it to a `DataLoader` as `batch_sampler`.

    One `iter()` goes through the rest of the present epoch, the next one through the next epoch, shuffled anew. All
    ranks yield equally many batches, of the same kind at each step. A subclass gives `epoch_length`, `plan` and
    `identity`; where a batch depends on more than (seed, batches taken), it extends both state methods.

    A loop over a `DataLoader` with workers that breaks off leaves behind what they had fetched ahead: give it back with
    `sampler.load_state_dict(sampler.state_dict(batches=trained))`, trained: batches of the whole run.

    It shares batches out to ranks by itself: trainers that would share them again must be told not to, as Lightning's
    `use_distributed_sampler=False`; with Accelerate, leave the loader out of `prepare`.

    seed: of all that is random, the same on all ranks. rank, world_size: of the default process group where one is
    initialised when the sampler is made, else 0 and 1.

    >>> class InOrder(BatchSampler):
    ...     def epoch_length(self, epoch):
    ...         return 3
    ...     def plan(self, epoch, first):
    ...         return ([2 * at, 2 * at + 1] for at in range(first, 3))
    >>> sampler = InOrder()
    >>> next(iter(sampler)), list(sampler), len(list(sampler))
    ([0, 1], [[2, 3], [4, 5]], 3)
    >>> sampler.state_dict(batches=4)
    {'sampler': 'InOrder', 'seed': 0, 'batches': 4}
    """

    EQUAL_EPOCHS: ClassVar[bool] = True  # whether every epoch has as many batches as the first

    def __init__(self, seed: int = 0, *, rank: int | None = None, world_size: int | None = None) -> None:
        check_count(0, seed=seed)
        self.seed = int(seed)
        self.rank, self.world_size = place(rank, world_size)
        self._taken = 0
        self._starts = [0]

    @abstractmethod
    def epoch_length(self, epoch: int) -> int | None:
        """Batches of the epoch, on each rank; None where the first one never ends or its length is unknown."""

    @abstractmethod
    def plan(self, epoch: int, first: int) -> Iterator[Sequence[int] | NDArray[np.int64]]:
        """This rank's batches of the epoch from its batch `first` on, got without drawing those before it."""

    def identity(self) -> dict[str, Any]:
        """What a state must have in common with a sampler that loads it, beside kind and seed: JSON-able."""
        return {}

    @property
    def taken(self) -> int:
        """Batches handed out in the whole run; workers that fetch ahead are ahead of training by what they hold."""
        return self._taken

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        return self.locate(self._taken)[0]

    def locate(self, batches: int) -> tuple[int, int]:
        """The epoch and the place within it of the batch that comes after `batches` batches of the run."""
        if self.EQUAL_EPOCHS:
            length = self._length(0)
            return (0, batches) if length is None else divmod(batches, length)
        while self._starts[-1] <= batches and self._extend():
            pass
        epoch = bisect_right(self._starts, batches) - 1
        return epoch, batches - self._starts[epoch]

    def start_of(self, epoch: int) -> int:
        """Batches of the run before the epoch."""
        if self.EQUAL_EPOCHS:
            return epoch * (self._length(0) or 0)
        while len(self._starts) <= epoch and self._extend():
            pass
        return self._starts[epoch]

    def _extend(self) -> bool:
        length = self._length(len(self._starts) - 1)
        if length is not None:
            self._starts.append(self._starts[-1] + length)
        return length is not None

    def _length(self, epoch: int) -> int | None:
        length = self.epoch_length(epoch)
        if length is not None and length < 1:
            raise InputError(f"{type(self).__name__} has no batch in epoch {epoch}: ask for smaller batches")
        return length

    def __len__(self) -> int:
        length = self.epoch_length(self.epoch)
        if length is None:
            raise TypeError(f"this {type(self).__name__} has no length: its epoch does not end, or where is not known")
        return length

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._taken
        for batch in self.plan(*self.locate(batches)):
            batches += 1
            self._taken = batches  # before the batch goes out: a loop that breaks here has had it
            yield batch.tolist() if isinstance(batch, np.ndarray) else list(batch)

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of the epoch, as trainers ask for; nothing happens where it is the present one.

        `InputError` for an epoch so far back that its start is no longer known.
        """
        epoch = as_count(0, epoch=epoch)
        if epoch == self.epoch:
            return
        if self.epoch_length(self.epoch) is None:
            raise InputError(f"epoch must be 0, the only one of a {type(self).__name__} without end, got {epoch}")
        self._taken = self.start_of(epoch)

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """The state after `batches` batches of the whole run, by default those handed out; JSON-able.

        batches: those that were trained on, where a `DataLoader`'s workers have fetched further.
        """
        taken = self._taken if batches is None else as_count(0, batches=batches)
        return {"sampler": type(self).__name__, "seed": self.seed, **self.identity(), "batches": taken}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where the state was taken; refused where it is of other data or settings."""
        mine = {"sampler": type(self).__name__, "seed": self.seed, **self.identity()}
        for name, value in mine.items():
            if name not in state_dict:
                raise InputError(f"state_dict must be of a {type(self).__name__}: it lacks {name!r}")
            if (right := _plain(value)) != (got := _plain(state_dict[name])):
                raise InputError(f"state_dict must have {name} {right!r} as this sampler has, got {got!r}")
        check_count(0, batches=state_dict.get("batches"))  # type: ignore[arg-type]
        self._taken = int(state_dict["batches"])


def place(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Rank and world size, each of the default process group where it is None: 0 and 1 where there is no group.

    >>> place(), place(1, 4)
    ((0, 1), (1, 4))
    """
    grouped = dist.is_available() and dist.is_initialized()
    world = (dist.get_world_size() if grouped else 1) if world_size is None else world_size
    mine = (dist.get_rank() if grouped else 0) if rank is None else rank
    check_count(world_size=world)
    check_count(0, rank=mine)
    if mine >= world:
        raise InputError(f"rank must be below world_size {world}, got {mine}")
    return int(mine), int(world)


def share_of(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Where this rank's contiguous share of `count` things begins and ends; shares differ by one at most.

    >>> [share_of(10, rank, 4) for rank in range(4)]
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    return rank * count // world_size, (rank + 1) * count // world_size


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
