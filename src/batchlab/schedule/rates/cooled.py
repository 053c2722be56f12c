"""The cool-down that ends a schedule: its shapes, and schedules whose end is settled beforehand or in mid-run.

Shapes f(x) of the share x of the cool-down that is done, from 1 to 0: 1 - x; (1 + cos πx)/2; 1 - √x (Hägele et al.
2024, arXiv 2405.18392, who find it the best of theirs); (e^(1 - x) - 1)/(e - 1), the exponential one of IBM's
lm-engine, which reaches 0. With a floor r each becomes r + (1 - r)·f. "geometric" is r^x, MiniCPM's 0.5^((s - S)/T)
(Hu et al. 2024, arXiv 2404.06395): it falls by equal factors and never reaches 0.
"""

from __future__ import annotations

import math
import operator
from typing import Any, Literal, get_args

import torch

from batchlab.core.checks import check_count, check_not_negative, holds
from batchlab.core.errors import InputError
from batchlab.schedule.rates.counted import Counted, taken

Shape = Literal["linear", "cosine", "1-sqrt", "exponential", "geometric"]


def cool_down(progress: float, shape: Shape = "1-sqrt", floor: float = 0.0) -> float:
    """The share of the rate before it, after `progress` in [0, 1] of the cool-down; from 1 on `floor` is held.

    >>> [cool_down(0.25, shape, 0.01) for shape in ("linear", "1-sqrt")], round(cool_down(0.5, "geometric", 0.01), 6)
    ([0.7525, 0.505], 0.1)
    """
    check_shape(shape, floor)
    check_not_negative(progress=progress)
    if progress >= 1:
        return floor
    if shape == "geometric":
        return float(floor**progress)
    return floor + (1 - floor) * _falls(progress, shape)


def _falls(x: float, shape: Shape) -> float:
    if shape == "linear":
        return 1 - x
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * x))
    if shape == "1-sqrt":
        return 1 - math.sqrt(x)
    return math.expm1(1 - x) / math.expm1(1)


def check_shape(shape: str, floor: float) -> None:
    """A shape that exists, and a floor in [0, 1) that it can reach."""
    if shape not in get_args(Shape):
        raise InputError(f"shape must be one of {list(get_args(Shape))}, got {shape!r}")
    if not holds(lambda value: 0 <= value < 1, floor):
        raise InputError(f"floor must lie in [0, 1), got {floor!r}")
    if shape == "geometric" and floor == 0:
        raise InputError('floor must be > 0 for shape "geometric", which never reaches 0, got 0')


def check_span(warmup: float, total: float | None, decay: float | None) -> None:
    """A warm-up, and a cool-down of `decay` that ends at `total`, that do not overlap."""
    if not holds(lambda value: 0 <= value < math.inf, warmup):
        raise InputError(f"warmup must be finite and >= 0, got {warmup!r}")
    if (total is None) != (decay is None):
        missing = "total" if total is None else "decay"
        raise InputError(f"total and decay go together, got total={total!r}, decay={decay!r}: {missing} is missing")
    if total is not None and not holds(lambda value: 0 < value <= total - warmup, decay):
        raise InputError(
            f"decay must be > 0 and at most total - warmup, {total!r} - {warmup!r}, got {decay!r}: "
            "the cool-down would begin in the warm-up"
        )


class Cooled(Counted):
    """A schedule with a warm-up from 0 and a cool-down that is planned, or decided by `start_decay` in mid-run.

    warmup, total, decay: in the units of `seen`; total and decay, the cool-down's length, both or neither.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        batch: int,
        warmup: int,
        total: int | None,
        decay: int | None,
        shape: Shape,
        floor: float,
    ) -> None:
        check_count(0, warmup=warmup)
        for name, value in (("total", total), ("decay", decay)):
            if value is not None:
                check_count(**{name: value})
        check_span(warmup, total, decay)
        check_shape(shape, floor)
        self.warmup = warmup
        self.shape: Shape = shape
        self.floor = floor
        self._planned = None if total is None or decay is None else (total, decay)
        self._decided: tuple[int, int] | None = None
        super().__init__(optimizer, batch=batch)

    @property
    def total(self) -> int | None:
        """Where the cool-down ends; None while none is settled."""
        settled = self._decided or self._planned
        return None if settled is None else settled[0]

    @property
    def decay(self) -> int | None:
        """The length of the cool-down; None while none is settled."""
        settled = self._decided or self._planned
        return None if settled is None else settled[1]

    @property
    def ends(self) -> int | None:
        """As `total`."""
        return self.total

    @property
    def decaying(self) -> bool:
        """Whether the next update lies within the cool-down, beyond its very beginning, or after it."""
        return self.total is not None and self.decay is not None and self._seen > self.total - self.decay

    def start_decay(self, over: int) -> None:
        """The cool-down begins with the next update and takes `over` units; a plan that has not begun is dropped.

        Refused in the warm-up and once one has begun: to cool down again from the stable phase, load a state of it.
        """
        check_count(over=over)
        if self._seen < self.warmup:
            raise InputError(f"start_decay must wait for the end of the warm-up at {self.warmup}, got {self._seen}")
        if self.decaying:
            raise InputError(f"start_decay must come before any cool-down, got one that ends at {self.total}")
        self._decided = (self._seen + operator.index(over), operator.index(over))

    def state_dict(self) -> dict[str, Any]:
        """As `Counted`'s, with the end and the length of a cool-down that `start_decay` decided, or None."""
        return {**super().state_dict(), "decided": None if self._decided is None else list(self._decided)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Counted`'s; a planned cool-down is the constructor's."""
        decided = taken(state_dict, "decided")
        if decided is not None and not holds(lambda pair: len(pair) == 2 and 1 <= pair[1] <= pair[0], decided):
            raise InputError(f"decided must be the end and the length of a cool-down or None, got {decided!r}")
        before, self._decided = self._decided, None if decided is None else (int(decided[0]), int(decided[1]))
        try:
            super().load_state_dict(state_dict)  # which writes the rates
        except InputError:
            self._decided = before
            raise
