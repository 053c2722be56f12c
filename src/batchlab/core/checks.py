"""The checks that all rooms make of numbers: NaN, texts and None fail them too. Each raises `InputError`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from batchlab.core.errors import InputError


def check_positive(**numbers: float) -> None:
    """Each must be finite and > 0; here as in all of these True is no number.

    >>> check_positive(batch_size=64, noise_scale=float("nan"))
    Traceback (most recent call last):
    batchlab.core.errors.InputError: noise_scale must be finite and > 0, got nan
    """
    _check(lambda value: 0 < value < math.inf, "be finite and > 0", numbers)


def check_not_negative(**numbers: float) -> None:
    """Each must be >= 0; infinity passes."""
    _check(lambda value: value >= 0, "be >= 0", numbers)


def check_rate(**numbers: float) -> None:
    """Each must be finite and >= 0, as learning rates and weight decays are."""
    _check(lambda value: 0 <= value < math.inf, "be finite and >= 0", numbers)


def check_share(**numbers: float) -> None:
    """Each must lie in [0, 1]."""
    _check(lambda value: 0 <= value <= 1, "lie in [0, 1]", numbers)


def check_inside(**numbers: float) -> None:
    """Each must lie in (0, 1), as a coverage does.

    >>> check_inside(coverage=95)
    Traceback (most recent call last):
    batchlab.core.errors.InputError: coverage must lie in (0, 1), got 95
    """
    _check(lambda value: 0 < value < 1, "lie in (0, 1)", numbers)


def check_count(least: int = 1, /, **counts: int) -> None:
    """Each must be an integer of at least `least`; NumPy's are integers too, True is none.

    >>> check_count(2, repeats=1)
    Traceback (most recent call last):
    batchlab.core.errors.InputError: repeats must be an integer of at least 2, got 1
    """
    for name, count in counts.items():
        if not is_count(count, least):
            raise InputError(f"{name} must be an integer of at least {least}, got {count!r}")


def as_count(least: int = 1, /, **count: Any) -> int:
    """The one number as Python's integer, which does not overflow as those of other libraries; see `check_count`.

    >>> import torch
    >>> as_count(batch_size=torch.tensor(8))
    8
    """
    check_count(least, **count)
    (value,) = count.values()
    return operator.index(value)


def check_truth(**values: bool) -> None:
    """Each must be True or False, of any library: a text such as "no" would be taken as true."""
    for name, value in values.items():
        if not _is_truth(value) or not holds(lambda value: bool(value) in (True, False), value):
            raise InputError(f"{name} must be True or False, got {value!r}")


def is_whole(value: Any) -> bool:
    """Whether it is an integer, of any library; True is none.

    >>> import torch
    >>> is_whole(torch.tensor(3)), is_whole(torch.tensor(True)), is_whole(3.0)
    (True, False, False)
    """
    return not _is_truth(value) and holds(lambda value: operator.index(value) is not None, value)


def is_count(value: Any, least: int = 1) -> bool:
    """Whether it is an integer of at least `least`."""
    return is_whole(value) and operator.index(value) >= least


def holds(condition: Callable[[Any], Any], value: Any) -> bool:
    """Whether the condition can be asked of the value and holds."""
    try:
        return bool(condition(value))
    except (TypeError, ValueError, RuntimeError):  # a text, None, or a tensor of several numbers
        return False


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def _check(condition: Callable[[Any], Any], right: str, numbers: dict[str, Any]) -> None:
    for name, value in numbers.items():
        if _is_truth(value) or not holds(condition, value):
            raise InputError(f"{name} must {right}, got {value!r}")
