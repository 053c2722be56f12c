"""From example indices to a batch on a device, by torch's own data set protocol."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import TensorDataset, default_collate

from batchlab.core.errors import InputError
from batchlab.core.job import MapDataset

_UNEQUAL = ("equal size", "default_collate: batch must contain")  # what torch says of examples that are not alike


def fetch(data: MapDataset, indices: list[int], collate: Callable[[list[Any]], Any] | None = None) -> Any:
    """The examples at `indices`, collated: `data.__getitems__` where it exists, else one by one.

    Raises `InputError` where there is no `collate` and the examples are not of one size or kind.

    >>> fetch(TensorDataset(torch.arange(4)), [2, 0])
    [tensor([2, 0])]
    """
    if type(data) is TensorDataset and collate is None:
        where = torch.as_tensor(indices, device="cpu")
        return [tensor[where] for tensor in data.tensors]
    many = getattr(data, "__getitems__", None)
    examples = many(indices) if many is not None else [data[index] for index in indices]
    return _collated(examples) if collate is None else collate(examples)


def _collated(examples: list[Any]) -> Any:
    try:
        return default_collate(examples)
    except (RuntimeError, TypeError) as error:
        if not any(each in str(error) for each in _UNEQUAL):
            raise
        raise InputError(
            f"examples cannot be put together ({error}): give a collate, as the job's or the task's"
        ) from None


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on `device`; containers keep their type."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=device.type != "cpu")  # to the CPU it would be read before it is there
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        return moved if type(batch) is dict else type(batch)(moved)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    if hasattr(batch, "to"):
        return batch.to(device)
    return _dataclass_to(batch, device) if dataclasses.is_dataclass(type(batch)) else batch


def _dataclass_to(batch: Any, device: torch.device) -> Any:
    moved = copy.copy(batch)
    for field in dataclasses.fields(batch):
        object.__setattr__(moved, field.name, to_device(getattr(batch, field.name), device))  # frozen ones too
    return moved
