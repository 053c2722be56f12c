"""A run in stages: context length, batch, learning rate and data, all as functions of the tokens seen.

Falcon2-11B (arXiv 2407.14885) was trained so, at a context of 2048, 4096, 8192 and 8192 on curated data.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from batchlab.core.checks import as_count, check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.schedule.batches.batch_doubling import falcon2_doubling
from batchlab.schedule.batches.scheduled_batch import ScheduledBatch

GIGATOKEN = 10**9


@dataclass(frozen=True)
class Stage:
    """One stage. tokens: how many it trains on. context: tokens of a sequence.

    batch_sequences: sequences of an update, or a schedule of them, asked with the tokens since the stage began, all of
        whose changes must lie in the stage. batch_tokens: the same in tokens. With neither, an update keeps the tokens
        that it had at the end of the stage before, whatever the context: with constant sequences a switch from 2048 to
        8192 would make it four times larger.
    lr: the learning rate, or a function of the tokens since the stage began; None for the rate at the end of the stage
        before. A schedule's `lr_factor` multiplies it. data: a name for what it trains on.
    """

    tokens: int
    context: int
    batch_sequences: int | ScheduledBatch | None = None
    batch_tokens: int | None = None
    lr: float | Callable[[int], float] | None = None
    data: str = ""

    def __post_init__(self) -> None:
        for name in ("tokens", "context"):
            object.__setattr__(self, name, as_count(**{name: getattr(self, name)}))
        if self.batch_sequences is not None and self.batch_tokens is not None:
            raise InputError("batch_sequences and batch_tokens are two batches: give one of them")
        if self.batch_tokens is not None:
            object.__setattr__(self, "batch_tokens", as_count(batch_tokens=self.batch_tokens))
        if isinstance(self.batch_sequences, ScheduledBatch):
            last = self.batch_sequences.changes()[-1][0]
            if last >= self.tokens:
                raise InputError(
                    f"batch_sequences must change within the stage's {self.tokens} tokens, got one at {last}"
                )
        elif self.batch_sequences is not None:
            object.__setattr__(self, "batch_sequences", as_count(batch_sequences=self.batch_sequences))
        if self.lr is not None and not callable(self.lr):
            check_positive(lr=self.lr)


class StagePoint(NamedTuple):
    """What holds for the next update. stage: its index. batch: sequences. lr: None where no stage gave one.

    left: tokens until the stage ends; an update that begins in a stage may end in the next.
    """

    stage: int
    context: int
    batch: int
    batch_tokens: int
    lr: float | None
    data: str
    left: int


class Stages(ScheduledBatch):
    """Stages one after another; a batch schedule counted in tokens, whose sizes are sequences.

    stages: in order. multiple_of: every size must be a multiple of it (micro-batch x ranks).

    `at(seen)` is the next update's sequences and `where(seen)` all that holds for it, both functions of the tokens
    alone: what a checkpoint must hold is the count of tokens. After the last token the last stage goes on. The loop
    asks its data for `data`, `context` and `batch` at each update, and sets the rate.

    >>> plan = Stages([Stage(8000, 4, batch_sequences=10, lr=0.1, data="web"), Stage(4000, 8, data="books")])
    >>> plan.where(7999)
    StagePoint(stage=0, context=4, batch=10, batch_tokens=40, lr=0.1, data='web', left=1)
    >>> plan.where(8000)
    StagePoint(stage=1, context=8, batch=5, batch_tokens=40, lr=0.1, data='books', left=4000)
    """

    def __init__(self, stages: Sequence[Stage], *, multiple_of: int = 1) -> None:
        if not stages:
            raise InputError("stages must hold at least one stage, got none")
        multiple_of, self.stages = as_count(multiple_of=multiple_of), tuple(stages)
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise InputError(f"stages must hold Stages, got {stage!r:.80}")
        self.begins = [0, *accumulate(stage.tokens for stage in stages)]
        self.total = self.begins.pop()
        self._fixed = self._constant_sizes()
        sizes = [size for _, size in self.changes()]
        for size in sizes:
            if size % multiple_of:
                raise InputError(
                    f"a stage's batch must be a multiple of multiple_of {multiple_of}, got {size} sequences"
                )
        super().__init__(sizes[0], sizes=sizes, multiple_of=multiple_of)

    def _constant_sizes(self) -> list[int]:
        """Sequences an update of each stage without a schedule, 0 for one with."""
        found: list[int] = []
        tokens: int | None = None
        for index, stage in enumerate(self.stages):
            if isinstance(stage.batch_sequences, ScheduledBatch):
                found.append(0)
                tokens = stage.batch_sequences.changes()[-1][1] * stage.context
                continue
            if stage.batch_sequences is not None:
                tokens = stage.batch_sequences * stage.context
            tokens = tokens if stage.batch_tokens is None else stage.batch_tokens
            if tokens is None:
                raise InputError("the first stage must have batch_sequences or batch_tokens, got neither")
            if tokens % stage.context:
                raise InputError(f"stage {index} has {tokens} tokens an update, no whole sequences of {stage.context}")
            found.append(tokens // stage.context)
        return found

    def _index(self, seen: int) -> int:
        check_count(0, seen=seen)
        return bisect_right(self.begins, seen) - 1

    def at(self, seen: int) -> int:
        """Sequences of the next update after `seen` tokens."""
        index = self._index(seen)
        schedule = self.stages[index].batch_sequences
        return schedule.at(seen - self.begins[index]) if isinstance(schedule, ScheduledBatch) else self._fixed[index]

    def where(self, seen: int) -> StagePoint:
        """What holds for the next update after `seen` tokens."""
        index, batch = self._index(seen), self.at(seen)
        stage = self.stages[index]
        left = max(self.begins[index] + stage.tokens - seen, 0)
        lr = self._lr(index, seen - self.begins[index], batch)
        return StagePoint(index, stage.context, batch, batch * stage.context, lr, stage.data, left)

    def _lr(self, index: int, inside: int, batch: int) -> float | None:
        stage = self.stages[index]
        lr = stage.lr(inside) if callable(stage.lr) else stage.lr
        if lr is None and index > 0:
            lr = self._lr(index - 1, self.stages[index - 1].tokens, self.at(self.begins[index] - 1))
        schedule = stage.batch_sequences
        return lr * schedule.lr_factor(batch) if lr is not None and isinstance(schedule, ScheduledBatch) else lr

    def changes(self) -> list[tuple[int, int]]:
        """Every (seen, size) at which the sequences of an update become others, the start at 0 among them."""
        found: list[tuple[int, int]] = []
        for begin, stage, size in zip(self.begins, self.stages, self._fixed, strict=True):
            schedule = stage.batch_sequences
            inside = schedule.changes() if isinstance(schedule, ScheduledBatch) else [(0, size)]
            for seen, each in inside:
                if not found or found[-1][1] != each:
                    found.append((begin + seen, each))
        return found

    def _breaks(self) -> list[int]:
        return sorted({*self.begins, *super()._breaks()})

    def _added(self, seen: int, per_batch: int) -> int:
        if per_batch != 1:
            raise InputError(f"per_batch must be left at 1, for the stages know their context, got {per_batch}")
        return self.where(seen).batch_tokens


def falcon2_stages(double_at: Sequence[int], *, warmup_tokens: int, multiple_of: int = 1) -> Stages:
    """Falcon2-11B: 4500, 250, 250 and 500 gigatokens at a context of 2048, 4096, 8192 and 8192 on curated data.

    Linear warm-up to 3.7e-4 and a cosine to 1.89e-5 over the first stage (the model card), then constant; 4.2 to 67.1
    million tokens an update in four doublings (a second-hand reading), then as many at any context (assumed).
    double_at: their tokens; warmup_tokens: neither was published.

    >>> plan = falcon2_stages([10**11, 2 * 10**11, 4 * 10**11, 8 * 10**11], warmup_tokens=4 * 10**9)
    >>> plan.total, plan.where(4600 * 10**9)[:5]
    (5500000000000, (1, 4096, 16384, 67108864, 1.89e-05))
    """
    first = 4500 * GIGATOKEN
    check_count(0, warmup_tokens=warmup_tokens)
    if warmup_tokens >= first:
        raise InputError(f"warmup_tokens must be below the first stage's {first}, got {warmup_tokens}")

    def lr(tokens: int) -> float:
        if tokens < warmup_tokens:
            return 3.7e-4 * tokens / warmup_tokens
        share = (tokens - warmup_tokens) / (first - warmup_tokens)
        return 1.89e-5 + (3.7e-4 - 1.89e-5) * (1 + math.cos(math.pi * share)) / 2

    rest = [Stage(250 * GIGATOKEN, 4096, data="web"), Stage(250 * GIGATOKEN, 8192, data="web")]
    last = Stage(500 * GIGATOKEN, 8192, data="curated")
    doubling = falcon2_doubling(double_at, multiple_of=multiple_of)
    return Stages([Stage(first, 2048, doubling, lr=lr, data="web"), *rest, last], multiple_of=multiple_of)
