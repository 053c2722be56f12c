"""A data set held in tensors, where a whole batch is one indexing operation."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, stack

from batchlab.core.errors import InputError


class Batch(NamedTuple):
    """Some examples side by side: the first dimension of both counts them."""

    inputs: Tensor
    targets: Tensor


class Examples:
    """A map-style data set over two tensors whose first dimension counts the examples.

    `data[i]` is the pair (input, target) of example i; `data.__getitems__(indices)` is their `Batch`, by one
    indexing operation a tensor. Give `collate` to whoever draws batches: it takes either form.
    notes: what the reader of a report should know of how the data came about, a sentence each.

    >>> import torch
    >>> data = Examples(torch.arange(6).view(3, 2), torch.tensor([7, 8, 9]))
    >>> data[1], data.__getitems__([2, 0]).targets
    ((tensor([2, 3]), tensor(8)), tensor([9, 7]))
    """

    def __init__(self, inputs: Tensor, targets: Tensor, notes: tuple[str, ...] = ()) -> None:
        if len(inputs) != len(targets):
            raise InputError(f"inputs and targets must be equally many, got {len(inputs)} and {len(targets)}")
        self.inputs, self.targets, self.notes = inputs, targets, notes

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        return Batch(self.inputs[indices], self.targets[indices])


def collate(examples: list[Any] | Batch) -> Batch:
    """A list of (input, target) pairs as one `Batch`; a `Batch` as it is."""
    if isinstance(examples, Batch):
        return examples
    inputs, targets = zip(*examples, strict=True)
    return Batch(stack(inputs), stack(targets))
