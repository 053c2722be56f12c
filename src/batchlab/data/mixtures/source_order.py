"""Which source comes at a position, a pure function of (seed, position), with the counts of all sources before it.

Source k is due at the times (j + φ_k)/w_k, j = 0, 1, ..., with a phase φ_k of its own; position p of the due order is
the p-th of all these in time. So k has come ⌈t·w_k - φ_k⌉ times before the time t, which is a formula: a position is
found by halving, O(log K), whatever came before. The order within each block of 1024 positions is then shuffled.

A source's count is never off p·w_k by more than a few within whole blocks, and of any window by less than independent
draws are. Shares are kept to 2^-41. Numbers are integers: no rounding, any position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed
from batchlab.data.stream import SampleStream

BLOCK = 1024
_TICK = 20  # bits of a position's time after the point
_WEIGHT = 40  # bits of a weight after the point


class SourceOrder:
    """The order of K sources of given shares.

    weights: w_k > 0, normalised here. seed: of phases and shuffles.

    >>> order = SourceOrder([3, 1], seed=0)
    >>> which, number = order.span(0, 1024)
    >>> np.bincount(which).tolist(), order.before(1024).tolist(), order.before(4 * 10**9).tolist()
    ([768, 256], [768, 256], [3000000000, 1000000000])
    """

    def __init__(self, weights: Sequence[float], seed: int = 0) -> None:
        check_positive(**{f"weights[{at}]": weight for at, weight in enumerate(weights)})
        if not len(weights):
            raise InputError("weights must hold one number at least, got none")
        total = math.fsum(weights)
        self.weights = [weight / total for weight in weights]
        self._rates = [round(weight * 2**_WEIGHT) for weight in self.weights]
        if 0 in self._rates:
            raise InputError(f"weights must be at least 2^-41 of their sum, got {weights[self._rates.index(0)]!r}")
        self._rates[self._rates.index(max(self._rates))] += 2**_WEIGHT - sum(self._rates)
        spare = 64 - _TICK - _WEIGHT
        self._phases = [derive_seed(seed, "phase", at) >> spare for at in range(len(self._rates))]
        self._shuffle = SampleStream(BLOCK, derive_seed(seed, "source order"))
        self._cached = (-1, np.empty(0, np.int64), np.empty(0, np.int64))

    def before(self, position: int) -> NDArray[np.int64]:
        """How many of each source come before the position; shape (K,)."""
        if position < 0:
            raise InputError(f"position must be at least 0, got {position!r}")
        block, within = divmod(position, BLOCK)
        counts = self._due(block * BLOCK)
        if within:
            counts = counts + np.bincount(self._block(block)[0][:within], minlength=len(counts))
        return counts

    def span(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """At each position from `start` on: the source, and how many of that source came before; each (count,)."""
        if start < 0 or count < 0:
            raise InputError(f"start and count must not be negative, got start={start!r}, count={count!r}")
        sources, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while count:
            block, within = divmod(start, BLOCK)
            size = min(count, BLOCK - within)
            for parts, part in zip((sources, numbers), self._block(block), strict=True):
                parts.append(part[within : within + size])
            start, count = start + size, count - size
        return np.concatenate(sources), np.concatenate(numbers)

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._cached[0] != block:
            first = self._due(block * BLOCK)
            sources = np.repeat(np.arange(len(first)), self._due((block + 1) * BLOCK) - first)
            sources = sources[self._shuffle.indices(block * BLOCK, BLOCK)]
            numbers = np.empty(BLOCK, dtype=np.int64)
            for source in np.unique(sources):
                here = sources == source
                numbers[here] = first[source] + np.arange(here.sum())
            self._cached = (block, sources, numbers)
        return self._cached[1:]

    def _due(self, position: int) -> NDArray[np.int64]:
        """How many of each source are among the first `position` of the due order."""
        low, high = 0, (position + len(self._rates) + 2) << _TICK
        while high - low > 1:  # the last tick before which no more than `position` are due
            middle = (low + high) // 2
            if sum(self._until(middle)) <= position:
                low = middle
            else:
                high = middle
        counts, following = self._until(low), self._until(low + 1)
        missing = position - sum(counts)
        for source, later in enumerate(following):
            if missing and later > counts[source]:
                counts[source] += 1
                missing -= 1
        return np.array(counts, dtype=np.int64)

    def _until(self, tick: int) -> list[int]:
        bits = _TICK + _WEIGHT
        return [(tick * rate + phase) >> bits for rate, phase in zip(self._rates, self._phases, strict=True)]
