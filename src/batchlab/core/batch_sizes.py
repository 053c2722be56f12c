"""Batch sizes as people write them: lists and spans of powers of two."""

from __future__ import annotations

import re
from collections.abc import Sequence

from batchlab.core.errors import InputError

_SPAN = re.compile(r"(\d+)\.\.(\d+)")


def parse_batch_sizes(text: str | Sequence[int]) -> list[int]:
    """Batch sizes ascending, from a list of them or a text: "16,64,200", powers of two in "16..1024", or both.

    >>> parse_batch_sizes("16..100"), parse_batch_sizes("200, 16..64")
    ([16, 32, 64], [16, 32, 64, 200])
    """
    parts = [part.strip() for part in text.split(",")] if isinstance(text, str) else list(text)
    sizes: set[int] = set()
    for part in parts:
        span = _SPAN.fullmatch(part) if isinstance(part, str) else None
        if span is not None:
            low, high = int(span[1]), int(span[2])
            powers = {2**k for k in range(high.bit_length()) if low <= 2**k <= high}
            if not powers:
                raise InputError(f"batch_sizes {part!r} holds no power of two: name the sizes, as in 16,64,200")
            sizes |= powers
        elif isinstance(part, str) and part.isdecimal() and int(part) > 0:
            sizes.add(int(part))
        elif isinstance(part, int) and not isinstance(part, bool) and part > 0:
            sizes.add(part)
        else:
            raise InputError(
                f"batch_sizes must be integers of at least 1, as in 16,64,200, or a span as in 16..1024, got {part!r}"
            )
    if not sizes:
        raise InputError("batch_sizes must hold at least one batch size, got none")
    return sorted(sizes)
