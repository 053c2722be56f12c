"""What each batch size on each number of devices is predicted to take: time to the target against device-seconds.

T(B, n) = S(B)·t(B, n) and C = n·T, with S the predicted updates and t the measured time of one. Communication between
devices was not measured and is not in t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.core.facts import Facts
from batchlab.core.plan import FrontierRow
from batchlab.planner.prediction import Prediction

REACH = 16


def size_range(b_crit: float, examples: int) -> tuple[int, int]:
    """The batch sizes worth predicting: B_crit/16 to 16·B_crit, within 1 and the data set.

    At the lower end E = 1.06·E_min and at the upper end S = 1.06·S_min: further out there is a sixteenth left to gain,
    and the rules extrapolate. If B_crit is wrong by 2 it is an eighth.

    >>> size_range(64, 10_000)
    (4, 1024)
    """
    check_positive(b_crit=b_crit, examples=examples)
    lowest = min(max(1, math.ceil(b_crit / REACH)), examples)
    return lowest, max(lowest, min(math.floor(b_crit * REACH), examples))


def size_grid(lowest: int, highest: int) -> list[int]:
    """Powers of two and the sizes halfway between them (3·2^k): steps of a third to a half.

    A batch √1.5 times off the best costs at most 1.03 times its time (`planner.batch`), so a finer grid gains nothing.
    `highest` alone where none of them lies in the range.

    >>> size_grid(5, 64), size_grid(40, 40)
    ([6, 8, 12, 16, 24, 32, 48, 64], [40])
    """
    check_count(lowest=lowest, highest=highest)
    lowest, highest = int(lowest), int(highest)
    both = {size for k in range(highest.bit_length() + 1) for size in (2**k, 3 * 2**k)}
    return sorted(size for size in both if lowest <= size <= highest) or [highest] * (lowest <= highest)


def device_grid(devices: int) -> list[int]:
    """1, 2, 4, ... up to `devices`, and `devices` itself.

    >>> device_grid(6)
    [1, 2, 4, 6]
    """
    check_count(devices=devices)
    most = int(devices)
    return sorted({2**k for k in range(most.bit_length())} | {most})


def frontier(
    facts: Facts,
    prediction: Prediction | None = None,
    *,
    batch_sizes: Sequence[int] | None = None,
    devices: Sequence[int] = (1,),
    price_per_hour: float | None = None,
    watts: float | None = None,
) -> tuple[FrontierRow, ...]:
    """One row for each batch size on each number of devices that it can be spread over, none picked.

    prediction: of the updates to the target; from the facts if None. batch_sizes: those worth predicting if None, from
    B_crit/16 to 16·B_crit. price_per_hour: dollars for one device. watts: that one draws while it trains, which is what
    you measured (`measure.Energy`), not the board's maximum. Rows are sorted by devices, then by batch size.
    """
    known = prediction or Prediction.of(facts)
    if batch_sizes is None:
        batch_sizes = size_grid(*size_range(known.b_crit, facts.train_examples)) if known.noise_known else ()
        batch_sizes = batch_sizes or (facts.base_batch_size,)
    for name, value in (("price_per_hour", price_per_hour), ("watts", watts)):
        if value is not None:
            check_positive(**{name: value})
    rows = [
        _row(facts, known, size, count, price_per_hour, watts)
        for count in sorted(set(devices))
        for size in sorted(set(batch_sizes))
        if size >= count
    ]
    if not rows:
        raise InputError(f"batch_sizes must hold one of at least {min(devices)}, an example for each device")
    return tuple(rows)


def _row(
    facts: Facts, prediction: Prediction, batch_size: int, devices: int, price: float | None, watts: float | None
) -> FrontierRow:
    steps = prediction.steps(batch_size)
    time = steps * facts.step_time(batch_size, devices)
    cost = devices * time
    dollars, joules = (None if price is None else cost / 3600 * price), (None if watts is None else cost * watts)
    return FrontierRow(batch_size, devices, steps, time, cost, dollars=dollars, joules=joules)
