"""The learning rate as a function of examples seen, so that it means the same at any batch size."""

from __future__ import annotations

import math

from batchlab.core.errors import InputError


def lr_factor(
    examples: float, *, total_examples: float, warmup_examples: float = 0.0, schedule: str = "constant"
) -> float:
    """The share of the peak learning rate after `examples` of `total_examples`.

    Linear from 0 over `warmup_examples`; then "constant", or "linear" or "cosine" down to 0 at `total_examples`.

    >>> lr_factor(50, total_examples=1000, warmup_examples=100)
    0.5
    >>> lr_factor(550, total_examples=1000, warmup_examples=100, schedule="linear")
    0.5
    """
    if schedule not in ("constant", "linear", "cosine"):
        raise InputError(f'schedule must be "constant", "linear" or "cosine", got {schedule!r}')
    if examples < warmup_examples:
        return examples / warmup_examples
    if schedule == "constant":
        return 1.0
    rest = min(1.0, (examples - warmup_examples) / max(total_examples - warmup_examples, 1.0))
    if schedule == "linear":
        return 1.0 - rest
    return 0.5 * (1.0 + math.cos(math.pi * rest))
