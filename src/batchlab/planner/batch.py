"""Which batch size on how many devices, for a goal.

Take an update to last t = t₀ + c·B/n on n devices: t₀ the fixed part, c the time of an example. b = t₀/c is the
share at which a device is half busy. With S = S_min(1 + B_crit/B):

  T(B, n) = S_min·(1 + B_crit/B)·(t₀ + c·B/n)        time to the target
  C(B, n) = n·T(B, n)                                device-seconds

- "time", least T: all n devices, and B = √(n·b·B_crit). Small batches waste the fixed part, large ones examples.
- "cost", least C: on a given n the same B, for C is then n·T. Over n, one device: t₀ is paid on each.
- "balanced", least T·C = n·T². For a share B/n held fixed it is (n + n*)²/n times a constant, with n* = B_crit/(B/n):
  least where B = B_crit, the knee, where steps and examples both are twice their least. Then the share: b. So with
  devices to spare the balanced plan is B_crit on n = B_crit/b devices; with fewer devices than that, n·T² falls in n,
  all of them are used, and B = √(n·b·B_crit), between n·b and B_crit, is the fastest on them. On one device time and
  cost are one thing and the three goals agree.

So "balanced" needs no bound on time: on the number of devices that it uses, its batch is the fastest. The minimum is
flat: a batch ρ times off takes at most (2 + ρ + 1/ρ)/4 times as long, 1.13 for ρ = 2; and as B goes with √B_crit,
ρ = 2 is a B_crit that is wrong by 4. Choices within 5 % of the least are taken as equal by "balanced", for measured
step times repeat no better, and of these it takes the one nearest to B_crit; that costs 2.5 % of time at most.

The measured t need not be of this form: the choice is made from the rows themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError
from batchlab.core.plan import FrontierRow

Goal = Literal["time", "cost", "balanced"]
GOALS: tuple[Goal, ...] = get_args(Goal)
EQUAL_WITHIN = 1.05

RULES: dict[Goal, str] = {
    "time": "least predicted time to the target, over batch sizes and devices",
    "cost": "least predicted device-seconds to the target, over batch sizes and devices",
    "balanced": "least predicted time x device-seconds; of those within 5 %, the nearest to the critical batch size",
}


def check_goal(goal: str) -> Goal:
    """`goal` itself, if it is one."""
    for known in GOALS:
        if goal == known:
            return known
    raise InputError(f"goal must be one of {sorted(GOALS)}, got {goal!r}")


def pick(rows: Sequence[FrontierRow], goal: str, *, b_crit: float) -> FrontierRow:
    """The row that serves the goal best. Equal rows: fewer devices first, then the smaller batch.

    b_crit: the critical batch size in examples; where it is not known, infinite: the knee is then beyond all rows.

    >>> rows = [FrontierRow(b, 1, s, s, s) for b, s in ((16, 50.0), (64, 20.0), (128, 20.1), (256, 30.0))]
    >>> pick(rows, "time", b_crit=200).batch_size, pick(rows, "balanced", b_crit=200).batch_size
    (64, 128)
    """
    wanted = check_goal(goal)
    if not rows:
        raise InputError("rows must hold at least one choice, got none")
    if b_crit != math.inf:
        check_positive(b_crit=b_crit)
    measure = _MEASURE[wanted]
    least = min(measure(row) for row in rows)
    if wanted != "balanced":
        return min(rows, key=lambda row: (measure(row), row.devices, row.batch_size))
    equal = [row for row in rows if measure(row) <= EQUAL_WITHIN * least]
    knee = min(b_crit, max(row.batch_size for row in rows))
    return min(equal, key=lambda row: (abs(math.log(row.batch_size / knee)), row.devices, measure(row)))


_MEASURE: dict[Goal, Callable[[FrontierRow], float]] = {
    "time": lambda row: row.time,
    "cost": lambda row: row.cost,
    "balanced": lambda row: row.time * row.cost,
}
