"""One layout with its prediction, the ranked list of them, and the sentence that says why one lost to another."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.planner.layouts.grid import SHARDINGS, Sharding
from batchlab.planner.layouts.memory import PARTS, Array, Memory
from batchlab.planner.layouts.step_time import TIME_PARTS, StepTime
from batchlab.planner.text_table import text_table

SMALL_SHARE = 0.1
AS_LONG = 1e-9
WIDTH = 100
PART_WORDS = {part: part for part in PARTS} | {"optimizer": "optimizer state"}
TIME_WORDS = {
    "compute": "computing",
    "bubble": "pipeline bubble",
    "tensor": "tensor-parallel communication",
    "pipeline": "transfers between stages",
    "data": "data-parallel communication",
    "update": "optimizer step",
}


@dataclass(frozen=True)
class Measured(JsonNoun):
    """A layout that was run. seconds: of one update; None where it ran out of memory. The rest as in `Layout`."""

    tp: int
    pp: int
    micro_batch: int
    seconds: float | None
    checkpointing: bool = False
    sequence_parallel: bool = False
    sharding: Sharding = "optimizer"

    def __post_init__(self) -> None:
        check_count(tp=self.tp, pp=self.pp, micro_batch=self.micro_batch)
        if self.seconds is not None:
            check_positive(seconds=self.seconds)
        if self.sharding not in SHARDINGS:
            raise InputError(f"sharding must be one of {list(SHARDINGS)}, got {self.sharding!r}")


@dataclass(frozen=True)
class Layout(JsonNoun):
    """How a model's training lies on a cluster, and what that is predicted to take.

    dp, tp, pp: data, tensor and pipeline parallel ranks. micro_batch: sequences of one pass on one rank.
    accumulation: such passes in an update. checkpointing: of every layer. sharding: what data parallelism divides:
    "none", "optimizer" (ZeRO-1), "gradients" too (ZeRO-2) or "weights" too (ZeRO-3, FSDP).
    memory: bytes of the fullest device. time: seconds of one update by part, as predicted.
    seconds: of one update, what the ranking goes by: measured, or predicted (times `Layouts.scale`).
    measured: whether it was. mfu: model FLOPs utilisation. tokens_per_second: of the whole cluster.
    reason: why it lost to the first of the list, or why it is the first.
    """

    dp: int
    tp: int
    pp: int
    micro_batch: int
    accumulation: int
    checkpointing: bool
    sequence_parallel: bool
    sharding: Sharding
    memory: Memory
    time: StepTime
    seconds: float
    measured: bool
    mfu: float
    tokens_per_second: float
    reason: str = ""

    @property
    def name(self) -> str:
        """In a few words, such as "dp 32 x tp 2 x pp 1, micro-batch 1, optimizer sharded"."""
        extras = ["checkpointing"] * self.checkpointing + ["sequence parallel"] * self.sequence_parallel
        extras += [] if self.sharding == "none" else [f"{self.sharding} sharded"]
        return ", ".join([f"dp {self.dp} x tp {self.tp} x pp {self.pp}", f"micro-batch {self.micro_batch}", *extras])


@dataclass(frozen=True)
class Layouts(JsonNoun):
    """Layouts from best to worst, the first `keep` of those that fit.

    considered: layouts that divide. fitting: those of them within the memory. budget: bytes of a device.
    scale: what predicted seconds were multiplied by, the median of measured over predicted; 1 without measurements.
    notes: what the ranking rests on, in sentences.
    """

    rows: tuple[Layout, ...]
    considered: int
    fitting: int
    budget: float
    scale: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Layout:
        """The first row."""
        return self.rows[0]

    def table(self) -> str:
        """The rows as text: layout, seconds, MFU, memory, tokens a second; below them why each lost, by its number."""
        wide = len(str(len(self.rows)))
        head = (f"{'#':>{wide}}  layout", "s/update", "MFU", "GB/device", "tokens/s")
        body = [
            (
                f"{place:>{wide}}  {row.name}",
                f"{row.seconds:.4g}{' measured' * row.measured}",
                f"{row.mfu:.1%}",
                f"{row.memory.total / 1e9:.1f}",
                f"{row.tokens_per_second:,.0f}",
            )
            for place, row in enumerate(self.rows, 1)
        ]
        reasons = [
            line
            for place, row in enumerate(self.rows, 1)
            for line in wrap(row.reason, WIDTH, initial_indent=f"{place:>{wide}}  ", subsequent_indent=" " * (wide + 2))
        ]
        return "\n".join([text_table(head, body), "", *reasons])


def as_long(seconds: Array) -> NDArray[np.int64]:
    """Ranks of times from the shortest, equal where they take as long: within 1e-9, for sums round differently."""
    order = np.argsort(seconds, kind="stable")
    steps = np.diff(seconds[order]) > AS_LONG * seconds[order][:-1]
    ranks = np.empty(len(seconds), np.int64)
    ranks[order] = np.concatenate([[0], np.cumsum(steps)])
    return ranks


def why_first(best: Layout, considered: int, fitting: int) -> str:
    """Why the best row is the best, in one sentence."""
    how = "measured" if best.measured else "predicted"
    part = best.memory.largest
    share = getattr(best.memory, part) / best.memory.total
    return (
        f"least {how} time of {fitting:,} layouts that fit, of {considered:,} that divide: {_seconds(best.seconds)} an "
        f"update, {best.memory.total / 1e9:.1f} GB a device, of which {PART_WORDS[part]} {share:.0%}"
    )


def why_lost(row: Layout, best: Layout, scale: float = 1.0) -> str:
    """Why a row comes after the best, in one sentence with the numbers that differ most, predictions times `scale`."""
    gap = row.seconds - best.seconds
    if gap <= AS_LONG * best.seconds:
        more = row.memory.total - best.memory.total
        if abs(more) < 1:
            return "takes as long and holds as much"
        size = f"{abs(more) / 1e9:.2f} GB" if abs(more) >= 1e7 else f"{abs(more) / 1e6:.2g} MB"
        return f"takes as long and needs {size} {'more' if more > 0 else 'less'} a device"
    slower = f"{gap / best.seconds:.1%} slower, {_seconds(row.seconds)} against {_seconds(best.seconds)}"
    if row.measured or best.measured:
        kinds = ["measured" if each.measured else "predicted" for each in (row, best)]
        return f"{slower}, {'both measured' if kinds[0] == kinds[1] else ' against '.join(kinds)}"
    differences = {part: scale * (getattr(row.time, part) - getattr(best.time, part)) for part in TIME_PARTS}
    most = max(abs(value) for value in differences.values())
    told = sorted((p for p in TIME_PARTS if abs(differences[p]) >= SMALL_SHARE * most), key=lambda p: -differences[p])
    parts = ", ".join(f"{TIME_WORDS[part]} {differences[part]:+.3g} s" for part in told if differences[part])
    return f"{slower}: {parts}" if parts else slower


def _seconds(value: float) -> str:
    return f"{value:.4g} s"


def part_words(memory: Memory) -> str:
    """The parts of a memory in gigabytes, largest first."""
    parts = sorted(PARTS, key=lambda part: -getattr(memory, part))
    return ", ".join(f"{part} {getattr(memory, part) / 1e9:.1f}" for part in parts)
