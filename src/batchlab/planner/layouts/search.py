"""`layout`: every way to lay a model's training on a cluster, those that fit ranked by predicted or measured time.

The search is exhaustive: all products dp·tp·pp of the devices, all micro-batches, with and without checkpointing and
sequence parallelism, four degrees of sharding. What it is exact for is the model of `memory` and `step_time`; how well
that agrees with published measurements is said there. Hagemann et al. 2023 (arXiv 2311.05610) found micro-batch 1 with
the least model parallelism and no checkpointing best in most of their settings. That is not built in: small models and
short sequences get larger ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_count, holds
from batchlab.core.errors import InputError
from batchlab.planner.hardware import Cluster
from batchlab.planner.layouts.activations import Block
from batchlab.planner.layouts.grid import SHARDINGS, Grid, Limits, Sharding, grid
from batchlab.planner.layouts.memory import PARTS, Array, Costing, Memory, Precision, memory, precision_named
from batchlab.planner.layouts.notes import check_sequences, notes, peak_notes, size_notes
from batchlab.planner.layouts.rows import (
    PART_WORDS,
    Layout,
    Layouts,
    Measured,
    as_long,
    part_words,
    why_first,
    why_lost,
)
from batchlab.planner.layouts.shape import ModelShape
from batchlab.planner.layouts.step_time import TIME_PARTS, Efficiency, StepTime, mfu, step_time

RESERVE_BYTES = 2 * 2**30
MULTIPLES = (*range(2, 17), 32, 64, 128, 256)


def layout(
    model: ModelShape,
    cluster: Cluster,
    *,
    global_batch: int,
    sequence_length: int,
    precision: str | Precision = "bf16",
    block: Block | None = None,
    efficiency: Efficiency | None = None,
    measured: Sequence[Measured] = (),
    tensor_parallel: int | Collection[int] | None = None,
    pipeline_parallel: int | Collection[int] | None = None,
    micro_batch: int | Collection[int] | None = None,
    checkpointing: bool | Collection[bool] | None = None,
    sequence_parallel: bool | Collection[bool] | None = None,
    sharding: Sharding | Collection[Sharding] | None = None,
    uneven_stages: bool = False,
    loss_parallel: bool = False,
    reserve_bytes: float = RESERVE_BYTES,
    keep: int = 20,
) -> Layouts:
    """The layouts of a model's training that fit a cluster, fastest first, of equally fast ones the smallest.

    model: its shape. global_batch: sequences of one update, over all devices. sequence_length: tokens of each, at
    most as many as the model has learned positions.
    precision: "bf16", "bf16-float32-gradients", "autocast", "float32", or a `Precision`; those named are Adam's. Time
    is reckoned from the device's bfloat16 peak: for float32 give an `efficiency` whose `matmul` is a share of that.
    block: what a layer keeps and moves; `Block.of(model)` if None. efficiency: `Efficiency()` if None.
    measured: layouts that were run. Their seconds stand in place of predictions, those that ran out of memory are left
    out, and predictions of the others are multiplied by the median of measured over predicted.
    tensor_parallel, pipeline_parallel, micro_batch, checkpointing, sequence_parallel, sharding: the value or values to
    try; all that divide where None. uneven_stages: also p that do not divide the layers. loss_parallel: each
    tensor-parallel rank computes the loss of its own share of the vocabulary, so that logits are never whole.
    reserve_bytes: kept free on each device; 2 GiB for context, collectives' buffers and fragmentation, an assumption.
    keep: rows to hand back.

    Raises `InputError` where sizes do not divide, naming which, and where nothing fits, with the least memory, the
    part that binds and the nearest number of devices that would do.
    Not for mixtures of experts, context parallelism, interleaved or zero-bubble pipelines, or offloading.

    >>> from batchlab.planner.hardware import hardware
    >>> llama_13b = ModelShape(layers=40, hidden=5120, heads=40, mlp=13824, vocabulary=128_000)
    >>> cluster = Cluster(64, hardware()["A100-80"])
    >>> layout(llama_13b, cluster, global_batch=2048, sequence_length=2048).best.name
    'dp 64 x tp 1 x pp 1, micro-batch 1, optimizer sharded'
    """
    check_count(global_batch=global_batch, sequence_length=sequence_length, keep=keep)
    if not holds(lambda number: 0 <= number < math.inf, reserve_bytes):
        raise InputError(f"reserve_bytes must be finite and >= 0, got {reserve_bytes!r}")
    _check_kinds(model, cluster, block, efficiency, measured)
    check_sequences(model, int(global_batch), int(sequence_length))
    numbers = precision_named(precision)
    block = block or Block.of(model, bytes_each=numbers.activation)
    problem = _Problem(
        model,
        cluster,
        Costing(int(sequence_length), block, numbers, loss_parallel),
        efficiency,
        int(global_batch),
        Limits.of(
            tp=tensor_parallel,
            pp=pipeline_parallel,
            micro_batch=micro_batch,
            checkpointing=checkpointing,
            sequence_parallel=sequence_parallel,
            sharding=sharding,
            uneven_stages=uneven_stages,
        ),
        reserve_bytes,
    )
    return _search(problem, measured, keep)


def _check_kinds(model: object, cluster: object, block: object, efficiency: object, measured: object) -> None:
    if not isinstance(model, ModelShape) or not isinstance(cluster, Cluster):
        raise InputError(f"model must be a ModelShape and cluster a Cluster, got {model!r} and {cluster!r}")
    if not isinstance(block, Block | None):
        raise InputError(f"block must be a Block, such as Block.of(model), or None, got {block!r}")
    if not isinstance(efficiency, Efficiency | None):
        raise InputError(f"efficiency must be an Efficiency, such as Efficiency(matmul=0.5), got {efficiency!r}")
    if not isinstance(measured, Iterable):
        raise InputError(f"measured must hold Measured rows, got {measured!r}")


class _Problem(NamedTuple):
    model: ModelShape
    cluster: Cluster
    costing: Costing
    efficiency: Efficiency | None
    global_batch: int
    limits: Limits
    reserve: float

    @property
    def budget(self) -> float:
        return self.cluster.device.memory_bytes

    def on(self, devices: int) -> _Problem:
        return self._replace(cluster=replace(self.cluster, devices=devices))

    def grid(self) -> Grid:
        return grid(
            self.model,
            self.cluster,
            global_batch=self.global_batch,
            sequence_length=self.costing.sequence_length,
            limits=self.limits,
        )


class _Costs(NamedTuple):
    """Of each layout of a grid: bytes by part, seconds by part, seconds in all, and whether these were measured."""

    parts: dict[str, Array]
    times: dict[str, Array]
    seconds: Array
    measured: NDArray[np.bool_]


def _search(problem: _Problem, measured: Sequence[Measured], keep: int) -> Layouts:
    every = problem.grid()
    parts = memory(problem.model, every, problem.costing)
    total = _total(parts) + problem.reserve
    run, failed = _match(every, measured)
    fits = ((total <= problem.budget) | np.isfinite(run)) & ~failed
    if not fits.any():
        raise InputError(_nothing_fits(problem, every, parts, failed))
    chosen, actual = every.take(fits), run[fits]
    times = step_time(problem.model, chosen, problem.costing, problem.cluster, problem.efficiency or Efficiency())
    predicted, known = _total(times), np.isfinite(actual)
    scale = float(np.exp(np.median(np.log(actual[known] / predicted[known])))) if known.any() else 1.0
    seconds = np.where(known, actual, predicted * scale)
    costs = _Costs({name: part[fits] for name, part in parts.items()}, times, seconds, known)
    best_first = np.lexsort((*(-column for column in reversed(chosen[:3])), np.round(total[fits]), as_long(seconds)))
    rows = [_row(problem, chosen, costs, int(index)) for index in best_first[:keep]]
    return _ranked(rows, len(total), len(seconds), problem.budget, scale, _notes(problem, costs, failed, scale))


def _total(parts: dict[str, Array]) -> Array:
    return np.asarray(np.sum(list(parts.values()), axis=0), np.float64)


def _match(every: Grid, measured: Sequence[Measured]) -> tuple[Array, NDArray[np.bool_]]:
    """Seconds measured of each layout, NaN where none were, and whether it ran out of memory; of two runs, the last.

    With one data-parallel rank nothing is sharded, whatever the measurement says.
    """
    run, failed = np.full(len(every.dp), np.nan), np.zeros(len(every.dp), bool)
    for row in measured:
        if not isinstance(row, Measured):
            raise InputError(f"measured must hold Measured rows, got {row!r}")
        same = (every.tp == row.tp) & (every.pp == row.pp) & (every.micro_batch == row.micro_batch)
        same &= (every.checkpointing == row.checkpointing) & (every.sequence_parallel == row.sequence_parallel)
        same &= (every.sharding == SHARDINGS.index(row.sharding)) | (every.dp == 1)
        if not same.any():
            raise InputError(f"measured must hold layouts that divide and are among those to try, got {row!r}")
        run[same], failed[same] = (math.nan, True) if row.seconds is None else (row.seconds, False)
    return run, failed


def _row(problem: _Problem, chosen: Grid, costs: _Costs, index: int) -> Layout:
    tokens, seconds = problem.global_batch * problem.costing.sequence_length, float(costs.seconds[index])
    row = _named(chosen, index, _memory(problem, costs.parts, index))
    return replace(
        row,
        time=StepTime(**{part: float(costs.times[part][index]) for part in TIME_PARTS}),
        seconds=seconds,
        measured=bool(costs.measured[index]),
        mfu=mfu(
            problem.model,
            tokens=tokens,
            sequence_length=problem.costing.sequence_length,
            seconds=seconds,
            devices=problem.cluster.devices,
            peak_flops=problem.cluster.device.peak_flops,
        ),
        tokens_per_second=tokens / seconds,
    )


def _named(layouts: Grid, index: int, memory: Memory) -> Layout:
    """A row with its memory and no time yet."""
    return Layout(
        dp=int(layouts.dp[index]),
        tp=int(layouts.tp[index]),
        pp=int(layouts.pp[index]),
        micro_batch=int(layouts.micro_batch[index]),
        accumulation=int(layouts.accumulation[index]),
        checkpointing=bool(layouts.checkpointing[index]),
        sequence_parallel=bool(layouts.sequence_parallel[index]),
        sharding=SHARDINGS[int(layouts.sharding[index])],
        memory=memory,
        time=StepTime(*[0.0] * len(TIME_PARTS)),
        seconds=math.inf,
        measured=False,
        mfu=0.0,
        tokens_per_second=0.0,
    )


def _memory(problem: _Problem, parts: dict[str, Array], index: int) -> Memory:
    return Memory(**{part: float(parts[part][index]) for part in PARTS}, reserve=float(problem.reserve))


def _ranked(
    rows: list[Layout], considered: int, fitting: int, budget: float, scale: float, notes: tuple[str, ...]
) -> Layouts:
    best = rows[0]
    reasons = [why_first(best, considered, fitting), *(why_lost(row, best, scale) for row in rows[1:])]
    told = tuple(replace(row, reason=reason) for row, reason in zip(rows, reasons, strict=True))
    return Layouts(told, considered, fitting, budget, scale, notes)


def _notes(problem: _Problem, costs: _Costs, failed: NDArray[np.bool_], scale: float) -> tuple[str, ...]:
    measured, costing = int(costs.measured.sum()), problem.costing
    told = [*notes(reserve=problem.reserve, measured=measured, failed=int(failed.sum()), scale=scale)]
    if problem.efficiency is None and not measured:
        told += peak_notes(problem.cluster.device, costing)
    told += size_notes(problem.model, global_batch=problem.global_batch, sequence_length=costing.sequence_length)
    return tuple(told)


def _nothing_fits(problem: _Problem, every: Grid, parts: dict[str, Array], failed: NDArray[np.bool_]) -> str:
    """What the smallest layout needs, which part binds, and where it would fit."""
    total = np.where(failed, np.inf, _total(parts) + problem.reserve)
    least = int(np.argmin(total))
    if not np.isfinite(total[least]):
        return "measured must leave a layout to rank: every one that was to be tried ran out of memory"
    smallest = _memory(problem, parts, least)
    return (
        f"no layout fits {problem.cluster.devices} x {problem.budget / 1e9:.1f} GB: the least is "
        f"{smallest.total / 1e9:.1f} GB a device, {_named(every, least, smallest).name} ({part_words(smallest)}, "
        f"reserve {smallest.reserve / 1e9:.1f}), bound by {PART_WORDS[smallest.largest]}; {_nearest(problem)}"
    )


def _nearest(problem: _Problem) -> str:
    """The least multiple of the devices on which some layout fits, in words."""
    whole = problem.cluster.device.devices_per_node
    for multiple in MULTIPLES:
        devices = problem.cluster.devices * multiple
        if devices > whole and devices % whole:
            continue
        larger = problem.on(devices)
        try:
            every = larger.grid()
        except InputError:
            continue
        fits = _total(memory(larger.model, every, larger.costing)) + larger.reserve <= larger.budget
        if fits.any():
            return f"{devices} devices would do, {devices - problem.cluster.devices} more"
    return f"nor does any fit {MULTIPLES[-1]} times as many devices: shorten sequences, or shrink the batch or model"
