"""Loss spikes along a run, against the running median and its median absolute deviation.

With m the median of the last w losses and s = median |L - m|, update t is a spike if

    L_t > m + k·1.4826·s    and    L_t > m·(1 + r)

1.4826·s is the standard deviation of Gaussian noise. A mean and deviation would be dragged along by the spike itself.
Spikes, their heights and how often they come at which learning rate are what Falcon2-11B's report (arXiv 2407.14885)
puts down to the rate; the thresholds are batchlab's.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from batchlab.core.checks import check_count, check_not_negative, check_positive
from batchlab.core.errors import InputError

GAUSSIAN = 1.4826  # 1/Φ⁻¹(3/4)
GIGATOKEN = 1e9


@dataclass
class Spike:
    """step: of its first update. height: of its highest loss over the median. updates: above the threshold.

    seen, batch, lr: of its first update, None where the caller did not tell. finite: False where a loss in it was NaN
    or infinite, and then the height is infinite. open: the loss has not come back.
    """

    step: int
    seen: int
    height: float
    updates: int = 1
    batch: int | None = None
    lr: float | None = None
    finite: bool = True
    open: bool = True


class SpikeRate(NamedTuple):
    """Of the updates with low <= learning rate < high = 2·low. seen: by them. per_giga: spikes per 1e9 of that."""

    low: float
    high: float
    spikes: int
    seen: int
    per_giga: float


@dataclass
class LossSpikes:
    """Notes the spikes of a loss that is told update by update.

        spikes = LossSpikes()
        for step, ...:
            if spikes.update(step, loss, seen=tokens, batch=batch, lr=lr):
                ...                              # a spike has begun: skip batches and rewind, cut the rate, or nothing

    window: w, the last losses that count, 100. deviations: k, 6. relative: r, 0.02. fewest: losses before any is
    judged, 20. apart: a loss above the threshold within so many updates of a spike's end belongs to that spike, whose
    tail it is; 10. restart: after so many updates above the threshold it is no spike but a new level, and the window
    begins anew; 100. start: what was seen when it was made. The defaults are batchlab's.

    A spike's own losses stay out of the window. A loss that is not finite is a spike of infinite height. A sudden fall,
    as a doubled batch gives, is none. Give the loss of an update, a mean over its batch, the same on every rank;
    not one that is smoothed. An update costs O(w) to keep the window in order and O(log w) for the median and the
    deviation. Not for losses that may be <= 0 in the mean: the relative threshold then never binds, and k alone judges.

    >>> spikes = LossSpikes(fewest=4)
    >>> [spikes.update(t, loss, seen=t) for t, loss in enumerate([1.0, 1.1, 0.9, 1.0, 5.0, 1.0])]
    [False, False, False, False, True, False]
    >>> spikes.spikes[0].height, spikes.spikes[0].updates, spikes.spikes[0].open
    (4.0, 1, False)
    """

    window: int = 100
    deviations: float = 6.0
    relative: float = 0.02
    fewest: int = 20
    apart: int = 10
    restart: int = 100
    start: int = 0
    spikes: list[Spike] = field(default_factory=list, init=False)
    _recent: deque[float] = field(default_factory=deque, init=False, repr=False)
    _sorted: list[float] = field(default_factory=list, init=False, repr=False)
    _told: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _seen: int = field(default=0, init=False, repr=False)
    _quiet: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        check_count(2, window=self.window, fewest=self.fewest)
        check_count(restart=self.restart)
        check_count(0, apart=self.apart, start=self.start)
        self._seen = self.start
        check_positive(deviations=self.deviations)
        check_not_negative(relative=self.relative)
        if self.fewest > self.window:
            raise InputError(f"fewest must be at most window {self.window}, got {self.fewest}")

    @property
    def threshold(self) -> float | None:
        """Above what the next loss is a spike; None while too few losses are known."""
        if len(self._sorted) < self.fewest:
            return None
        m = median(self._sorted)
        return max(m + self.deviations * GAUSSIAN * deviation(self._sorted, m), m * (1 + self.relative))

    def update(self, step: int, loss: float, *, seen: int, batch: int | None = None, lr: float | None = None) -> bool:
        """Tells one update; True where a spike begins with it.

        seen: examples or tokens so far, this update included. lr: > 0 to be counted in `rates`.
        """
        check_count(0, step=step, seen=seen)
        if seen < self._seen:
            raise InputError(f"seen must not fall, got {seen} after {self._seen}: load the state of the checkpoint")
        step, seen, lr = int(step), int(seen), None if lr is None else float(lr)
        batch = None if batch is None else int(batch)
        if (octave := _octave(lr)) is not None:
            self._told[octave] = self._told.get(octave, 0) + seen - self._seen
        self._seen = seen
        threshold, loss = self.threshold, float(loss)
        finite = math.isfinite(loss)
        if finite and (threshold is None or loss <= threshold):
            self._close()
            self._quiet += 1
            self._keep(loss)
            return False
        height = loss - median(self._sorted) if finite and self._sorted else math.inf
        quiet, self._quiet = self._quiet, 0
        if self.spikes and (self.spikes[-1].open or quiet < self.apart):
            self._go_on(self.spikes[-1], height, finite)
            return False
        self.spikes.append(Spike(step, seen, height, 1, batch, lr, finite))
        return True

    def _go_on(self, spike: Spike, height: float, finite: bool) -> None:
        spike.updates, spike.open = spike.updates + 1, True
        spike.height, spike.finite = max(spike.height, height), spike.finite and finite
        if finite and spike.updates >= self.restart:
            self._close()
            self._recent.clear()
            self._sorted.clear()

    def _close(self) -> None:
        if self.spikes:
            self.spikes[-1].open = False

    def _keep(self, loss: float) -> None:
        if len(self._recent) == self.window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(loss)
        insort(self._sorted, loss)

    def rates(self) -> list[SpikeRate]:
        """Spikes per 1e9 seen (per gigatoken, where tokens are) for each octave of the learning rate that occurred."""
        found = []
        for octave, seen in sorted(self._told.items()):
            count = sum(_octave(spike.lr) == octave for spike in self.spikes)
            per_giga = count / (seen / GIGATOKEN) if seen else math.nan
            found.append(SpikeRate(math.ldexp(1.0, octave), math.ldexp(1.0, octave + 1), count, seen, per_giga))
        return found

    def state_dict(self) -> dict[str, Any]:
        """The window, the spikes and what was seen at each octave of the rate, as plain numbers."""
        return {
            "recent": list(self._recent),
            "spikes": [asdict(spike) for spike in self.spikes],
            "told": [[octave, seen] for octave, seen in self._told.items()],
            "seen": self._seen,
            "quiet": self._quiet,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; of a longer window the last losses."""
        self._recent = deque(state["recent"][-self.window :])
        self._sorted = sorted(self._recent)
        self.spikes = [Spike(**spike) for spike in state["spikes"]]
        self._told = {octave: seen for octave, seen in state["told"]}
        self._seen, self._quiet = state["seen"], state["quiet"]


def _octave(lr: float | None) -> int | None:
    """e of 2^e <= lr < 2^(e + 1); None where there is no such rate."""
    return math.frexp(lr)[1] - 1 if lr is not None and 0 < lr < math.inf else None


def median(values: Sequence[float]) -> float:
    """Of a sorted sequence."""
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def deviation(values: Sequence[float], m: float) -> float:
    """The median of |v - m| of a sorted sequence with its median m, without sorting the distances.

    The distances left of m and right of it are two sorted sequences; the k-th of both together is found by bisection.

    >>> deviation([1.0, 2.0, 4.0, 8.0, 9.0], 4.0)
    3.0
    """
    split = bisect_left(values, m)

    def smallest(k: int) -> float:
        """The distance with k smaller or equal ones before it."""
        low, high = max(0, k + 1 - (len(values) - split)), min(k + 1, split)
        while low < high:
            left = (low + high) // 2
            if m - values[split - 1 - left] < values[split + k - left] - m:
                low = left + 1
            else:
                high = left
        right = k + 1 - low
        from_left = m - values[split - low] if low else -math.inf
        from_right = values[split + right - 1] - m if right else -math.inf
        return max(from_left, from_right)

    half = len(values) // 2
    return smallest(half) if len(values) % 2 else (smallest(half - 1) + smallest(half)) / 2
