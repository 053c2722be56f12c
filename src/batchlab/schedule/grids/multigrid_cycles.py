"""The two cycles of multigrid training as pure functions: shapes, batches, epochs, rates, what to sample, BatchNorm.

Wu, Girshick, He, Feichtenhofer and Krähenbühl 2020, arXiv 1912.00998; numbers as in the code released (facebookresearch
SlowFast). Sizes of a shape are of its axes in the order of the tensor's, as (T, H, W) or (H, W). With D the product of
the default sizes, a shape with the product P takes round(D/P) times the default batch: an update then costs alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError

Factors = Sequence[float | None]

HALF = 0.5**0.5
LONG_CYCLES = {
    3: ((0.25, HALF, HALF), (0.5, HALF, HALF), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0)),
    2: ((HALF, HALF), (1.0, 1.0)),  # the video's, without time
}
SHORT_CYCLES: dict[int, tuple[tuple[float | None, ...], ...]] = {
    3: ((None, 0.5, 0.5), (None, HALF, HALF)),
    2: ((0.5, 0.5), (HALF, HALF)),
}


class GridShape(NamedTuple):
    """What one batch is cut to. sizes: of each axis. cycle: its place in the short cycle, the last being the base."""

    sizes: tuple[int, ...]
    cycle: int


class LongEntry(NamedTuple):
    """One base shape of the long cycle. stage: of the learning rate. factor: of the batch, to the default one.

    first, end: the epochs from `first` on and before `end`; none where they are equal, as rounding can make them.
    """

    stage: int
    sizes: tuple[int, ...]
    factor: int
    first: int
    end: int


class BatchNormRule(NamedTuple):
    """kind: how BatchNorm's statistics come to range over the base size. number: parts of a batch, or devices."""

    kind: Literal["plain", "split", "sync"]
    number: int


def base_sizes(default: Sequence[int], factors: Factors) -> tuple[int, ...]:
    """Each default size times its factor, rounded; None leaves it.

    >>> base_sizes((32, 224, 224), (0.25, HALF, HALF))
    (8, 158, 158)
    """
    _check_factors(default, factors)
    sizes = tuple(size if f is None else round(size * f) for size, f in zip(default, factors, strict=True))
    if min(sizes) < 1:
        raise InputError(f"factors must not make a size of 0, got {tuple(factors)} of {tuple(default)}")
    return sizes


def cycle_batches(default: Sequence[int], base: Sequence[int], short_cycle: Sequence[Factors]) -> list[int]:
    """The batches of a short cycle, to the batch of its base shape: round(ratio of their sizes), the base last.

    A short factor multiplies the default size and not the base's; None keeps the base's.

    >>> cycle_batches((32, 224, 224), (8, 158, 158), SHORT_CYCLES[3])
    [2, 1, 1]
    """
    exact = [_exact(default, base, factors) for factors in short_cycle]
    ratios = [math.prod(b / e for b, e in zip(base, sizes, strict=True)) for sizes in exact]
    return [*(_times(ratio, f"shape {sizes}") for ratio, sizes in zip(ratios, exact, strict=True)), 1]


def mean_batch(default: Sequence[int], base: Sequence[int], short_cycle: Sequence[Factors]) -> float:
    """The mean batch of an update over the short cycle, to the default batch: what an epoch has fewer updates by.

    >>> mean_batch((32, 224, 224), (8, 158, 158), SHORT_CYCLES[3])
    10.666666666666666
    """
    shapes = [*(_exact(default, base, factors) for factors in short_cycle), tuple(map(float, base))]
    batches = [_times(math.prod(default) / math.prod(sizes), f"shape {sizes}") for sizes in shapes]
    return sum(batches) / len(batches)


def _exact(default: Sequence[int], base: Sequence[int], factors: Factors) -> tuple[float, ...]:
    """The sizes of a shape of the short cycle before they are rounded: the batch is reckoned from these."""
    _check_factors(default, factors)
    return tuple(float(b if f is None else d * f) for d, b, f in zip(default, base, factors, strict=True))


def long_entries(
    default: Sequence[int],
    steps: Sequence[int],
    epochs: int,
    *,
    long_cycle: Sequence[Factors],
    short_cycle: Sequence[Factors],
    epoch_factor: float,
) -> list[LongEntry]:
    """The base shapes of a run in order, each with its epochs.

    steps: the epochs at which the baseline's rate falls, from 0 on; epochs: its end. Stage k of L_k epochs goes through
    the long cycle once, shape i for L_k·b_i/Σ b of them with b its mean batch, so that all shapes get equally many
    updates. The last stage is at the finest shape, with as much of the updates saved as in the others. All epochs are
    then multiplied so that their sum is epochs·epoch_factor, and their cumulative sums rounded.
    """
    _check_steps(steps, epochs)
    check_positive(epoch_factor=epoch_factor)
    if not long_cycle:
        ends = [int(at * epoch_factor) for at in [*steps[1:], epochs]]
        return [
            LongEntry(k, tuple(default), 1, first, end)
            for k, (first, end) in enumerate(zip([0, *ends], ends, strict=False))
        ]
    shapes = [base_sizes(default, factors) for factors in long_cycle]
    means = [mean_batch(default, shape, short_cycle) for shape in shapes]
    lengths = [late - early for early, late in pairwise(steps)]
    spans = [length * mean / sum(means) for length in lengths for mean in means]
    saved = steps[-1] / sum(span / mean for span, mean in zip(spans, means * len(lengths), strict=True))
    spans.append((epochs - steps[-1]) / saved * means[-1])
    scale = epochs * epoch_factor / sum(spans)
    ends = [round(end) for end in accumulate(span * scale for span in spans)]
    at = [(k, shape) for k in range(len(lengths)) for shape in shapes] + [(len(lengths), shapes[-1])]
    total = math.prod(default)
    return [
        LongEntry(k, shape, _times(total / math.prod(shape), f"shape {shape}"), first, end)
        for (k, shape), first, end in zip(at, [0, *ends], ends, strict=False)
    ]


def entry_rates(entries: Sequence[LongEntry], gamma: float, *, halve: bool) -> list[tuple[int, float]]:
    """(first epoch, rate to the base rate) of each piece: γ^stage times the batch's factor.

    halve: as with a long cycle, the last stage is cut in two: its first half keeps the rate before it, so that the
    finest shape has that rate for longer. The short cycle changes no rate.
    """
    rates = [(entry.first, gamma**entry.stage * entry.factor) for entry in entries]
    if halve:
        first, own = rates.pop()
        rates += [(first, rates[-1][1]), ((first + entries[-1].end) // 2, own)]
    return rates


def batch_norm_rule(batch: float, base: int = 8) -> BatchNormRule:
    """How statistics range over `base` examples where a device has `batch`: f = batch/base.

    f > 1: a split BatchNorm of ⌊f⌋ parts; f < 1: a synchronised one over ⌊1/f⌋ devices; else a plain one. Where f or
    1/f is no whole number, and in the larger batches of the short cycle, they range over more or fewer.

    >>> batch_norm_rule(64), batch_norm_rule(2), batch_norm_rule(8)
    (BatchNormRule(kind='split', number=8), BatchNormRule(kind='sync', number=4), BatchNormRule(kind='plain', number=1))
    """
    check_positive(batch=batch)
    check_count(base=base)
    if batch == base:
        return BatchNormRule("plain", 1)
    return BatchNormRule("split", int(batch / base)) if batch > base else BatchNormRule("sync", int(base / batch))


def scale_range(scales: tuple[int, int], size: int, default: int) -> tuple[int, int]:
    """The pixels from which the short side is drawn before it is cut to `size`: the lower bound shrinks with the crop.

    scales: the range at the default crop. So a small crop is of the same extent, sampled more coarsely, or of less.

    >>> scale_range((256, 320), 112, 224)
    (128, 320)
    """
    check_count(size=size, default=default)
    low, high = scales
    check_count(scales=low)
    check_count(low, scales=high)
    return round(low * size / default), high


def stride_range(stride: int, frames: int, default: int) -> tuple[int, int]:
    """The strides, both ends among them, of which a clip of fewer frames draws one: up to the default clip's span.

    >>> stride_range(2, 8, 32), stride_range(2, 32, 32)
    ((2, 8), (2, 2))
    """
    check_count(stride=stride, frames=frames, default=default)
    check_count(frames, default=default)
    return stride, stride * (default // frames)


def _times(ratio: float, what: str) -> int:
    if round(ratio) < 1:
        raise InputError(f"{what} must not be so large that its batch rounds to 0, got {ratio:.3g} of the default")
    return round(ratio)


def _check_factors(default: Sequence[int], factors: Factors) -> None:
    if len(factors) != len(default):
        raise InputError(f"factors must be one for each of {len(default)} axes, got {tuple(factors)}")
    for factor in factors:
        if factor is not None:
            check_positive(factors=factor)


def _check_steps(steps: Sequence[int], epochs: int) -> None:
    for step in [*steps, epochs]:
        check_count(0, steps=step)
    right = len(steps) >= 2 and steps[0] == 0 and all(a < b for a, b in zip(steps, [*steps[1:], epochs], strict=True))
    if not right:
        raise InputError(
            f"steps must begin with 0 and rise to below epochs, with one stage at least, got {list(steps)} and {epochs}"
        )
