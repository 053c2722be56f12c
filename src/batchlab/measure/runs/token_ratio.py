"""How many times the tokens one optimizer needs as another, at equal loss and batch size (Shah et al. 2025).

arXiv 2505.02222: R_L(B) = T_A(B)/T_B(B), T the tokens after which a run at batch size B first has a loss of L. A ratio
at one batch size, or at equal steps, says nothing of large batches: what counts is that R does not fall with B. Then
the advantage of the second lasts past any critical batch size; where it falls to 1 it was one of small batches only.

Whatever was tuned at one batch size and carried over by a rule tilts R: say what was tuned again. The loss is that of
training on fresh batches, smoothed, or of held-out data. Tokens may be examples everywhere, in one unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from batchlab.core.checks import check_count, check_inside, holds
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.curves.run_sets import RunSets, by_size

Curve = Sequence[tuple[float, float]]
T = TypeVar("T")

_FAR = 300.0  # of a logarithm: an interval so wide is none


@dataclass(frozen=True)
class TokenRatio(JsonNoun):
    """Two optimizers at one batch size and loss. tokens_a, tokens_b: geometric means over runs; None if not reached.

    ratio: tokens_a/tokens_b; NaN where either is not reached. extra: tokens_a - tokens_b, NaN likewise.
    """

    batch_size: float
    loss: float
    tokens_a: float | None
    tokens_b: float | None
    ratio: Estimate
    extra: float


def tokens_to_loss(curve: Curve, loss: float) -> float | None:
    """The tokens at which the running minimum of a curve first reaches `loss`, on the line between its points.

    curve: (tokens, loss) of one run, at ascending tokens. None where the loss is not reached, and of a curve with a
    value that is not finite anywhere: it diverged. Nothing is extrapolated: where the first point is as low as `loss`
    already its tokens are returned, and the truth may be less.

    >>> tokens_to_loss([(0, 4.0), (100, 3.0), (200, 3.5), (300, 2.0)], 2.5), tokens_to_loss([(0, 4.0), (100, 3.0)], 2.5)
    (250.0, None)
    """
    if not holds(math.isfinite, loss):
        raise InputError(f"loss must be finite, got {loss!r}")
    points = _checked(curve)
    if not all(math.isfinite(value) for _, value in points):
        return None
    before, least = points[0][0], math.inf
    for tokens, value in points:
        if value <= loss:
            if math.isinf(least):
                return tokens
            return before + (tokens - before) * (least - loss) / (least - value)
        before, least = tokens, min(least, value)
    return None


def smoothed(curve: Curve, window: int) -> list[tuple[float, float]]:
    """The means over `window` points in a row, of tokens as of losses, so that the curve is not shifted.

    The running minimum of a noisy curve is too low by its noise: smooth a training loss before reading it.

    >>> smoothed([(0, 4.0), (100, 3.0), (200, 2.0)], 2)
    [(50.0, 3.5), (150.0, 2.5)]
    """
    check_count(window=window)
    points = _checked(curve)
    if len(points) < window:
        raise InputError(f"window must be at most the curve's {len(points)} points, got {window}")
    rows = [points[i : i + window] for i in range(len(points) - window + 1)]
    return [tuple(math.fsum(column) / window for column in zip(*row, strict=True)) for row in rows]  # type: ignore[misc]


def token_ratio(
    curves_a: Mapping[float, Sequence[Curve]],
    curves_b: Mapping[float, Sequence[Curve]],
    losses: Sequence[float],
    *,
    coverage: float = 0.95,
) -> tuple[TokenRatio, ...]:
    """R_L(B) for every batch size and loss, by loss as given, then by batch size.

    curves_a, curves_b: batch size -> the curves of its runs, one a seed, of the two optimizers, with the same batch
    sizes. losses: each below the first point of every curve. coverage: of the intervals, which are Student's on ln T
    with each optimizer's scatter over seeds, pooled over batch sizes; not bounded where no size has two runs.

    A run that did not reach the loss needs more tokens than any that did: where such are fewer than half of a size's
    runs the median stands for the mean, else the size has no ratio.

    >>> runs_a = {8: [[(0, 4.0), (200, 2.0)]], 32: [[(0, 4.0), (600, 2.0)]]}
    >>> runs_b = {8: [[(0, 4.0), (100, 2.0)]], 32: [[(0, 4.0), (200, 2.0)]]}
    >>> [round(row.ratio.value, 6) for row in token_ratio(runs_a, runs_b, [3.0])]
    [2.0, 3.0]
    """
    check_inside(coverage=coverage)
    if set(curves_a) != set(curves_b) or not curves_a:
        raise InputError(f"both must have the same batch sizes, got {sorted(curves_a)} and {sorted(curves_b)}")
    rows = []
    for loss in losses:
        a, b = _sets(curves_a, loss), _sets(curves_b, loss)
        rows += [_ratio(float(size), float(loss), a, b, coverage) for size in sorted(curves_a)]
    return tuple(rows)


def advantage_lasts(rows: Iterable[TokenRatio]) -> bool | None:
    """Whether the second optimizer's advantage does not fall with batch size, of the rows of one loss.

    True if the interval at the largest batch size lies above 1 and below that of no smaller one; False if it does not;
    None where it is not known: fewer than two batch sizes, or an undefined ratio or unbounded interval at the largest.
    """
    known = sorted(rows, key=lambda row: row.batch_size)
    if len({row.loss for row in known}) > 1:
        raise InputError(f"rows must be of one loss, got {sorted({row.loss for row in known})}")
    if len(known) < 2 or not math.isfinite(known[-1].ratio.high - known[-1].ratio.low) or not known[-1].ratio.defined:
        return None
    last = known[-1].ratio
    return last.low > 1 and not any(row.ratio.defined and row.ratio.low > last.high for row in known[:-1])


def pareto(points: Iterable[T], key: Callable[[T], tuple[float, float]] | None = None) -> tuple[T, ...]:
    """The points that no other is better than in one number and at least as good in the other: less is better in both.

    As of (time, devices) of the runs that reach one loss, for each optimizer: the lower left envelope. key: a point's
    two numbers, if it is not those itself. Ascending in the first; equal points are all kept.

    >>> pareto([(3, 1), (1, 4), (2, 2), (3, 2), (2, 4)])
    ((1, 4), (2, 2), (3, 1))
    """
    found = []
    for point in points:
        pair = key(point) if key else point
        if not holds(lambda xy: len(xy) == 2 and not any(math.isnan(each) for each in xy), pair):
            raise InputError(f"a point must be two numbers, got {pair!r:.80}")
        x, y = pair  # type: ignore[misc]
        found.append((float(x), float(y), point))
    kept: list[tuple[float, float, T]] = []
    for x, y, point in sorted(found, key=lambda each: each[:2]):
        if not kept or y < kept[-1][1] or (x, y) == kept[-1][:2]:
            kept.append((x, y, point))
    return tuple(point for _, _, point in kept)


def _checked(curve: Curve) -> list[tuple[float, float]]:
    points = []
    for pair in curve:
        if not holds(lambda pair: len(pair) == 2 and [float(each) for each in pair], pair):
            raise InputError(f"curve must hold pairs (tokens, loss), got {pair!r:.80}")
        points.append((float(pair[0]), float(pair[1])))
        if not 0 <= points[-1][0] < math.inf or (len(points) > 1 and points[-1][0] <= points[-2][0]):
            raise InputError(f"curve must hold ascending tokens of at least 0, got {[x for x, _ in points[-2:]]}")
    if not points:
        raise InputError("curve must hold at least one pair (tokens, loss), got none")
    return points


def _sets(curves: Mapping[float, Sequence[Curve]], loss: float) -> RunSets:
    """ln T of the runs of each batch size."""
    sizes, tokens = [], []
    for size, runs in curves.items():
        if not len(runs):
            raise InputError(f"every batch size must have a curve, {size!r} has none")
        for curve in runs:
            found = tokens_to_loss(curve, loss)
            if found is not None and found == float(curve[0][0]):
                raise InputError(
                    f"losses must lie below the first point of every curve, got {loss!r}: it has that at once"
                )
            sizes.append(size)
            tokens.append(found)
    return by_size(sizes, tokens)


def _ratio(size: float, loss: float, a: RunSets, b: RunSets, coverage: float) -> TokenRatio:
    (i, tokens_a), (j, tokens_b) = _at(size, a), _at(size, b)
    if tokens_a is None or tokens_b is None:
        which = " and ".join(name for name, tokens in (("A", tokens_a), ("B", tokens_b)) if tokens is None)
        reason = f"undefined: half or more of the runs of {which} did not reach the loss"
        nothing = Estimate(math.nan, 0.0, math.inf, reason, coverage)
        return TokenRatio(size, loss, tokens_a, tokens_b, nothing, math.nan)
    gap = float(a.log_steps[i] - b.log_steps[j])
    half = _half_width(a, a.counts[i], b, b.counts[j], coverage)
    ends = (math.exp(gap - half), math.exp(gap + half)) if half < _FAR else (0.0, math.inf)
    ratio = Estimate(math.exp(gap), *ends, f"{int(a.counts[i])} and {int(b.counts[j])} runs", coverage)
    return TokenRatio(size, loss, tokens_a, tokens_b, ratio, tokens_a - tokens_b)


def _at(size: float, runs: RunSets) -> tuple[int, float | None]:
    """Where a batch size stands, and its tokens; None where it is left out."""
    places = [i for i, each in enumerate(runs.sizes) if each == size]
    return (places[0], math.exp(float(runs.log_steps[places[0]]))) if places else (-1, None)


def _half_width(a: RunSets, runs_a: float, b: RunSets, runs_b: float, coverage: float) -> float:
    """Of the interval of a difference of mean ln T, its degrees of freedom by Satterthwaite."""
    from scipy.special import stdtrit

    if not (a.free and b.free):
        return math.inf
    parts = [(runs.square_sum / runs.free / count, runs.free) for runs, count in ((a, runs_a), (b, runs_b))]
    total = math.fsum(part for part, _ in parts)
    if total == 0:
        return 0.0
    free = total**2 / math.fsum(part**2 / of for part, of in parts)
    return float(stdtrit(free, 0.5 + coverage / 2)) * math.sqrt(total)
