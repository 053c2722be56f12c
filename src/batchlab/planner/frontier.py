"""What each batch size on each number of devices is predicted to take: time to the target against device-seconds.

T(B, n) = S(B)·t(B, n) and C = n·T, with S(B) = S(B₀)·(1 + B_crit/B)/(1 + B_crit/B₀) from one reference run (B₀, S(B₀))
and t the measured time of an update. Communication between devices was not measured and is not in t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchlab.core.errors import InputError
from batchlab.core.facts import Facts
from batchlab.core.plan import FrontierRow
from batchlab.rules.checks import check_not_negative, check_positive
from batchlab.rules.tradeoff import steps_ratio

LEAST_OVER_CRITICAL, MOST_OVER_CRITICAL = 1 / 8, 4.0


def size_range(b_crit: float, examples: int) -> tuple[int, int]:
    """The batch sizes worth predicting: B_crit/8 to 4·B_crit, within 1 and the data set.

    At the lower end E = 1.125·E_min: at most an eighth more examples can be saved by going further. At the upper
    end S = 1.25·S_min: at most a fifth of the updates. Outside, the rules extrapolate for next to nothing.

    >>> size_range(64, 10_000)
    (8, 256)
    """
    check_positive(b_crit=b_crit, examples=examples)
    lowest = min(max(1, math.ceil(b_crit * LEAST_OVER_CRITICAL)), examples)
    return lowest, max(lowest, min(math.floor(b_crit * MOST_OVER_CRITICAL), examples))


def size_grid(lowest: int, highest: int) -> list[int]:
    """Powers of two and the sizes halfway between them (3·2^k): steps of a third to a half.

    A batch √1.5 times off the best costs at most 1.03 times its time (`planner.batch`), so a finer grid gains nothing.

    >>> size_grid(5, 64)
    [6, 8, 12, 16, 24, 32, 48, 64]
    """
    both = {size for k in range(highest.bit_length() + 1) for size in (2**k, 3 * 2**k)}
    return sorted(size for size in both if lowest <= size <= highest)


def device_grid(devices: int) -> list[int]:
    """1, 2, 4, ... up to `devices`, and `devices` itself.

    >>> device_grid(6)
    [1, 2, 4, 6]
    """
    check_positive(devices=devices)
    return sorted({2**k for k in range(devices.bit_length())} | {devices})


def frontier(
    facts: Facts,
    *,
    b_crit: float,
    base_steps: float,
    batch_sizes: Sequence[int],
    devices: Sequence[int] = (1,),
) -> tuple[FrontierRow, ...]:
    """One row for each batch size on each number of devices that it can be spread over, none picked.

    b_crit: in examples, 0 to infinity. base_steps: updates to the target at `facts.base_batch_size`.
    Rows are sorted by devices, then by batch size.
    """
    check_positive(base_steps=base_steps)
    check_not_negative(b_crit=b_crit)
    rows = []
    for count in sorted(set(devices)):
        for size in sorted(set(batch_sizes)):
            if size < count:
                continue
            steps = base_steps * steps_ratio(size, facts.base_batch_size, b_crit=b_crit)
            time = steps * facts.step_time(size, count)
            rows.append(FrontierRow(size, count, steps, time, count * time))
    if not rows:
        raise InputError(f"no batch size of {sorted(set(batch_sizes))} gives each of {min(devices)} devices an example")
    return tuple(rows)
