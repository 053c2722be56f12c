"""A good learning rate by short runs: around a start until the best is enclosed, then a parabola through the three."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from batchlab.core.errors import InputError

RATIO, MOST_WIDENINGS = 2.0, 6


@dataclass(frozen=True)
class Trial:
    """One short run: its learning rate and the loss it ended with; infinite or NaN where it diverged."""

    learning_rate: float
    loss: float


@dataclass(frozen=True)
class Choice:
    """The learning rate chosen among short runs. at_edge: it is the least or largest of those tried. why: how."""

    learning_rate: float
    trials: tuple[Trial, ...]
    at_edge: bool
    why: str


def choose(
    run: Callable[[float], float],
    start: float,
    *,
    ratio: float = RATIO,
    most: int = 3 + MOST_WIDENINGS,
    may_go_on: Callable[[], bool] = lambda: True,
) -> Choice:
    """Short runs at start·ratio^k, widened until the best has a worse one on each side; a parabola through the three.

    run: trains equally many examples at a learning rate and returns the loss; not finite where it diverged.
    start: the middle of the first three. most: the most runs; fewer where `may_go_on()`, asked before each but the
    first, says no.

    The parabola is in the logarithm of the rate, and of the loss where all three are positive; its vertex lies
    within half a ratio of the best. Where the runs end before the best is enclosed, it is taken and `at_edge` set.
    Raises `InputError` if every run diverged.
    """
    if most < 1:
        raise InputError(f"most must be at least 1, got {most!r}")
    if not (0 < start < math.inf and ratio > 1):
        raise InputError(f"start must be > 0 and ratio > 1, got start={start!r}, ratio={ratio!r}")
    losses: dict[int, float] = {}
    for _ in range(most):
        wanted = _next_exponent(losses)
        if wanted is None or (losses and not may_go_on()):
            break
        losses[wanted] = run(start * ratio**wanted)
    trials = tuple(Trial(start * ratio**k, loss) for k, loss in sorted(losses.items()))
    finite = {k: loss for k, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        tried = ", ".join(f"{trial.learning_rate:.3g}" for trial in trials)
        raise InputError(f"the loss is not finite at any learning rate that was tried: {tried}")
    best = min(finite, key=finite.__getitem__)
    if best - 1 in losses and best + 1 in losses:
        shift = _vertex(losses[best - 1], losses[best], losses[best + 1])
        why = f"least loss of {len(trials)} short runs, by a parabola in log rate"
        return Choice(start * ratio ** (best + shift), trials, False, why)
    return Choice(start * ratio**best, trials, True, f"least loss of {len(trials)} short runs, at the edge of them")


def _next_exponent(losses: dict[int, float]) -> int | None:
    """0, then whatever the best still lacks on either side; None when it is enclosed."""
    finite = {k: loss for k, loss in losses.items() if math.isfinite(loss)}
    if not losses:
        return 0
    best = min(finite, key=finite.__getitem__) if finite else min(losses)
    missing = [k for k in (best - 1, best + 1) if k not in losses]
    return missing[0] if missing else None


def _vertex(left: float, middle: float, right: float) -> float:
    """Where the parabola through (-1, left), (0, middle), (1, right) is least, middle being the least of the three."""
    if not (math.isfinite(left) and math.isfinite(right)):
        return 0.0
    if middle > 0:
        left, middle, right = math.log(left), math.log(middle), math.log(right)
    bend = left - 2 * middle + right
    return 0.5 * (left - right) / bend if bend > 0 else 0.0
