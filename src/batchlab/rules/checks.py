"""The checks that every rule makes of its numbers, written so that NaN fails them too."""

from __future__ import annotations

import math

from batchlab.core.errors import InputError


def check_positive(**numbers: float) -> None:
    """Each must be finite and > 0.

    >>> check_positive(batch_size=64, noise_scale=float("nan"))
    Traceback (most recent call last):
    batchlab.core.errors.InputError: noise_scale must be finite and > 0, got nan
    """
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise InputError(f"{name} must be finite and > 0, got {value!r}")


def check_not_negative(**numbers: float) -> None:
    """Each must be >= 0; infinity passes."""
    for name, value in numbers.items():
        if not value >= 0:
            raise InputError(f"{name} must be >= 0, got {value!r}")


def check_share(**numbers: float) -> None:
    """Each must lie in [0, 1]."""
    for name, value in numbers.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} must lie in [0, 1], got {value!r}")
