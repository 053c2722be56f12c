"""The largest micro-batch that fits, found by running real steps; every size returned was run.

The search is that of OOMptimizer (Żelasko et al. 2024, arXiv 2409.13523) with its traps closed, and told by the
memory that earlier sizes took where that is known, so that running out is mostly foreseen.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from batchlab.core.device import pick_device
from batchlab.core.errors import BatchlabError, InputError
from batchlab.core.job import Job
from batchlab.core.random import preserved_generators
from batchlab.measure.device_memory import Meter, meter
from batchlab.measure.out_of_memory import free, is_out_of_memory, let_go
from batchlab.measure.size_search import GROWTH, SizeSearch
from batchlab.measure.training_step import TrainingStep
from batchlab.parallel.agree import agree_min

HEADROOM = {"cuda": 0.1, "cpu": 0.5}
SATURATION = {"cuda": None, "cpu": 0.05}
START = {"cuda": 32, "cpu": 1}
FLAT_DOUBLINGS = 2
TIMED_RUNS, TIMED_SECONDS = 3, 0.5

_FITS, _OVER, _OUT, _FAILED = 1.0, 0.5, 0.0, -1.0


@dataclass(frozen=True)
class Try:
    """One size. phase: what ran out ("data", "forward", "backward", "step"), "headroom" where the step ran but took
    more than is allowed, "foreseen" where it was not run because it would have; None where the size fits.

    seconds: of the fastest run. peak_bytes: taken at most, None where unknown.
    """

    size: int
    fits: bool
    phase: str | None
    seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class MicroBatch:
    """What `find_micro_batch` found. size: examples; it was run. why: what ended the search.

    tries: every size in the order tried, the same sizes on every rank; their seconds and bytes are this rank's.
    """

    size: int
    why: str
    tries: tuple[Try, ...] = field(repr=False)

    @property
    def steps(self) -> int:
        """The sizes that were run."""
        return sum(each.phase != "foreseen" for each in self.tries)


def find_micro_batch(
    job_or_step: Job | Callable[[int], None],
    *,
    max_size: int | None = None,
    start: int | None = None,
    rel_gap: float = 0.05,
    headroom: float | None = None,
    saturation: float | None = None,
    is_oom: Callable[[BaseException], bool] = is_out_of_memory,
    group: dist.ProcessGroup | None = None,
    device: str | torch.device | None = None,
    seconds: float = float("inf"),
    seed: int = 0,
    memory: Meter | None = None,
) -> MicroBatch:
    """The largest micro-batch to use, within `rel_gap` of the largest that fits. It was run.

    job_or_step: a job, whose forward, backward and optimizer step are run on a fresh model; or a function of the
    size that does one step of the caller's own and raises where memory runs out (its attribute `phase`, where it has
    one, is recorded). A step must hold no collective: ranks run it alone and agree on every size afterwards.
    max_size: the largest to try; a job's is the number of its training examples. start: the first size.
    rel_gap: 0 finds the exact limit. headroom: share of the memory available at the start that is left free, so that
    it still fits when fragments have gathered; 0.1 on a GPU, and 0.5 on a CPU, which others use too.
    saturation: ends the search where two doublings in a row each raise examples per second by less than this share,
    at the fastest size; 0 for never, the default but for a job on a CPU, where it is 0.05.
    is_oom: which errors mean that memory ran out; any other passes through unchanged.
    group: ranks that must agree; the default group where one is initialised. seconds: no new size after so long.
    memory: counts bytes; by default the device's own count for a job, and none for a function.

    Nothing of the caller's is changed: neither models nor random generators nor what the allocator caches.
    Raises `InputError` if not even one example fits.
    """
    where = pick_device(device)
    is_job = isinstance(job_or_step, Job)
    if headroom is not None and not 0 <= headroom < 1:
        raise InputError(f"headroom must lie in [0, 1), got {headroom!r}")
    if max_size is None and not is_job:
        raise InputError("max_size must be given for a step function: nothing else bounds the search")
    saturation = (SATURATION.get(where.type) if saturation is None and is_job else saturation) or None
    spared = HEADROOM.get(where.type, 0.1) if headroom is None else headroom
    search = SizeSearch(
        start=start or (START.get(where.type, 32) if is_job else 32),
        most=len(job_or_step.train) if max_size is None and isinstance(job_or_step, Job) else max_size,  # type: ignore[arg-type]
        rel_gap=rel_gap,
        growth=GROWTH if saturation is None else 2,
    )
    free(where)
    counter = memory or (meter(where) if is_job else None)
    finder = _Finder(search, counter, spared, saturation, is_oom, group, seconds)
    try:
        with preserved_generators():
            if isinstance(job_or_step, Job):
                return finder.run(_own_step(job_or_step, where, seed, group, is_oom))
            return finder.run(job_or_step)
    finally:
        free(where)


def _own_step(
    job: Job, device: torch.device, seed: int, group: dist.ProcessGroup | None, is_oom: Callable[[BaseException], bool]
) -> TrainingStep:
    """A step on a fresh model; it holds what the weights' average, and DDP's buckets under a group, will take."""
    step, state, other = None, _FITS, None
    try:
        step = TrainingStep(job, device=device, seed=seed, copies=2 if _together(group) else 1)
    except Exception as error:
        if is_oom(error):
            state = _OUT
            let_go(error)
        else:
            state, other = _FAILED, error
    worst = agree_min([state], group)[0]
    if other is not None:
        raise other
    if worst == _FAILED:
        raise BatchlabError("another rank failed while it made the model; its own error says why")
    if step is None or worst == _OUT:
        raise InputError("the model with its gradients and optimizer state does not fit in memory")
    return step


def _together(group: dist.ProcessGroup | None) -> bool:
    return group is not None or (dist.is_initialized() and dist.get_world_size() > 1)


class _Finder:
    """Runs a step at the sizes that the search asks for, and keeps the record."""

    def __init__(
        self,
        search: SizeSearch,
        counter: Meter | None,
        headroom: float,
        saturation: float | None,
        is_oom: Callable[[BaseException], bool],
        group: dist.ProcessGroup | None,
        seconds: float,
    ) -> None:
        self.search, self.counter, self.saturation, self.is_oom = search, counter, saturation, is_oom
        self.allowed = None if counter is None else (1 - headroom) * counter.usable
        self.group, self.seconds, self.deadline = group, seconds, float("inf")
        self.tries: list[Try] = []
        self.speeds: list[tuple[float, int]] = []
        self.shares: dict[int, float] = {}
        self.foresight = True
        self.seconds_left, self.last_text = float("inf"), ""

    def run(self, step: Callable[[int], None]) -> MicroBatch:
        """Until the search is done, the speed no longer grows, or time is out."""
        if isinstance(step, TrainingStep) and self.saturation is not None:
            _, _, _, other = self._run(step, 1)  # the first step of a process loads code and says nothing of speed
            step.clear()
            del other
        self.deadline = time.perf_counter() + self.seconds
        while (size := self.search.next_size(self._guess())) is not None:
            self._try(step, size)
            if (fastest := self._saturated()) is not None:
                why = f"examples per second grew by less than {self.saturation:.0%} over two doublings"
                return MicroBatch(fastest, why, tuple(self.tries))
            if self.search.ok is not None and self.seconds_left <= 0:
                return MicroBatch(self.search.ok, "the time was up", tuple(self.tries))
        if self.search.ok is None:
            last = self.tries[-1]
            said = f": {self.last_text}" if self.last_text else ""
            raise InputError(f"not even 1 example fits in memory, it ran out in the phase {last.phase!r}{said}")
        return MicroBatch(self.search.ok, self._why(), tuple(self.tries))

    def _why(self) -> str:
        if self.search.ok == self.search.most:
            return f"{self.search.most} is the largest size allowed"
        failed = next(each for each in reversed(self.tries) if each.size == self.search.err)
        return f"{failed.size} does not fit ({failed.phase or 'on another rank'})"

    def _try(self, step: Callable[[int], None], size: int) -> None:
        """Runs `size` here, learns how it went on all ranks, and records it."""
        foreseen = size == self.search.err
        if not foreseen and (expected := self._expected(size)) > 1:
            self.tries.append(Try(size, False, "foreseen", 0.0, round(expected * (self.allowed or 0))))
            self.search.foresee(size)
            return
        state, phase, seconds, other = self._run(step, size)
        peak = None if self.counter is None else self.counter.peak()
        if state == _FITS and peak is not None and self.allowed is not None and peak > self.allowed:
            state, phase, self.last_text = _OVER, "headroom", ""
        share = peak / self.allowed if peak is not None and self.allowed else 0.0
        left = self.deadline - time.perf_counter()
        worst, most_share, slowest, self.seconds_left = agree_min([state, -share, -seconds, left], self.group)
        if other is not None:
            raise other
        if worst == _FAILED:
            raise BatchlabError(f"another rank failed in a step with {size} examples; its own error says why")
        fits = worst == _FITS
        self.tries.append(Try(size, fits, phase, seconds, peak))
        self.search.record(size, fits=fits)
        self.foresight = self.foresight and not (foreseen and fits)
        if worst >= _OVER:
            self.shares[size] = -most_share
        if fits:
            self.speeds.append((size / -slowest, size))

    def _run(self, step: Callable[[int], None], size: int) -> tuple[float, str | None, float, Exception | None]:
        """(how it went, the phase that ran out, seconds of the fastest run, an error that is no lack of memory)."""
        if self.counter is not None:
            self.counter.start()
        best, total = float("inf"), 0.0
        try:
            for _ in range(1 if self.saturation is None else TIMED_RUNS):
                started = time.perf_counter()
                step(size)
                _wait(step)
                best = min(best, time.perf_counter() - started)
                total += time.perf_counter() - started
                if total > TIMED_SECONDS:
                    break
            return _FITS, None, best, None
        except Exception as error:
            if not self.is_oom(error):
                return _FAILED, None, 0.0, error
            phase = str(getattr(step, "phase", "step"))
            self.last_text = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
            let_go(error)
        _clear(step)
        free()
        return _OUT, phase, 0.0, None

    def _line(self) -> tuple[float, float] | None:
        """share = fixed + slope·size through the two largest sizes that were run whole, of the fullest rank's share.

        Through 0 and the one size that was run: what is fixed is taken as none, so that the line leads too low at
        most. None where memory is not known or does not grow with size, or where this foresaw wrongly before.
        """
        points = sorted((size, share) for size, share in self.shares.items() if share > 0)[-2:]
        if not points or not self.foresight:
            return None
        (a, share_a), (b, share_b) = points if len(points) == 2 else [(0, 0.0), *points]
        slope = (share_b - share_a) / (b - a)
        return (share_b - slope * b, slope) if slope > 0 else None

    def _expected(self, size: int) -> float:
        """The share of what is allowed that `size` is expected to take; 0 where two sizes do not tell."""
        line = self._line() if len(self.shares) > 1 else None
        return 0.0 if line is None else line[0] + line[1] * size

    def _guess(self) -> float | None:
        """The largest size expected to fit; with a saturation the search doubles, to see how speed grows."""
        line = self._line()
        if line is None or self.saturation is not None:
            return None
        limit = (1 - line[0]) / line[1]
        if self.search.ok is not None and limit < self.search.ok * (1 + self.search.rel_gap):
            return None
        return limit

    def _saturated(self) -> int | None:
        """The fastest size, once the last doublings gained little; None while speed grows."""
        if self.saturation is None or self.search.err is not None or len(self.speeds) <= FLAT_DOUBLINGS:
            return None
        recent = [speed for speed, _ in self.speeds[-FLAT_DOUBLINGS - 1 :]]
        gains = [after / before - 1 for before, after in itertools.pairwise(recent)]
        return max(self.speeds)[1] if all(gain < self.saturation for gain in gains) else None


def _wait(step: Callable[[int], None]) -> None:
    if isinstance(step, TrainingStep):
        step.wait()


def _clear(step: Callable[[int], None]) -> None:
    if isinstance(step, TrainingStep):
        step.clear()
