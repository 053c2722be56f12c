"""In which order the buckets of a decomposition take their turns (Pouransari et al. 2024, arXiv 2405.13226).

Within a cycle a bucket is drawn by odds, its next batch is taken, and a bucket that is used up is left out: without
replacement, so that under a growing curriculum short buckets drain first and the cycle ends long. Odds are a bucket's
batches in the cycle times its weight, and all of a curriculum is in the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError

Ints = NDArray[np.int64]
DRAWN = ("natural", "grow_p2", "grow_linear", "uniform")
IN_SUB_CYCLES = ("olmo_grow_p2", "olmo_grow_linear")
Curriculum = str | Sequence[float]


def bucket_odds(batches: Sequence[int], curriculum: Curriculum) -> NDArray[np.float64]:
    """The odds of each bucket, shortest first, given its batches in a cycle.

    "natural": the batches themselves. "grow_p2": times 2^(i_max - i), "grow_linear": times i_max - i + 1. "uniform":
    the same odds for all, however many batches. Or weights of one's own, one a bucket, that the batches are multiplied
    by.

    >>> bucket_odds([46, 78, 97, 82, 67, 60], "grow_p2").tolist()
    [1472.0, 1248.0, 776.0, 328.0, 134.0, 60.0]
    """
    check_curriculum(curriculum, len(batches))
    if is_in_sub_cycles(curriculum):
        raise InputError(f"curriculum {curriculum!r} has odds for each sub-cycle: see sub_cycle_counts")
    left = np.arange(len(batches), 0, -1, dtype=np.float64)
    if not isinstance(curriculum, str):
        weights = np.asarray(curriculum, dtype=np.float64)
    elif curriculum == "uniform":
        return np.ones(len(batches))
    else:
        weights = {"natural": np.ones_like(left), "grow_p2": 2.0 ** (left - 1)}.get(curriculum, left)
    return np.asarray(batches, dtype=np.float64) * weights


def is_in_sub_cycles(curriculum: Curriculum) -> bool:
    """Whether counts are set for each sub-cycle, as OLMo-core does, and nothing is drawn but the order within it."""
    return isinstance(curriculum, str) and curriculum in IN_SUB_CYCLES


def check_curriculum(curriculum: Curriculum, buckets: int) -> None:
    """Refuses a name that is none, and weights that are not one a bucket, finite and > 0."""
    if isinstance(curriculum, str):
        if curriculum not in DRAWN + IN_SUB_CYCLES:
            raise InputError(
                f"curriculum must be one of {sorted(DRAWN + IN_SUB_CYCLES)} or weights, got {curriculum!r}"
            )
        return
    if np.shape(curriculum) != (buckets,):
        raise InputError(f"curriculum must have one weight for each of {buckets} buckets, got {curriculum!r}")
    for weight in curriculum:
        check_positive(curriculum=weight)


def cycle_order(batches: Sequence[int], curriculum: Curriculum, seed: int) -> Ints:
    """The bucket of each batch of one cycle, from 0 for the shortest; shape (Σ batches,). A function of its arguments.

    >>> np.bincount(cycle_order([4, 2, 1], "grow_p2", seed=0)).tolist()
    [4, 2, 1]
    """
    generator = np.random.default_rng(seed)
    check_curriculum(curriculum, len(batches))
    if is_in_sub_cycles(curriculum):
        counts = np.array([sub_cycle_counts(b, count, len(batches), curriculum) for b, count in enumerate(batches)])
        return np.concatenate([generator.permutation(np.repeat(np.arange(len(batches)), each)) for each in counts.T])
    return drawn_order(batches, bucket_odds(batches, curriculum), generator.random(sum(batches)))


def drawn_order(batches: Sequence[int], odds: ArrayLike, u: NDArray[np.float64]) -> Ints:
    """One bucket for each u, uniform in [0, 1): by the odds of the buckets that still have batches."""
    left, odds, u = np.array(batches, dtype=np.int64), np.asarray(odds, dtype=np.float64), u[: sum(batches)]
    parts = [np.empty(0, dtype=np.int64)]
    while left.any():
        alive = np.flatnonzero(left)
        edges = np.cumsum(odds[alive])
        drawn = np.minimum(np.searchsorted(edges / edges[-1], u, side="right"), len(alive) - 1)
        used_up = [np.flatnonzero(drawn == at)[left[bucket] - 1 : left[bucket]] for at, bucket in enumerate(alive)]
        stop = min((int(place[0]) + 1 for place in used_up if len(place)), default=len(drawn))
        parts.append(alive[drawn[:stop]])
        left -= np.bincount(parts[-1], minlength=len(left))
        u = u[stop:]
    return np.concatenate(parts)


def sub_cycle_counts(bucket: int, batches: int, buckets: int, curriculum: Curriculum = "olmo_grow_p2") -> list[int]:
    """How `allenai/OLMo-core` spreads a bucket's batches of a cycle over as many sub-cycles as there are buckets.

    Bucket b (from 0 for the shortest) of n has in sub-cycle c = 0 .. n - 1 the odds 2^(e - 1), or e for
    "olmo_grow_linear", with e = n - b + c up to n, and after that falling from n - b - 1. Counts are rounded shares;
    what is missing goes to the last sub-cycle. What is too much comes off the last ones that have any; there OLMo-core
    3.0 stops with an assertion, for 1,378 of 21,070 triples of bucket, buckets and batches. On the others counts equal.

    >>> [sub_cycle_counts(bucket, 63, 6, "olmo_grow_p2") for bucket in (0, 1, 5)]
    [[32, 16, 8, 4, 2, 1], [16, 32, 8, 4, 2, 1], [1, 2, 4, 8, 16, 32]]
    """
    first = buckets - bucket
    e = [first + c if first + c <= buckets else buckets - c for c in range(buckets)]
    odds = [2 ** (each - 1) if curriculum == "olmo_grow_p2" else each for each in e]
    counts = [round(each / sum(odds) * batches) for each in odds]
    counts[-1] += max(0, batches - sum(counts))
    for c in range(buckets - 1, -1, -1):
        counts[c] -= min(counts[c], max(0, sum(counts) - batches))
    return counts
