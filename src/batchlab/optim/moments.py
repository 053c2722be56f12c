"""Adam's two averages: what the optimizers that keep them share."""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.core.errors import InputError


def bias_corrections(betas: Sequence[float], t: int) -> tuple[float, ...]:
    """1 - βᵗ: the sum of the weights of an average that started from zero t updates ago.

    >>> bias_corrections((0.5, 0.9), 2)
    (0.75, 0.18999999999999995)
    """
    return tuple(1 - beta**t for beta in betas)


def check_betas(betas: Sequence[float], count: int = 2) -> None:
    """Refuses all but `count` numbers in [0, 1)."""
    if not isinstance(betas, Sequence) or len(betas) != count or not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"betas must be {count} numbers in [0, 1), got {betas!r}")
