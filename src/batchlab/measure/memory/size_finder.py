"""Runs a step at the sizes that a search asks for, on all ranks alike, and keeps the record."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist

from batchlab.core.errors import BatchlabError, InputError
from batchlab.measure.memory.compiled import compiled_graphs
from batchlab.measure.memory.device_memory import Meter
from batchlab.measure.memory.lockstep import Lockstep, PeerFailed
from batchlab.measure.memory.out_of_memory import free, let_go
from batchlab.measure.memory.size_search import SizeSearch
from batchlab.parallel.agree import agree_min

FLAT_DOUBLINGS = 2
TIMED_RUNS, TIMED_SECONDS = 3, 0.5
COMPILING_RUNS = 3

FITS, OVER, OUT, FAILED = 1.0, 0.5, 0.0, -1.0


@dataclass(frozen=True)
class Try:
    """One size. phase: what ran out ("data", "forward", "backward", "step" or "evaluation"; a step function may have
    its own), "headroom" where it ran but took more than is allowed, "foreseen" where it was not run because it would
    have; None where the size fits, or ran out on another rank only.

    seconds: of the fastest training step. peak_bytes: taken at most, None where unknown.
    """

    size: int
    fits: bool
    phase: str | None
    seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class MicroBatch:
    """What `find_micro_batch` found. size: in `unit`; it was run. why: what ended the search.

    tries: every size in the order tried, the same sizes on every rank; their seconds and bytes are this rank's.
    """

    size: int
    why: str
    tries: tuple[Try, ...] = field(repr=False)
    unit: str = "example"

    @property
    def steps(self) -> int:
        """The sizes that were run."""
        return sum(each.phase != "foreseen" for each in self.tries)


class Subject(Protocol):
    """What is run at a size. stale: whether it must be made anew first."""

    stale: bool

    @property
    def phase(self) -> str:
        """What it is at, and when an error came."""

    @property
    def fragile(self) -> bool:
        """Whether a size that fails on any rank makes it stale on all."""

    def train(self, size: int) -> None:
        """One training step, whole."""

    def evaluate(self, size: int) -> None:
        """What evaluation does at that size."""

    def wait(self) -> None:
        """Until the device is done."""

    def clear(self) -> None:
        """Drops what a failed step has left."""

    def renew(self) -> None:
        """Makes all that takes part anew, on every rank, after a size that failed on some."""


@dataclass(frozen=True)
class Terms:
    """What holds at every size. allowed: bytes, None without a counter. lock: where steps hold collectives."""

    counter: Meter | None
    allowed: float | None
    saturation: float | None
    is_oom: Callable[[BaseException], bool]
    group: dist.ProcessGroup | None
    lock: Lockstep | None
    unit: str = "example"


@dataclass
class _Went:
    """How one size went here. error: one that is no lack of memory. text: what an error said."""

    state: float = FITS
    phase: str | None = None
    seconds: float = math.inf
    peaks: list[int | None] = field(default_factory=list)
    error: Exception | None = None
    text: str = ""

    @property
    def peak(self) -> int | None:
        """The most bytes of all runs; None where one is unknown."""
        known = [peak for peak in self.peaks if peak is not None]
        return max(known) if known and len(known) == len(self.peaks) else None


class SizeFinder:
    """One search. label: before the text of its error."""

    def __init__(self, search: SizeSearch, subject: Subject, terms: Terms, label: str = "") -> None:
        self.search, self.subject, self.terms, self.label = search, subject, terms, label
        self.tries: list[Try] = []
        self.speeds: list[tuple[float, int]] = []
        self.shares: dict[int, float] = {}
        self.foresight = True
        self.deadline, self.seconds_left, self.last_text = math.inf, math.inf, ""

    def warm_up(self) -> None:
        """The first step of a process loads code and says nothing of speed; an error comes again in the search."""
        went = self._run(self.search.least)
        self.subject.stale = self._agreed([went.state])[0] != FITS and self.subject.fragile

    def run(self, deadline: float = math.inf) -> MicroBatch:
        """Until the search is done, the speed no longer grows, or `time.perf_counter` is past the deadline."""
        self.deadline = deadline
        while (size := self.search.next_size(self._guess())) is not None:
            self._try(size)
            if (fastest := self._saturated()) is not None:
                why = f"{self.terms.unit}s per second grew by less than {self.terms.saturation:.0%} over two doublings"
                return self._found(fastest, why)
            if self.search.ok is not None and self.seconds_left <= 0:
                return self._found(self.search.ok, "the time was up")
        if self.search.ok is None:
            last = self.tries[-1]
            said = f": {self.last_text}" if self.last_text else ""
            where = "on another rank" if last.phase is None else f"in the phase {last.phase!r}"
            least = self.search.least
            fewest = f"1 {self.terms.unit} fits" if least == 1 else f"{least} {self.terms.unit}s fit"
            raise InputError(f"{self.label}not even {fewest} in memory, it ran out {where}{said}")
        return self._found(self.search.ok, self._why())

    def _found(self, size: int, why: str) -> MicroBatch:
        return MicroBatch(size, why, tuple(self.tries), self.terms.unit)

    def _why(self) -> str:
        if self.search.ok == self.search.most:
            return f"{self.search.most} is the largest size allowed"
        failed = next(each for each in reversed(self.tries) if each.size == self.search.err)
        return f"{failed.size} does not fit ({failed.phase or 'on another rank'})"

    def _try(self, size: int) -> None:
        """Runs `size` here, learns how it went on all ranks, and records it."""
        allowed, foreseen = self.terms.allowed, size == self.search.err
        if not foreseen and (expected := self._expected(size)) > 1:
            self.tries.append(Try(size, False, "foreseen", 0.0, round(expected * (allowed or 0))))
            self.search.foresee(size)
            return
        went = self._run(size)
        if went.state == FITS and went.peak is not None and allowed is not None and went.peak > allowed:
            went.state, went.phase = OVER, "headroom"
        self.last_text = went.text
        share = went.peak / allowed if went.peak is not None and allowed else 0.0
        left = self.deadline - time.perf_counter()
        worst, share, seconds, left = self._agreed([went.state, -share, -went.seconds, left])
        if went.error is not None:
            raise went.error
        if worst == FAILED:
            raise BatchlabError(f"another rank failed in a step with {size} {self.terms.unit}s; its own error says why")
        self.seconds_left = left
        self.subject.stale = worst == OUT and self.subject.fragile
        self.tries.append(Try(size, worst == FITS, went.phase, went.seconds, went.peak))
        self.search.record(size, fits=worst == FITS)
        self.foresight = self.foresight and not (foreseen and worst == FITS)
        if worst >= OVER:
            self.shares[size] = -share
        if worst == FITS:
            self.speeds.append((size / max(-seconds, 1e-9), size))

    def _agreed(self, values: list[float]) -> list[float]:
        return agree_min(values, self.terms.group)

    def _run(self, size: int) -> _Went:
        """How the training step and then the evaluation went."""
        went, handled = _Went(), sys.exception()
        try:
            if self.subject.stale:
                self.subject.renew()
            self._train(size, went)
            self._once(self.subject.evaluate, size, went)
            return went
        except Exception as error:
            went.state, went.seconds = OUT, 0.0
            if not isinstance(error, PeerFailed):
                if not self.terms.is_oom(error):
                    went.state, went.error = FAILED, error
                    return went
                went.phase = self.subject.phase
                went.text = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
            let_go(error, handled)
        went.peaks = [None if self.terms.counter is None else self.terms.counter.peak()]
        self.subject.clear()
        free()
        return went

    def _train(self, size: int, went: _Went) -> None:
        """Several times, where speed counts and time allows."""
        total = 0.0
        for _ in range(1 if self.terms.saturation is None else TIMED_RUNS):
            seconds = self._once(self.subject.train, size, went)
            went.seconds, total = min(went.seconds, seconds), total + seconds
            if total > TIMED_SECONDS:
                break

    def _once(self, function: Callable[[int], None], size: int, went: _Went) -> float:
        """Seconds of one run; again where it compiled, for a compiler's time and memory are not the step's."""
        lock, counter = self.terms.lock, self.terms.counter
        for _ in range(COMPILING_RUNS):
            if counter is not None:
                counter.start()
            graphs, started = compiled_graphs(), time.perf_counter()
            if lock is None:
                self._whole(function, size)
            else:
                lock.run(self._whole, function, size)
            seconds, compiled = time.perf_counter() - started, float(compiled_graphs() != graphs)
            if lock is not None:
                seconds, compiled = lock.most(seconds, compiled)
            if not compiled:
                break
        went.peaks.append(None if counter is None else counter.peak())
        return seconds

    def _whole(self, function: Callable[[int], Any], size: int) -> None:
        function(size)
        self.subject.wait()

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
        if line is None or self.terms.saturation is not None:
            return None
        limit = (1 - line[0]) / line[1]
        if self.search.ok is not None and limit < self.search.ok * (1 + self.search.rel_gap):
            return None
        return limit

    def _saturated(self) -> int | None:
        """The fastest size, once the last doublings gained little; None while speed grows."""
        saturation = self.terms.saturation
        if saturation is None or self.search.err is not None or len(self.speeds) <= FLAT_DOUBLINGS:
            return None
        recent = [speed for speed, _ in self.speeds[-FLAT_DOUBLINGS - 1 :]]
        gains = [after / before - 1 for before, after in itertools.pairwise(recent)]
        return max(self.speeds)[1] if all(gain < saturation for gain in gains) else None
