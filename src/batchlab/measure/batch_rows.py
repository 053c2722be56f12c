"""Examples out of batches: how many a batch holds, some of them, several joined. Tensors in any containers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from batchlab.core.errors import InputError


def check_batches(data: Any) -> None:
    """Refuses what is no collection of batches: above all a single batch, whose parts would be taken for batches.

    >>> check_batches((torch.zeros(8, 3), torch.zeros(8)))
    Traceback (most recent call last):
    batchlab.core.errors.InputError: data must be a list of batches or a DataLoader, got one batch: give [batch]
    """
    one = isinstance(data, (Tensor, Mapping)) or (
        isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data) and len(data) > 0
    )
    if one:
        raise InputError("data must be a list of batches or a DataLoader, got one batch: give [batch]")
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise InputError(f"data must be a list of batches or a DataLoader, got {type(data).__name__}")


def row_count(batch: Any) -> int:
    """The first dimension that all tensors of the batch share.

    >>> row_count({"x": torch.zeros(3, 2), "y": torch.zeros(3)})
    3
    """
    shapes = [tuple(tensor.shape) for tensor in _tensors(batch)]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) != 1:
        raise InputError(
            "all tensors of a batch must have the examples as their first dimension, or `count` must be given, "
            f"got shapes {shapes!r:.120}"
        )
    return shapes[0][0]


def take_rows(batch: Any, rows: Sequence[int]) -> Any:
    """The examples at `rows`, in that order: a batch of the same form."""
    row_count(batch)
    return _mapped(lambda tensor: tensor[torch.as_tensor(rows, device=tensor.device)], batch)


def join(pieces: Sequence[Any]) -> list[Any]:
    """The pieces as one batch, if they differ in their examples only; else as they are."""
    alone = any(tensor.ndim == 0 for piece in pieces for tensor in _tensors(piece))
    if alone or len({_form(piece) for piece in pieces}) != 1:
        return list(pieces)
    columns = iter(list(zip(*map(_tensors, pieces), strict=True)))
    return [_mapped(lambda _: torch.cat(next(columns)), pieces[0])]


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from _tensors(part)


def _mapped(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with every tensor changed; containers keep their type, plain values stay, all else is refused."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        changed = {key: _mapped(change, part) for key, part in batch.items()}
        return changed if type(batch) is dict else type(batch)(changed)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_mapped(change, part) for part in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_mapped(change, part) for part in batch)
    if batch is None or isinstance(batch, (bool, int, float)):
        return batch
    raise InputError(f"examples cannot be drawn out of a batch that holds a {type(batch).__name__}")


def _form(batch: Any) -> str:
    """Equal for batches that can be joined: containers, plain values, and tensors but for their first dimension."""
    if isinstance(batch, Tensor):
        return f"{batch.dtype}{tuple(batch.shape[1:])}{batch.device}"
    if isinstance(batch, Mapping):
        return f"{type(batch)}{[(key, _form(part)) for key, part in batch.items()]}"
    if isinstance(batch, (list, tuple)):
        return f"{type(batch)}{[_form(part) for part in batch]}"
    return repr(batch)
