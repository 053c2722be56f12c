"""The sample stream in micro-batches, a fixed number an update and of a size that may change between updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed
from batchlab.data.batch_sampler import share_of
from batchlab.data.stream_batches import StreamBatches


class MicroBatches(StreamBatches):
    """An endless `StreamBatches` that hands out each batch in `accumulation` micro-batches: what a trainer loops over.

    Trainers decide by a count of micro-batches when to update, so that their number an update must stand while their
    size moves. Everything but `iter()` counts updates: `batch_size` is of an update over all ranks and micro-batches,
    `taken`, `position` and `state_dict` go by updates begun. A size that is set holds from the next update that is not
    yet begun, never within one. An update's examples are consecutive positions of the stream, rank r's share first cut
    from it and then into micro-batches, which differ by one example at most, and not at all where accumulation x
    world_size divides the batch. Epochs have no ragged end: batches reach across it. Iterate once in a run: a second
    `iter()` goes on with the next update that is not begun, and what was fetched of others is lost.

    n, batch_size, seed, rank, world_size: as of `StreamBatches`. accumulation: micro-batches an update.

    A `DataLoader`'s workers, and trainers that look ahead, begin updates before they are trained on: `taken` less the
    updates trained is how many still come in the old size.

    >>> batches = MicroBatches(100, batch_size=4, accumulation=2)
    >>> pieces = iter(batches)
    >>> first = [len(next(pieces)) for _ in range(2)]
    >>> batches.batch_size = 8
    >>> first, [len(next(pieces)) for _ in range(2)], batches.position()
    ([2, 2], [4, 4], 12)
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int = 0,
        *,
        accumulation: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        check_count(accumulation=accumulation)
        self.accumulation = int(accumulation)
        super().__init__(n, batch_size, seed, endless=True, rank=rank, world_size=world_size)

    def _check_size(self, size: int, position: int) -> None:
        super()._check_size(size, position)
        if size < self.accumulation * self.world_size:
            raise InputError(
                f"batch_size must be at least accumulation {self.accumulation} x world_size {self.world_size}, an "
                f"example for each micro-batch, got {size}"
            )

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            for piece in range(self.accumulation):
                low, high = share_of(len(batch), piece, self.accumulation)
                yield batch[low:high]


def micro_batch_loader(dataset: Dataset[Any], sampler: StreamBatches, **options: Any) -> DataLoader[Any]:
    """A `DataLoader` of the sampler's batches that draws nothing from torch's global generator.

    options: of `DataLoader`. Its workers are seeded from the sampler's seed and place. The batches are a rank's own:
    Accelerate's `prepare` hands the loader back as it is, and does not move batches to a device; Lightning needs
    `use_distributed_sampler=False`.
    """
    if isinstance(dataset, IterableDataset):
        raise InputError(
            "dataset must be a map-style dataset, whose examples a sampler can ask for, got an iterable one"
        )
    if not options.get("in_order", True):
        raise InputError("in_order must be True: batches that come out of order cannot be told apart by their size")
    if options.get("generator") is None:
        seed = derive_seed(sampler.seed, "loader", sampler.taken, sampler.rank)
        options["generator"] = torch.Generator().manual_seed(seed)
    loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=sampler, **options)
    # Or `prepare` shares out the shares, by a batch size that no batch has.
    vars(loader)["_is_accelerate_prepared"] = True
    return loader


def loader_like(loader: DataLoader[Any], sampler: StreamBatches) -> DataLoader[Any]:
    """A loader over the sampler's batches with the dataset, collation and workers of `loader`, which is not used."""
    names = ["num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"]
    names += ["prefetch_factor", "persistent_workers", "in_order"]
    options = {name: getattr(loader, name) for name in names if hasattr(loader, name)}
    return micro_batch_loader(loader.dataset, sampler, **options)


def examples_in(batch: Any) -> int:
    """The first dimension of the first tensor in a batch, looked for in dicts, lists, tuples and dataclasses in order.

    >>> examples_in({"name": None, "x": torch.zeros(3, 2)})
    3
    """
    found = _leading(batch)
    if found is None:
        raise InputError(f"no tensor in a batch of type {type(batch).__name__} to count examples by")
    return found


def _leading(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    if dataclasses.is_dataclass(batch):
        values = vars(batch).values()
    return next((size for size in map(_leading, values) if size is not None), None)
