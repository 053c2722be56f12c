"""The median of repeats with an interval that assumes nothing of their distribution."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from batchlab.core.checks import check_inside
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate


def median_interval(samples: Sequence[float], *, coverage: float = 0.95, method: str = "") -> Estimate:
    """The median, between two order statistics: for independent repeats of one distribution the chance that the k-th
    smallest and the k-th largest enclose its median is 1 - 2·P(Binomial(n, 1/2) < k).

    The interval is the narrowest such one that covers at least `coverage`; its own coverage is stated. With fewer than
    six repeats the whole range covers less than 95 %, and says so; one repeat bounds nothing but 0.

    >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], method="seconds")
    Estimate(3.5 [1, 6], 96.88 %, seconds, median of 6)
    """
    check_inside(coverage=coverage)
    if not samples or not all(math.isfinite(sample) for sample in samples):
        raise InputError(f"samples must be one or more finite numbers, got {list(samples)!r:.80}")
    ordered, n = sorted(samples), len(samples)
    label = f"{method}, median of {n}" if method else f"median of {n}"
    if n == 1:
        return Estimate(ordered[0], min(0.0, ordered[0]), math.inf, label, coverage)
    k, covered = 1, 1 - 2 * 0.5**n
    below = 0.5**n
    for next_k in range(2, n // 2 + 1):
        below += math.comb(n, next_k - 1) * 0.5**n
        if 1 - 2 * below < coverage:
            break
        k, covered = next_k, 1 - 2 * below
    return Estimate(statistics.median(ordered), ordered[k - 1], ordered[n - k], label, covered)
