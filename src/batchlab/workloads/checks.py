"""The checks that the ready jobs make of what they are given."""

from __future__ import annotations

from pathlib import Path

from batchlab.core.errors import InputError


def check_valid_share(share: float) -> None:
    """The share of the data to hold out must lie strictly between 0 and 1."""
    if not 0 < share < 1:
        raise InputError(f"valid_share must lie strictly between 0 and 1, got {share!r}")


def check_counts(**counts: int) -> None:
    """Each must be an integer of at least 1.

    >>> check_counts(context=0)
    Traceback (most recent call last):
    batchlab.core.errors.InputError: context must be an integer of at least 1, got 0
    """
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"{name} must be an integer of at least 1, got {count!r}")


def existing(path: str | Path) -> Path:
    """`path` as a `Path`, "~" expanded; `InputError` where there is nothing."""
    found = Path(path).expanduser()
    if not found.exists():
        raise InputError(f"{path} does not exist")
    return found
