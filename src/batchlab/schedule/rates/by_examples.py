"""The learning rate as a function of examples seen, by name, so that it means the same at any batch size.

These are the schedules that a `Plan` can name; as torch schedulers for a loop of your own they are `WSD`, `Power` and
`OneCycle`. What a setting calls a share is of the whole run: it survives a run that is made longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from batchlab.core.checks import check_inside, check_not_negative, check_positive, check_share, holds
from batchlab.core.errors import InputError
from batchlab.measure.course.learning_rate import ONE_CYCLE
from batchlab.schedule.rates.cooled import check_shape
from batchlab.schedule.rates.one_cycle import (
    CYCLE_SHARE,
    FINAL_RATIO,
    MOMENTUM,
    check_cycle,
    cycle_momentum,
    cycle_rate,
)
from batchlab.schedule.rates.power import B
from batchlab.schedule.rates.wsd import wsd_share

SETTINGS: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {},
    "cosine": {},
    "wsd": {"decay_share": 0.2, "shape": "1-sqrt", "floor": 0.0},
    "power": {"knee_share": None, "exponent": B, "decay_share": 0.0, "shape": "exponential", "floor": 0.0},
    "one_cycle": {
        "half_share": CYCLE_SHARE / 2,
        "ratio": ONE_CYCLE,
        "final_ratio": FINAL_RATIO,
        "shape": "paper",
        "momentum": MOMENTUM,
    },
}


def lr_factor(
    examples: float,
    *,
    total_examples: float,
    warmup_examples: float = 0.0,
    schedule: str = "constant",
    settings: Mapping[str, Any] | None = None,
) -> float:
    """The share of the peak learning rate after `examples` of `total_examples`.

    Linear from 0 over `warmup_examples`; then "constant", or "linear" or "cosine" down to 0 at `total_examples`.
    "wsd": constant, and down over the last `decay_share` (`wsd_share`). "power": min(1, (n/k)^exponent), where k is
    `knee_share` of the run, which must be given: from there on the rate of `power_rate` is below its cap. Where the
    warm-up reaches into the cool-down of these two, the share is the product of both.
    "one_cycle": `cycle_rate`, half a cycle being `half_share`; it warms up by itself. settings: others than `SETTINGS`.

    >>> lr_factor(50, total_examples=1000, warmup_examples=100)
    0.5
    >>> lr_factor(550, total_examples=1000, warmup_examples=100, schedule="linear")
    0.5
    >>> lr_factor(900, total_examples=1000, schedule="wsd", settings={"shape": "linear"})
    0.5
    """
    given = schedule_settings(schedule, settings)
    check_not_negative(examples=examples, warmup_examples=warmup_examples)
    check_positive(total_examples=total_examples)
    if warmup_examples == math.inf:
        raise InputError("warmup_examples must be finite, or the rate never rises, got inf")
    if schedule == "one_cycle":
        return _one_cycle(examples, total_examples, warmup_examples, given)
    warm = min(1.0, examples / warmup_examples) if warmup_examples else 1.0
    if schedule in ("wsd", "power"):
        return warm * _knee(examples, total_examples, warmup_examples, given) * _cooled(examples, total_examples, given)
    if schedule == "constant" or examples < warmup_examples:
        return warm
    rest = min(1.0, (examples - warmup_examples) / max(total_examples - warmup_examples, 1.0))
    if schedule == "linear":
        return 1.0 - rest
    return 0.5 * (1.0 + math.cos(math.pi * rest))


def momentum_at(
    examples: float, *, total_examples: float, schedule: str, settings: Mapping[str, Any] | None = None
) -> float | None:
    """The momentum, or Adam's β₁, that goes with the rate: of "one_cycle" where `momentum` is not None, else None.

    >>> momentum_at(450, total_examples=1000, schedule="one_cycle")
    0.85
    """
    given = schedule_settings(schedule, settings)
    if schedule != "one_cycle" or given["momentum"] is None:
        return None
    return cycle_momentum(examples, half=given["half_share"] * total_examples, momentum=given["momentum"])


def schedule_settings(schedule: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All settings of a schedule, the given ones in place of the defaults; `InputError` for what it has not."""
    if schedule not in SETTINGS:
        raise InputError(f"schedule must be one of {list(SETTINGS)}, got {schedule!r}")
    defaults = SETTINGS[schedule]
    for name in settings or {}:
        if name not in defaults:
            raise InputError(f"schedule_settings of {schedule!r} must be of {list(defaults)}, got {name!r}")
    found = defaults | dict(settings or {})
    if schedule == "power":
        if found["knee_share"] is None:
            raise InputError(
                'the schedule "power" needs schedule_settings["knee_share"]: where the rate begins to fall'
            )
        check_positive(knee_share=found["knee_share"])
        if not holds(math.isfinite, found["exponent"]):
            raise InputError(f"exponent must be finite, got {found['exponent']!r}")
    if schedule == "one_cycle":
        check_inside(half_share=found["half_share"])
        check_cycle(found["ratio"], found["final_ratio"], found["shape"], found["momentum"])
    if "decay_share" in found:
        check_share(decay_share=found["decay_share"])
        check_shape(found["shape"], found["floor"])
    return found


def _one_cycle(examples: float, total: float, warmup: float, given: Mapping[str, Any]) -> float:
    if warmup:
        raise InputError(f'the schedule "one_cycle" warms up by itself: warmup_examples must be 0, got {warmup!r}')
    names = ("ratio", "final_ratio", "shape")
    half = given["half_share"] * total
    return cycle_rate(examples, peak=1.0, half=half, total=total, **{name: given[name] for name in names})


def _knee(examples: float, total: float, warmup: float, given: Mapping[str, Any]) -> float:
    if "knee_share" not in given:
        return 1.0
    knee = max(given["knee_share"] * total, warmup)
    begun = min(examples, total * (1 - given["decay_share"]))
    return min(1.0, (begun / knee) ** float(given["exponent"])) if begun > 0 else 1.0


def _cooled(examples: float, total: float, given: Mapping[str, Any]) -> float:
    decay = given["decay_share"] * total
    if not decay:
        return 1.0
    return wsd_share(examples, total=total, decay=decay, shape=given["shape"], floor=given["floor"])
