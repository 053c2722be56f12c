"""How seldom to measure for the cost to stay small, from the times of a loop's own steps."""

from __future__ import annotations

import math
import time

import torch

SHARE = 0.02
WARM_UP, BLOCK, ROUNDS, MOST = 6, 8, 2, 100


class SelfTimed:
    """Six steps to warm up, then twice a block of 8 steps without measuring and one of 8 with; then `every` is known.

    measures: whether the next step is one to measure, until `settled`. every: measuring one step in so many takes about
    2 % of a loop's time, by the faster block of each kind; at most 100. device: where the work is done; it is waited
    for at the ends of blocks, as else an accelerator's time would count where its results are read. warm_up: steps
    before the first block, where 6 would not show what a step costs later.

    All in the loop counts: data, forward and backward pass, optimizer.

    >>> timed, clock = SelfTimed(torch.device("cpu")), 0.0
    >>> while not timed.settled:
    ...     clock += 1.15 if timed.measures else 1.0
    ...     timed.ended(at=clock)
    >>> timed.every
    8
    """

    def __init__(self, device: torch.device, *, warm_up: int = WARM_UP) -> None:
        self.every, self.settled, self.measures = 1, False, True
        self._device, self._ended, self._began = device, -warm_up, 0.0
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    def ended(self, *, at: float | None = None) -> None:
        """After each step of the loop until it is settled. at: the time in seconds; now if None."""
        self._ended += 1
        block, place = divmod(self._ended, BLOCK)
        if block < 0 or place:
            return
        if self._device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self._device)
        now = time.perf_counter() if at is None else at
        if block:
            self._seconds[self.measures].append((now - self._began) / BLOCK)
        self._began, self.measures = now, block % 2 == 1
        if block == 2 * ROUNDS:
            dear, plain = (min(self._seconds[kind]) for kind in (True, False))
            wanted = math.ceil((dear - plain) / (SHARE * plain)) if plain > 0 else 1
            self.every, self.settled = max(1, min(MOST, wanted)), True
