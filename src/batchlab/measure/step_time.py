"""Seconds of a training step against its micro-batch, each with an interval."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from batchlab.core.device import pick_device
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, MicroBatchTime
from batchlab.core.job import Job
from batchlab.core.jsonio import JsonNoun
from batchlab.core.random import preserved_generators
from batchlab.measure.order import median_interval
from batchlab.measure.training_step import TrainingStep

MOST_REPEATS = 60


@dataclass(frozen=True)
class Throughput(JsonNoun):
    """micro_batches: seconds of loading, forward and backward at each size, ascending. update: of one optimizer step.

    loading: seconds of drawing and collating one example, over all sizes. saturates_at: the smallest size with
    at least 95 % of the best examples per second.
    """

    micro_batches: tuple[MicroBatchTime, ...]
    update: Estimate
    loading: Estimate
    saturates_at: int


def throughput(
    job: Job,
    micro_batches: Sequence[int],
    *,
    seconds: float = 5.0,
    device: str | torch.device | None = None,
    seed: int = 0,
    memory_bytes: Mapping[int, int | None] | None = None,
) -> Throughput:
    """Times real steps of `job` on a fresh model at each of `micro_batches`, in about `seconds`.

    The sizes take turns, so that a disturbance falls on all of them; 60 rounds at most, and the first, which warms
    up, counts only for a size that has no other. A size that could not be run within the time is left out, but for
    the smallest. On a GPU each repeat waits for the device.
    memory_bytes: of sizes, handed on into the result.

    A micro-batch's time includes drawing its examples in this process, as `train` does. Take the step of a plan from
    `Facts.step_time`: it adds the accumulation and the update.
    """
    sizes = sorted(set(micro_batches))
    if not sizes or sizes[0] < 1:
        raise InputError(f"micro_batches must be sizes of at least 1, got {list(micro_batches)!r}")
    if not seconds > 0:
        raise InputError(f"seconds must be > 0, got {seconds!r}")
    where = pick_device(device)
    with preserved_generators():
        times = _measure(TrainingStep(job, device=where, seed=seed), sizes, time.perf_counter() + seconds)
    passes, updates, loads = times
    known = memory_bytes or {}
    points = tuple(
        MicroBatchTime(size, median_interval(repeats, method="wall clock"), known.get(size))
        for size, repeats in passes.items()
    )
    return Throughput(
        points,
        update=median_interval(updates, method="wall clock"),
        loading=median_interval(loads, method="wall clock"),
        saturates_at=saturation(points),
    )


def saturation(points: Sequence[MicroBatchTime], tolerance: float = 0.05) -> int:
    """The smallest size with at least 1 - tolerance of the best examples per second."""
    best = max(point.examples / point.seconds.value for point in points)
    return min(p.examples for p in points if p.examples / p.seconds.value >= (1 - tolerance) * best)


def _measure(
    step: TrainingStep, sizes: Sequence[int], deadline: float
) -> tuple[dict[int, list[float]], list[float], list[float]]:
    """Seconds of passes by size, of updates, and of loading one example."""
    warm: dict[int, float] = {}
    for size in sizes:
        if warm and time.perf_counter() + size / max(warm) * warm[max(warm)] > deadline:
            break
        warm[size] = _timed(step, size)[0]
    passes: dict[int, list[float]] = {size: [] for size in warm}
    updates: list[float] = []
    loads: list[float] = []
    for _ in range(MOST_REPEATS):
        for size in passes:
            if time.perf_counter() + warm[size] > deadline and updates:
                continue
            whole, load, update = _timed(step, size)
            passes[size].append(whole)
            updates.append(update)
            loads.append(load / size)
        if time.perf_counter() > deadline:
            break
    return {size: repeats or [warm[size]] for size, repeats in passes.items()}, updates, loads


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
