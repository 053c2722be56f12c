"""A budget of seconds that all ranks see alike, and what is reported of it."""

from __future__ import annotations

import time
from collections.abc import Callable

from batchlab.parallel.agree import agree_min

Progress = Callable[[str, float], None]


class Stopwatch:
    """Counts down a budget. Under a process group what is left is the least of the ranks', in one collective a call."""

    def __init__(self, budget: float, progress: Progress | None = None) -> None:
        self.budget, self._progress = budget, progress
        self._started = time.perf_counter()
        self._reported: dict[str, float] = {}

    def left(self, until: float = 1.0) -> float:
        """Seconds until the share `until` of the budget is spent; negative afterwards."""
        return agree_min([until * self.budget - (time.perf_counter() - self._started)])[0]

    def report(self, phase: str, fraction: float) -> None:
        """Tells the caller's `progress`, if there is one, how far a phase is, 0 to 1; it never goes back."""
        if self._progress is not None:
            self._reported[phase] = min(1.0, max(fraction, self._reported.get(phase, 0.0)))
            self._progress(phase, self._reported[phase])
