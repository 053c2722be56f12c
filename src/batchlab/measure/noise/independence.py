"""Whether examples' gradients are independent: 1/E|g_b|² against the batch b (Zhao et al. 2024, arXiv 2406.18533).

If the gradients of b examples have mean zero and are independent, that of their mean has E|g_b|² = E|g_1|²/b: the
inverse grows as b, b updates add up like one of √b times the size, and Adam's square-root rule with β^b is exact. It
flattens where a batch's gradients have a part in common: the true gradient, from the noise scale on, for E|g_b|² = |G|²
+ tr(Σ)/b; or what neighbours in the stream share, as views of one place do. Where it is flat more examples add nothing
to an update's direction, and the linear rule is the one that keeps step.

Moments are about zero, as the hypothesis has them. Centred, the variance of a batch drawn anew goes as 1/b for any
data. That the paper's figure ("inverse variance", straight up to about 32 views) is not centred is our reading of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.measure.norms import sq_norm, total
from batchlab.measure.ratio import RatioOfMeans
from batchlab.parallel.shards import is_spread

FEWEST_BLOCKS = 8
HALF_GROWTH = math.sqrt(2.0)


@dataclass(frozen=True)
class IndependenceCurve(JsonNoun):
    """How the inverse of E|g_b|² grows with the batch.

    batch_sizes: b, powers of two from 1. inverse: E|g_1|²/E|g_b|², which is b for independent gradients, 1 for one
    gradient that all share. gains: E|g_b|²/E|g_2b|², what doubling each b but the last gives: 2 for independent
    gradients, 1 where it is flat, over 2 where neighbours cancel. Each with its own interval.
    plateau: the first b whose doubling is certain, by its interval, to give less than √2, half of the growth; None if
    there is none in reach. examples: gradients seen.
    """

    batch_sizes: tuple[int, ...]
    inverse: tuple[Estimate, ...]
    gains: tuple[Estimate, ...]
    plateau: int | None
    examples: int


def gradient_independence_curve(
    gradients: Iterable[Tensor | Sequence[Tensor | None]], *, coverage: float = 0.95
) -> IndependenceCurve:
    """The curve from the gradients of single examples, in the order in which a batch takes them, at fixed weights.

        def examples():
            for x, y in data:
                model.zero_grad()
                loss(model(x), y).backward()
                yield [p.grad for p in model.parameters()]

    gradients: each a tensor, or one for each parameter, None for no gradient; of one micro-batch each, a "b" counts
    micro-batches. They are summed in pairs, pairs of pairs and so on, which holds log2 of their number in memory. Up to
    the largest b of which there are 8 blocks; at least 16 gradients. coverage: of the intervals (`RatioOfMeans`), for
    which blocks are taken as independent of each other: what is shared beyond a block is not seen in them.

    All coordinates count alike, as in |g|²; Adam's do not. Raises `InputError` for too few gradients, one that is not
    finite or of another shape, or is spread over ranks.

    >>> import torch
    >>> alone = torch.eye(16)  # each example moves a parameter of its own
    >>> curve = gradient_independence_curve(alone)
    >>> [round(each.value, 6) for each in curve.inverse], curve.plateau
    ([1.0, 2.0], None)
    >>> gradient_independence_curve(torch.ones(16, 4)).plateau
    1
    """
    levels = [_Level(coverage)]
    number = 0
    for number, gradient in enumerate(gradients, 1):
        block = _Block(_parts(gradient, number), 1)
        if not math.isfinite(block.square):
            raise InputError(f"gradient {number} is not finite")
        _add(levels, block, coverage)
    reached = [level for level in levels if level.blocks >= FEWEST_BLOCKS]
    if len(reached) < 2:
        raise InputError(f"gradients must be at least {2 * FEWEST_BLOCKS}, for two sizes of batch, got {number}")
    inverse = (Estimate(1.0, 1.0, 1.0, "by definition", coverage), *(level.inverse.ratio() for level in reached[1:]))
    gains = tuple(level.gain.ratio() for level in reached[1:])
    sizes = tuple(2**place for place in range(len(reached)))
    flat = [size for size, gain in zip(sizes, gains, strict=False) if gain.high < HALF_GROWTH]
    return IndependenceCurve(sizes, inverse, gains, flat[0] if flat else None, number)


Parts = list[Tensor | None]


class _Block:
    """Over a block of examples: the sum of their gradients, |g|² of their mean, and the sum of each example's |g|²."""

    def __init__(self, parts: Parts, size: int, singles: float | None = None) -> None:
        self.parts, self.size = parts, size
        self.square = total([sq_norm(part) for part in parts if part is not None]) / size**2
        self.singles = self.square if singles is None else singles


class _Level:
    """Blocks of one size: the one that waits for its neighbour, and the ratios to smaller batches."""

    def __init__(self, coverage: float) -> None:
        self.waiting: _Block | None = None
        self.blocks = 0
        self.inverse, self.gain = RatioOfMeans(coverage=coverage), RatioOfMeans(coverage=coverage)


def _add(levels: list[_Level], block: _Block, coverage: float) -> None:
    """A new example's block, merged upwards with the neighbours that wait for it."""
    for place in range(len(levels) + 1):
        if place == len(levels):
            levels.append(_Level(coverage))
        level = levels[place]
        level.blocks += 1
        if level.waiting is None:
            level.waiting = block
            return
        left, level.waiting = level.waiting, None
        halves = (left.square + block.square) / 2
        block = _Block(_sum(left.parts, block.parts), 2 * block.size, left.singles + block.singles)
        if place + 1 == len(levels):
            levels.append(_Level(coverage))
        levels[place + 1].gain.update(halves, block.square)
        levels[place + 1].inverse.update(block.singles / block.size, block.square)


def _parts(gradient: Tensor | Sequence[Tensor | None], number: int) -> Parts:
    """A copy of one example's gradient, in float32 at least."""
    given = [gradient] if isinstance(gradient, Tensor) else list(gradient)
    parts: Parts = []
    for part in given:
        if part is not None and is_spread(part):
            raise InputError(f"gradient {number} is spread over ranks: give the whole tensors")
        if part is not None and not part.is_floating_point():
            raise InputError(f"gradient {number} must be of real floating-point numbers, got {part.dtype}")
        parts.append(None if part is None else _wide(part))
    return parts


def _wide(part: Tensor) -> Tensor:
    wide = part.detach()
    return wide.clone() if wide.element_size() >= 4 else wide.float()


def _sum(left: Parts, right: Parts) -> Parts:
    shapes = [[None if part is None else tuple(part.shape) for part in parts] for parts in (left, right)]
    if len(left) != len(right) or any(a != b for a, b in zip(*shapes, strict=True) if a is not None and b is not None):
        raise InputError(f"gradients must all be of the same shapes, got {shapes[0]} and {shapes[1]}")
    return [b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True)]
