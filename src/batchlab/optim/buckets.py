"""Which tensors a step takes one by one, and which together as lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from batchlab.optim.leaf import Leaf
from batchlab.optim.rule import Numbers


class Takes(Protocol):
    """What is asked of an optimizer: see `RuleOptimizer`."""

    def tensors(self, leaf: Leaf, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """Of a leaf."""

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """Of a leaf."""

    def listed(self, leaf: Leaf, group: dict[str, Any]) -> bool:
        """Whether a leaf goes with others."""

    def at_once(self, leaf: Leaf, group: dict[str, Any]) -> int | None:
        """How many leaves alike to this one go together at most."""


class Bucket(NamedTuple):
    """One leaf and its tensors, or for the form for lists many and a list of each of their tensors."""

    leaves: list[Leaf]
    tensors: Sequence[Any]
    numbers: Numbers
    listed: bool


def buckets(optimizer: Takes, group: dict[str, Any], leaves: list[Leaf]) -> list[Bucket]:
    """Those for lists hold what is alike in device, dtype, layout and numbers."""
    alike: dict[Any, tuple[Numbers, list[Any] | None]] = {}
    lists: dict[Any, list[Any]] = {}
    found: list[Bucket] = []
    for leaf in leaves:
        known = alike.get((leaf.kind, leaf.t))
        if known is None:
            numbers, members = optimizer.numbers(leaf, group), None
            if optimizer.listed(leaf, group):
                kind = (leaf.w.dtype, leaf.w.device, leaf.layout)
                members = lists.setdefault((*kind, *numbers.items()), [numbers])
            known = alike[leaf.kind, leaf.t] = numbers, members
        if known[1] is None:
            found.append(Bucket([leaf], optimizer.tensors(leaf, group), known[0], listed=False))
        else:
            known[1].append(leaf)
    for numbers, *members in lists.values():
        most = optimizer.at_once(members[0], group) or len(members)
        few = [members[start : start + most] for start in range(0, len(members), most)]
        found += [_listed(optimizer, group, each, numbers) for each in few]
    return found


def _listed(optimizer: Takes, group: dict[str, Any], leaves: list[Leaf], numbers: Numbers) -> Bucket:
    columns = zip(*[optimizer.tensors(leaf, group) for leaf in leaves], strict=True)
    return Bucket(leaves, [list(column) for column in columns], numbers, listed=True)
