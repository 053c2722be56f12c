"""The largest micro-batch that fits, found by running real steps; every size returned was run.

The search is that of OOMptimizer (Żelasko et al. 2024, arXiv 2409.13523) with its traps closed, and told by the
memory that earlier sizes took where that is known, so that running out is mostly foreseen.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypedDict, Unpack, overload

import torch
import torch.distributed as dist

from batchlab.core.device import pick_device
from batchlab.core.errors import BatchlabError, InputError
from batchlab.core.job import Job
from batchlab.core.model import least_examples
from batchlab.core.random import preserved_generators
from batchlab.measure.memory.buckets import Bucket, MicroBatchTable, ascending, within
from batchlab.measure.memory.compiled import every_size_compiled
from batchlab.measure.memory.device_memory import Meter, meter
from batchlab.measure.memory.lockstep import Lockstep, PeerFailed
from batchlab.measure.memory.out_of_memory import free, is_out_of_memory, let_go
from batchlab.measure.memory.size_finder import FAILED, FITS, OUT, SizeFinder, Terms
from batchlab.measure.memory.size_finder import MicroBatch as MicroBatch
from batchlab.measure.memory.size_finder import Try as Try
from batchlab.measure.memory.size_search import GROWTH, LEAP, SizeSearch
from batchlab.measure.memory.subjects import FunctionSubject, JobSubject
from batchlab.parallel.agree import agree_min

HEADROOM = {"cuda": 0.1, "cpu": 0.5}
SATURATION = {"cuda": None, "cpu": 0.05}
START = {"cuda": 32, "cpu": 2}
EXAMPLE = "example"


class _Settings(TypedDict, total=False):
    make_batch: Callable[..., Any] | None
    max_size: int | None
    start: int | None
    rel_gap: float
    headroom: float | None
    saturation: float | None
    evaluation: bool
    unit: str
    collective: bool | None
    renew: Callable[[], None] | None
    is_oom: Callable[[BaseException], bool]
    group: dist.ProcessGroup | None
    device: str | torch.device | None
    seconds: float
    seed: int
    memory: Meter | None


@overload
def find_micro_batch(
    job_or_step: Job | Callable[[int], None], *, buckets: None = None, **settings: Unpack[_Settings]
) -> MicroBatch: ...
@overload
def find_micro_batch(
    job_or_step: Job | Callable[[int, Any], None], *, buckets: Sequence[Bucket], **settings: Unpack[_Settings]
) -> MicroBatchTable: ...
def find_micro_batch(
    job_or_step: Job | Callable[..., None],
    *,
    buckets: Sequence[Bucket] | None = None,
    make_batch: Callable[..., Any] | None = None,
    max_size: int | None = None,
    start: int | None = None,
    rel_gap: float = 0.05,
    headroom: float | None = None,
    saturation: float | None = None,
    evaluation: bool = True,
    unit: str = EXAMPLE,
    collective: bool | None = None,
    renew: Callable[[], None] | None = None,
    is_oom: Callable[[BaseException], bool] = is_out_of_memory,
    group: dist.ProcessGroup | None = None,
    device: str | torch.device | None = None,
    seconds: float = float("inf"),
    seed: int = 0,
    memory: Meter | None = None,
) -> MicroBatch | MicroBatchTable:
    """The largest micro-batch to use, within `rel_gap` of the largest that fits, or one for each bucket. It was run.

    job_or_step: a job, whose forward, backward and optimizer step and then evaluation are run on a fresh model, with
    gradients and optimizer state in place; or a function of the size that does one step of the caller's own and
    raises where memory runs out (its attribute `phase`, where it has one, is recorded).
    buckets: greatest lengths, or pairs of them (input, output). The answer is then a `MicroBatchTable`; a function is
    called as `step(size, bucket)`, and a job needs `make_batch`. The longest is searched first, and the next one starts
    at twice its size (Żelasko et al. 2024).
    make_batch: `make_batch(size)`, or `make_batch(size, bucket)`, makes the batch for the job's loss and metric, in
    place of its data. The size may then count anything that makes a batch larger, as the length of its sequences.
    unit: what a size counts, in the record and in messages.
    max_size: the largest to try; a job's is the number of its training examples. start: the first size.
    rel_gap: 0 finds the exact limit. headroom: share of the memory available at the start that is left free, so that
    it still fits when fragments have gathered; 0.1 on a GPU, and 0.5 on a CPU, which others use too.
    saturation: ends the search where two doublings in a row each raise examples per second by less than this share,
    at the fastest size; 0 for never, the default but for a job on a CPU, where it is 0.05.
    evaluation: whether a size must also do for the job's loss and metrics on as many validation examples.
    is_oom: which errors mean that memory ran out; any other passes through unchanged.
    group: ranks that must agree; the default group where one is initialised. seconds: no new size after so long.
    memory: counts bytes; by default the device's own count for a job, and none for a function.

    collective: whether a step holds collectives over `group`, as under DDP or FSDP. For a job that is seen by its
    model; a function's must be said, and else it must hold none: ranks then run it alone and agree afterwards. With
    collectives, a rank that runs out in mid-step stops the others at their next one, and a job's model is made again,
    for DDP and FSDP cannot go on from there. Each collective then waits for a vote of the ranks on the host, which no
    training step does. Do not use it for pipelines: their ranks do not issue the same collectives.
    renew: of a function, called on every rank before the next size where one did not fit on some rank: makes models and
    optimizers again that a broken-off step has left unusable.

    Code under `torch.compile` is compiled for every size; a run in which that happened is not measured but repeated.
    Nothing of the caller's is changed: neither models nor random generators nor what the allocator caches.
    Raises `InputError` if not even one example fits, or two where a job's model normalises over the batch
    (`core.model.least_examples`): fewer are not tried.

    >>> def step(size, length=1):
    ...     if size * length > 1000:
    ...         raise MemoryError
    >>> find_micro_batch(step, max_size=4096, rel_gap=0)
    MicroBatch(size=1000, why='1001 does not fit (step)', unit='example')
    >>> find_micro_batch(step, buckets=[10, 40], max_size=4096, rel_gap=0).sizes
    (100, 25)
    """
    job = job_or_step if isinstance(job_or_step, Job) else None
    table = None if buckets is None else ascending(buckets)
    where = pick_device(device)
    _check(job, table, make_batch, max_size, headroom, saturation, seconds, unit, renew)
    saturation = (SATURATION.get(where.type) if saturation is None and job else saturation) or None
    search = SizeSearch(
        start=start if start is not None else START.get(where.type, 32) if job else 32,
        most=len(job.train) if max_size is None and job else max_size,  # type: ignore[arg-type]
        rel_gap=rel_gap,
        growth=GROWTH if saturation is None else 2,
        leap=LEAP if saturation is None else 1,
    )
    free(where)
    counter = memory or (meter(where) if job else None)
    spared = HEADROOM.get(where.type, 0.1) if headroom is None else headroom
    allowed = None if counter is None else (1 - spared) * counter.usable
    locked = _together(group) and (job is not None if collective is None else collective)
    try:
        with preserved_generators():
            lock = Lockstep(group) if locked else None
            terms = Terms(counter, allowed, saturation, is_oom, group, lock, unit)
            subject: FunctionSubject | JobSubject
            if not isinstance(job_or_step, Job):
                subject = FunctionSubject(job_or_step, renew, lock)
            else:
                make = partial(JobSubject, job_or_step, device=where, seed=seed, lock=lock, grouped=_together(group))
                subject = _made(partial(make, make_batch=make_batch, evaluation=evaluation), terms)
                if unit == EXAMPLE:
                    search.raise_least(least_examples(subject.step.model))
                if collective is None and not subject.communicates:
                    terms = replace(terms, lock=None)
            return _search(subject, search, terms, table, seconds)
    finally:
        free(where)


def _check(
    job: Job | None,
    table: tuple[Bucket, ...] | None,
    make_batch: Callable[..., Any] | None,
    max_size: int | None,
    headroom: float | None,
    saturation: float | None,
    seconds: float,
    unit: str,
    renew: Callable[[], None] | None,
) -> None:
    """`InputError` for what is no value, or does not go together."""
    if headroom is not None and not 0 <= headroom < 1:
        raise InputError(f"headroom must lie in [0, 1), got {headroom!r}")
    for name, value in (("saturation", saturation), ("seconds", seconds)):
        if value is not None and not value >= 0:
            raise InputError(f"{name} must be >= 0, got {value!r}")
    if max_size is None and job is None:
        raise InputError("max_size must be given for a step function: nothing else bounds the search")
    if max_size is None and unit != EXAMPLE:
        raise InputError(f"max_size must be given in {unit}s: the job's data bounds examples alone")
    if job is not None and table is not None and make_batch is None:
        raise InputError("make_batch must be given with the buckets of a job: make_batch(size, bucket) makes a batch")
    if job is None and make_batch is not None:
        raise InputError("make_batch is for a job: a step function makes its own batch of the size")
    if job is not None and renew is not None:
        raise InputError("renew is for a step function: a job's model is made anew by its own factory")


def _together(group: dist.ProcessGroup | None) -> bool:
    return group is not None or (dist.is_initialized() and dist.get_world_size() > 1)


def _made(make: Callable[[], JobSubject], terms: Terms) -> JobSubject:
    """The job's step on a fresh model, made on all ranks; `InputError` on all where it does not fit on one."""
    subject, went, other, handled = None, FITS, None, sys.exception()
    try:
        subject = make()
    except Exception as error:
        if isinstance(error, PeerFailed) or terms.is_oom(error):
            went = OUT
            let_go(error, handled)
        else:
            went, other = FAILED, error
    worst = agree_min([went], terms.group)[0]
    if other is not None:
        raise other
    if worst == FAILED:
        raise BatchlabError("another rank failed while it made the model; its own error says why")
    if subject is None or worst == OUT:
        raise InputError("the model with its gradients and optimizer state does not fit in memory")
    return subject


def _search(
    subject: FunctionSubject | JobSubject,
    search: SizeSearch,
    terms: Terms,
    table: tuple[Bucket, ...] | None,
    seconds: float,
) -> MicroBatch | MicroBatchTable:
    """One search, or one a bucket, in `seconds` after the first step."""
    if table is not None:
        subject.at(table[-1])
    with every_size_compiled():
        if isinstance(subject, JobSubject) and terms.saturation is not None:
            SizeFinder(search, subject, terms).warm_up()
        deadline = time.perf_counter() + seconds
        if table is None:
            return SizeFinder(search, subject, terms).run(deadline)
        return _every_bucket(subject, search, terms, table, deadline)


def _every_bucket(
    subject: FunctionSubject | JobSubject,
    search: SizeSearch,
    terms: Terms,
    table: tuple[Bucket, ...],
    deadline: float,
) -> MicroBatchTable:
    """Longest first. A shorter bucket should fit what a longer one does, which is tried where twice that fails."""
    found: dict[Bucket, MicroBatch] = {}
    for bucket in reversed(table):
        if found:
            longer = [each.size for other, each in found.items() if within(bucket, other)]
            search = SizeSearch(
                start=2 * list(found.values())[-1].size,
                most=search.most,
                rel_gap=search.rel_gap,
                growth=2,
                leap=1,
                expected=max(longer, default=None),
                least=search.least,
            )
        subject.at(bucket)
        found[bucket] = SizeFinder(search, subject, terms, label=f"bucket {bucket}: ").run(deadline)
    return MicroBatchTable(table, tuple(found[bucket] for bucket in table))
