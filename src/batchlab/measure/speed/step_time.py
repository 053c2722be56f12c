"""Seconds of a training step against its micro-batch, each with an interval; what it spends them on, and its bound."""

from __future__ import annotations

import math
import operator
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from batchlab.core.checks import holds, is_count
from batchlab.core.device import pick_device
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, MicroBatchTime
from batchlab.core.job import Job
from batchlab.core.jsonio import JsonNoun
from batchlab.core.random import preserved_generators
from batchlab.measure.memory.out_of_memory import free, is_out_of_memory, let_go
from batchlab.measure.order import median_interval
from batchlab.measure.speed.communication import communication_seconds
from batchlab.measure.speed.step_time_law import TOLERANCE, StepTimeLaw, bottleneck, fit_step_time, saturation_interval
from batchlab.measure.speed.step_time_law import saturation as saturation
from batchlab.measure.training_step import TrainingStep
from batchlab.parallel.agree import agree_min

MOST_REPEATS = 60


@dataclass(frozen=True)
class StepShares(JsonNoun):
    """One micro-batch size as a whole step: loading, forward, backward, update, and communication where measured.

    seconds: of the step. units_per_second: examples or tokens, as the job counts them, on this rank. loading, update,
    communication: their shares of the step, 0 to 1; communication is None in one process or where it was not asked
    for. overhead: the share of the fixed time t₀, the update's in it but not the communication's; NaN for one size.
    bottleneck: see `bottleneck`.
    """

    examples: int
    seconds: Estimate
    units_per_second: Estimate
    loading: float
    update: float
    communication: float | None
    overhead: float
    bottleneck: str


@dataclass(frozen=True)
class Throughput(JsonNoun):
    """micro_batches: seconds of loading, forward and backward at each size, ascending. update: of one optimizer step.

    loading: seconds of drawing and collating one example, over all sizes. saturates_at: the smallest size with
    at least 95 % of the best examples per second, by those times. saturation: the same by whole steps, with an
    interval. steps: each size as a whole step with its update, what its time goes to, and its bottleneck. law:
    t₀ + t₁·b fitted to the whole steps. out_of_memory_at: the size that did not fit, None if all did. unit,
    units_per_example: what the job counts in, the mean over the largest batch where it varies.
    """

    micro_batches: tuple[MicroBatchTime, ...]
    update: Estimate
    loading: Estimate
    saturates_at: int
    saturation: Estimate | None = None
    steps: tuple[StepShares, ...] = ()
    law: StepTimeLaw | None = None
    out_of_memory_at: int | None = None
    unit: str = "example"
    units_per_example: float = 1.0


def throughput(
    job: Job,
    micro_batches: Sequence[int],
    *,
    seconds: float = 5.0,
    device: str | torch.device | None = None,
    seed: int = 0,
    memory_bytes: Mapping[int, int | None] | None = None,
    out_of_memory_at: int | None = None,
    communication: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Throughput:
    """Times real steps of `job` on a fresh model at each of `micro_batches`, in about `seconds`.

    The sizes take turns, so that a disturbance falls on all of them; 60 rounds at most, and the first, which warms
    up, counts only for a size that has no other. A size that could not be run within the time is left out, but for
    the smallest. On a GPU each repeat waits for the device. A size that runs out of memory ends the ascent; the
    smallest must fit.
    memory_bytes: of sizes, handed on into the result. out_of_memory_at: a size that is known not to fit.
    communication: measure too what averaging gradients over the ranks of `process_group` adds to a step under DDP, in
    20 more rounds beyond `seconds`; every rank must then call alike. Without a group of two or more it stays None.

    A micro-batch's time includes drawing its examples in this process, as `train` does: workers that load ahead hide
    that, and then `loading` is what they hide. Take the step of a plan from `Facts.step_time`: it adds the accumulation
    and the update. Compare sizes by units per second only as far as their loss per unit is alike.
    """
    given = list(micro_batches) if isinstance(micro_batches, Iterable) else []
    if not given or not all(map(is_count, given)):
        raise InputError(f"micro_batches must be a sequence of integers of at least 1, got {micro_batches!r:.80}")
    if not holds(lambda budget: budget > 0, seconds):
        raise InputError(f"seconds must be > 0, got {seconds!r}")
    sizes = sorted(set(map(operator.index, given)))
    if out_of_memory_at is not None and out_of_memory_at <= sizes[-1]:
        raise InputError(f"out_of_memory_at must be larger than every micro-batch to time, got {out_of_memory_at!r}")
    where = pick_device(device)
    with preserved_generators():
        step = TrainingStep(job, device=where, seed=seed)
        times = _measure(step, sizes, time.perf_counter() + seconds)
        world = dist.get_world_size(process_group) if dist.is_initialized() else 1
        added: dict[int, Estimate] = {}
        if communication and world > 1:
            run_by_all = int(agree_min([len(times.passes)], process_group)[0])
            added = communication_seconds(step, sizes[:run_by_all], group=process_group)
        units = _units_per_example(step, max(times.passes))
    return _summary(job, times, units, memory_bytes or {}, times.out_of_memory_at or out_of_memory_at, added)


@dataclass
class _Times:
    """Seconds of each repeat by size: of loading, forward and backward; of loading alone; of the update; of all."""

    passes: dict[int, list[float]] = field(default_factory=dict)
    loads: dict[int, list[float]] = field(default_factory=dict)
    updates: dict[int, list[float]] = field(default_factory=dict)
    warm_only: set[int] = field(default_factory=set)
    out_of_memory_at: int | None = None

    def add(self, size: int, whole: float, load: float, update: float) -> None:
        for column, value in ((self.passes, whole), (self.loads, load), (self.updates, update)):
            column.setdefault(size, []).append(value)

    def steps(self, size: int) -> list[float]:
        """Seconds of whole steps."""
        return [whole + update for whole, update in zip(self.passes[size], self.updates[size], strict=True)]


def _summary(
    job: Job,
    times: _Times,
    units: float,
    memory: Mapping[int, int | None],
    out_of_memory_at: int | None,
    communication: Mapping[int, Estimate],
) -> Throughput:
    points = tuple(
        MicroBatchTime(size, median_interval(repeats, method="wall clock"), memory.get(size))
        for size, repeats in times.passes.items()
    )
    whole = {size: median_interval(times.steps(size), method="wall clock") for size in times.passes}
    stepped = [MicroBatchTime(size, seconds) for size, seconds in whole.items()]
    law = fit_step_time(stepped)
    tight = None if out_of_memory_at is None else _still_gaining(whole)
    timed = [size for size in times.passes if size not in times.warm_only]
    updates = [value for size in timed for value in times.updates[size]]
    loads = [value / size for size in timed for value in times.loads[size]]
    return Throughput(
        points,
        update=median_interval(updates, method="wall clock"),
        loading=median_interval(loads, method="wall clock"),
        saturates_at=saturation(points),
        saturation=saturation_interval(stepped),
        steps=tuple(
            _shares(size, times, seconds, law, units, communication.get(size), memory=size == tight)
            for size, seconds in whole.items()
        ),
        law=law,
        out_of_memory_at=out_of_memory_at,
        unit=job.unit,
        units_per_example=units,
    )


def _still_gaining(whole: Mapping[int, Estimate]) -> int | None:
    """The largest size, if it works through more examples a second than the one before it by over 5 %."""
    if len(whole) < 2:
        return None
    before, last = sorted(whole)[-2:]
    gain = (last / whole[last].value) / (before / whole[before].value)
    return last if gain > 1 + TOLERANCE else None


def _shares(
    size: int,
    times: _Times,
    seconds: Estimate,
    law: StepTimeLaw,
    units: float,
    added: Estimate | None,
    *,
    memory: bool,
) -> StepShares:
    whole = seconds if added is None else _sum(seconds, added)
    predicted = law.seconds(size) + (0.0 if added is None else added.value)
    overhead = law.fixed.value / predicted
    loading = statistics.median(times.loads[size]) / whole.value
    communication = None if added is None else added.value / whole.value
    return StepShares(
        size,
        whole,
        _rate(size * units, whole),
        loading,
        statistics.median(times.updates[size]) / whole.value,
        communication,
        overhead,
        bottleneck(overhead=overhead, communication=communication, loading=loading, memory=memory),
    )


def _sum(a: Estimate, b: Estimate) -> Estimate:
    """Ends added to ends: at least as wide as it need be."""
    coverage = min(a.coverage, b.coverage)
    return Estimate(a.value + b.value, a.low + b.low, a.high + b.high, f"{a.method}; {b.method}", coverage)


def _rate(units: float, seconds: Estimate) -> Estimate:
    high = units / seconds.low if seconds.low > 0 else math.inf
    return Estimate(units / seconds.value, units / seconds.high, high, seconds.method, seconds.coverage)


def _units_per_example(step: TrainingStep, size: int) -> float:
    per_example = step.job.units_per_example
    return int(per_example(step.batch(size))) / size if callable(per_example) else float(per_example)


def _measure(step: TrainingStep, sizes: Sequence[int], deadline: float) -> _Times:
    """Repeats of each size in turn, after one that warms it up."""
    warm, timed = _Times(), _Times()
    for size in sizes:
        known = max(warm.passes, default=None)
        if known is not None and time.perf_counter() + size / known * warm.passes[known][0] > deadline:
            break
        if not _fits(step, size, warm):
            timed.out_of_memory_at = size
            break
    for _ in range(MOST_REPEATS):
        for size in warm.passes:
            if time.perf_counter() + warm.passes[size][0] > deadline and timed.updates:
                continue
            timed.add(size, *_timed(step, size))
        if time.perf_counter() > deadline:
            break
    timed.warm_only = set(warm.passes) - set(timed.passes)
    for ours, first in ((timed.passes, warm.passes), (timed.loads, warm.loads), (timed.updates, warm.updates)):
        kept = {size: ours.get(size, first[size]) for size in first}
        ours.clear()
        ours.update(kept)
    return timed


def _fits(step: TrainingStep, size: int, warm: _Times) -> bool:
    """Warms a size up; False where it ran out of memory though a smaller one did not."""
    handled = sys.exception()
    try:
        warm.add(size, *_timed(step, size))
        return True
    except Exception as error:
        if not warm.passes or not is_out_of_memory(error):
            raise
        let_go(error, handled)
    step.clear()
    free(step.device)
    return False


def _timed(step: TrainingStep, size: int) -> tuple[float, float, float]:
    """Seconds of loading, forward and backward together; of loading alone; of the update."""
    step.wait()
    started = time.perf_counter()
    step.batch(size)
    loaded = time.perf_counter()
    step.forward_backward(size)
    step.wait()
    computed = time.perf_counter()
    step.step()
    step.wait()
    return computed - loaded, loaded - started, time.perf_counter() - computed
