"""Which examples are held out: decided by hashes of their names, so that there is no seed and no order to depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_inside


def name_hash(name: str) -> int:
    """64 bits of BLAKE2b of the name's UTF-8: the same on every machine."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def hold_out(
    names: Sequence[str], share: float, strata: Sequence[Hashable] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (train, valid), both ascending: round(share · n) are held out, every stratum in proportion.

    Within a stratum the names of the lowest hashes are held out. Counts follow the largest remainder, so that a
    stratum's is never off by one or more; equal remainders go to the stratum that comes first.

    >>> train, valid = hold_out([str(i) for i in range(10)], 0.2, strata=[0] * 5 + [1] * 5)
    >>> len(train), [int(i) // 5 for i in valid]
    (8, [0, 1])
    """
    check_inside(valid_share=share)
    groups: dict[Hashable, list[int]] = {}
    for index in range(len(names)):
        groups.setdefault(None if strata is None else strata[index], []).append(index)
    quotas = [share * len(group) for group in groups.values()]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: round(share * len(names)) - sum(counts)]:
        counts[i] += 1
    held = {
        index
        for group, count in zip(groups.values(), counts, strict=True)
        for index in sorted(group, key=lambda i: (name_hash(names[i]), names[i], i))[:count]
    }
    train = [index for index in range(len(names)) if index not in held]
    return np.array(train, dtype=np.int64), np.array(sorted(held), dtype=np.int64)
