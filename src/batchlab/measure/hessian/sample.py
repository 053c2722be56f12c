"""The examples that a curvature is measured on: all of them in batches as given, and random batches of any size."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from batchlab.core.checks import is_count
from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed
from batchlab.measure.batch_rows import check_batches, join, row_count, take_rows
from batchlab.measure.hessian.loss_surface import Loss, LossSurface, Piece

_SIZES = 5
_SMALLEST = 4


class Sample:
    """The examples, over all ranks, in one order: of rank 0, of rank 1, and so on."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Iterable[Any],
        count: Callable[[Any], int] | None,
        group: dist.ProcessGroup | None,
        seed: int,
    ) -> None:
        check_batches(data)
        group = dist.group.WORLD if group is None and dist.is_initialized() else group
        group = None if group is None or dist.get_world_size(group) == 1 else group
        self.surface, self.seed = LossSurface(model, loss, group=group, seed=seed), seed
        self.count, self.batches, self.note = count or row_count, list(data), ""
        self.pieces: list[Piece] = [(batch, self._counted(batch)) for batch in self.batches]
        self.rows = self._row_counts()
        self.start, self.examples = self._over_ranks()
        if not self.examples:
            raise InputError("data must hold at least one batch with at least one example, got none")

    def _over_ranks(self) -> tuple[int, int]:
        """The first of this rank's examples in the order of all, and how many all are. A note of one is one of all."""
        group = self.surface.group
        if group is None:
            return 0, sum(self.rows)
        table = torch.zeros(2, dist.get_world_size(group), dtype=torch.float64, device=self.surface.device)
        rank = dist.get_rank(group)
        table[0, rank], table[1, rank] = sum(self.rows), bool(self.note)
        dist.all_reduce(table, group=group)
        if table[1].any():
            self.note = self.note or "no batches were drawn: another rank's data does not allow it"
        return int(table[0, :rank].sum()), int(table[0].sum())

    def _counted(self, batch: Any) -> int:
        n = self.count(batch)
        if not is_count(n):
            raise InputError(f"count must return a positive integer for each batch, got {n!r}")
        return operator.index(n)

    def _row_counts(self) -> list[int]:
        try:
            rows = [row_count(batch) for batch in self.batches]
            for batch in self.batches:
                take_rows(batch, [0])
        except InputError as error:
            self.note = f"no batches were drawn: {error}"
            return [n for _, n in self.pieces]
        return rows

    def sizes(self, asked: Sequence[int] | None) -> list[int]:
        """The batch sizes to measure, ascending."""
        if asked is None:
            if self.note:
                return []
            default = [self.examples // 4**k for k in range(1, _SIZES + 1)]
            return sorted({size for size in default if size >= _SMALLEST})
        if self.note and asked:
            raise InputError(f"batch_sizes must be () for this data, got {list(asked)!r}: {self.note}")
        for size in asked:
            if not (is_count(size) and size <= self.examples):
                raise InputError(f"batch_sizes must be integers in 1..{self.examples}, the examples, got {size!r}")
        return sorted(set(map(operator.index, asked)))

    def draw(self, size: int, repeat: int) -> list[Piece]:
        """This rank's part of a random batch, in pieces no larger than the largest batch that was given."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "curvature", "batch", size, repeat))
        order = torch.randperm(self.examples, generator=generator, device="cpu")[:size]
        mine = torch.sort(order[(order >= self.start) & (order < self.start + sum(self.rows))] - self.start).values
        return [
            piece for part in torch.split(mine, max(self.rows, default=1)) for piece in self._gathered(part.tolist())
        ]

    def _gathered(self, rows: list[int]) -> list[Piece]:
        parts, first = [], 0
        for batch, n in zip(self.batches, self.rows, strict=True):
            if inside := [row - first for row in rows if first <= row < first + n]:
                parts.append(take_rows(batch, inside))
            first += n
        return [(batch, self._counted(batch)) for batch in join(parts)] if parts else []
