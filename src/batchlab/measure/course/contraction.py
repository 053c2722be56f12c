"""The largest learning rate at which an update still contracts, by bisection; not what a range test stops at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun

STEPS, TOLERANCE, BLOW_UP = 3000, 1e-5, 1e6
_ARRIVED = 1e-9


@dataclass(frozen=True)
class ContractionLimit(JsonNoun):
    """The limit lies between `stable`, the largest rate seen to contract, and `unstable`, the least seen not to.

    learning_rate: their geometric mean. runs: how many fixed-rate runs were made.
    """

    learning_rate: float
    stable: float
    unstable: float
    runs: int


def max_stable_lr(
    update_factory: Callable[[float], Callable[[], float]],
    *,
    low: float,
    high: float,
    steps: int = STEPS,
    tolerance: float = TOLERANCE,
    blow_up: float = BLOW_UP,
) -> ContractionLimit:
    """Bisects, in the logarithm, between a stable `low` and an unstable `high` until they are `tolerance` apart.

    update_factory: starts afresh at a rate and returns a function that does one update at that fixed rate and returns
    the distance from the solution, or another size that goes to 0 with it. A run diverges if that passes `blow_up`
    times its first value, is not finite, or does not decay: if it is as large in the last quarter of `steps` as in
    the quarter before. At 3,000 steps a rate 1e-5 beyond the limit of a quadratic is told from one as far below it.

    For updates without noise (the whole batch, or one batch again and again): a floor of noise counts as no decay.
    The stable rates must be an interval from 0 on. Gradient descent with momentum μ on a quadratic of top curvature λ
    has the limit 2(1 + μ)/λ.

    >>> def gradient_descent(rate, curvature=4.0):
    ...     x = [1.0]
    ...     def update():
    ...         x[0] -= rate * curvature * x[0]
    ...         return abs(x[0])
    ...     return update
    >>> round(max_stable_lr(gradient_descent, low=0.01, high=10.0).learning_rate, 4)
    0.5
    """
    if not 0 < low < high < math.inf:
        raise InputError(f"low and high must satisfy 0 < low < high, got low={low!r}, high={high!r}")
    check_count(8, steps=steps)
    if not tolerance > 0:
        raise InputError(f"tolerance must be > 0, got {tolerance!r}")
    if not blow_up > 1:
        raise InputError(f"blow_up must be > 1, got {blow_up!r}")
    if not _contracts(update_factory(low), steps, blow_up):
        raise InputError(f"low must be a stable learning rate, but the update does not contract at {low!r}")
    if _contracts(update_factory(high), steps, blow_up):
        raise InputError(f"high must be an unstable learning rate, but the update contracts at {high!r}")
    runs = 2
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        if not low < middle < high:
            break
        runs += 1
        if _contracts(update_factory(middle), steps, blow_up):
            low = middle
        else:
            high = middle
    return ContractionLimit(math.sqrt(low * high), low, high, runs)


def _contracts(update: Callable[[], float], steps: int, blow_up: float) -> bool:
    first, before, after = update(), 0.0, 0.0
    if not math.isfinite(first):
        return False
    for t in range(1, steps):
        size = update()
        if not size <= blow_up * max(first, math.ulp(0.0)):
            return False
        if t >= 3 * steps // 4:
            after = max(after, size)
        elif t >= steps // 2:
            before = max(before, size)
    return after < before or after <= _ARRIVED * first
