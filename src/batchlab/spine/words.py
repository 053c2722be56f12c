"""Numbers and outcomes in words, as reports and terminals show them."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any

from batchlab.core.facts import Estimate
from batchlab.core.job import Target
from batchlab.core.plan import Plan

FEW = 20  # predicted steps


def figure(value: float) -> str:
    """Four significant digits, without an exponent where a reader can do without.

    >>> figure(0.00012), figure(1437.0), figure(12345678.0), figure(float("inf"))
    ('0.00012', '1,437', '12,345,678', 'unbounded')
    """
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "unbounded"
    if value and not 1e-4 <= abs(value) < 1e12:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def shown_steps(steps: float) -> float:
    """Predicted ones as they are shown: fewer than 20 with a decimal, more as whole ones."""
    if not math.isfinite(steps):
        return steps
    return float(f"{steps:.3g}") if steps < FEW else round(steps)


def steps_said(steps: float) -> str:
    """Predicted ones in words.

    >>> steps_said(4.4712), steps_said(54.05), steps_said(float("inf"))
    ('4.47', '54', 'unbounded')
    """
    return figure(shown_steps(steps))


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them.

    >>> duration(0.0021), duration(3.21), duration(125), duration(7300), duration(200_000)
    ('2.1 ms', '3.21 s', '2 min 5 s', '2 h 2 min', '2 d 8 h')
    """
    if not math.isfinite(seconds):
        return figure(seconds)
    if seconds < 0.1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    for large, name, lesser, rest in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        whole, left = divmod(round(seconds / lesser), large // lesser)
        if whole:
            return f"{whole} {name} {left} {rest}"
    return f"{seconds:.3g} s"


def size(count: float) -> str:
    """Bytes in binary units.

    >>> size(1536.0)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def interval(estimate: Estimate) -> str:
    """An estimate with its interval: value, ends, coverage.

    >>> interval(Estimate(64.0, 40.0, float("inf"), "norms"))
    '64 (95 % interval: 40 to unbounded)'
    """
    ends = f"{figure(estimate.low)} to {figure(estimate.high)}"
    return f"{figure(estimate.value)} ({100 * estimate.coverage:.4g} % interval: {ends})"


def aim(target: Target) -> str:
    """A target in words.

    >>> aim(Target("accuracy", 0.97, "max"))
    'accuracy of at least 0.97'
    """
    return f"{target.metric} of at {'most' if target.direction == 'min' else 'least'} {figure(target.value)}"


def of_what(plan: Plan) -> str:
    """What the predicted steps of a plan are for, of what has other values in the plan by now."""
    words: dict[str, Callable[[Any], str]] = {
        "batch_size": lambda size: f"batch size {size:,}",
        "learning_rate": lambda rate: f"a learning rate of {figure(rate)}",
    }
    return " and ".join(words.get(name, str)(value) for name, value in plan.predicted_for.items())


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "step"), plural(2, "step")
    ('1 step', '2 steps')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def moment(text: object) -> str:
    """A time in ISO 8601 to the minute; anything else as it is.

    >>> moment("2026-11-24T12:00:05+00:00")
    '2026-11-24 12:00 UTC'
    """
    try:
        when = datetime.fromisoformat(str(text))
    except ValueError:
        return "at an unknown time" if text is None else str(text)
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".rstrip()
