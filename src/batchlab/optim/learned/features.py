"""What small_fc_lopt sees of each weight, and the small network that looks at it (Metz et al. 2022, arXiv 2203.11860).

28 features of an element, in this order: g, w, three momenta m, v = EMA(g²), m/√(v + 1e-6), 1/√(v + 1e-6), g/√r̂ for
three factored averages r̂ of squares, their rows and columns, 1/√(rows + 1e-8), 1/√(columns + 1e-8), m/√r̂. Each is
divided by its root mean square over the whole tensor, √(1e-5 + mean x²); then 11 features of time follow, the same for
all elements and not divided: tanh(t/τ - 1), t = 0 at the first step. Up to t = 10⁵ steps are told apart.

Here the division and the features of time are folded into the first layer, which gives the same numbers for less work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

FEATURES = 28
TAUS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
INPUTS = FEATURES + len(TAUS)
Piece = tuple[slice, ...]


def factored_dims(shape: Sequence[int]) -> tuple[int, int] | None:
    """(d1, d0), the second largest and the largest dimension, of equals the last; None for vectors and numbers.

    >>> factored_dims((5, 3)), factored_dims((4, 3, 3, 3)), factored_dims((6, 6)), factored_dims((7,))
    ((1, 0), (3, 0), (0, 1), None)
    """
    if len(shape) < 2:
        return None
    d1, d0 = sorted(range(len(shape)), key=lambda d: shape[d])[-2:]
    return d1, d0


def time_features(t: int) -> list[float]:
    """tanh(t/τ - 1) for the eleven τ; t: steps taken before this one."""
    return [math.tanh(t / tau - 1) for tau in TAUS]


def safe_rsqrt(x: Tensor) -> Tensor:
    """1/√max(x, 1e-9); NaN stays."""
    return x.clamp(min=1e-9).rsqrt()


def row_factor(row: Tensor, row_mean: Tensor) -> Tensor:
    """1/√(row/mean): with the column's 1/√ it makes 1/√r̂."""
    return safe_rsqrt(row / (row_mean + 1e-9))


def features(
    w: Tensor,
    g: Tensor,
    momenta: Tensor,
    rms: Tensor,
    row: Tensor,
    column: Tensor,
    row_factors: Tensor | None,
) -> Tensor:
    """The 28 features, not yet divided, of shape (28, *w.shape).

    momenta: (3, *w.shape). row, column: as that, with 1 at the dimension they are means over. row_factors: as `row`;
    None for a vector, whose row and column both are the plain average of g².
    """
    inverse = (rms + 1e-6).rsqrt()
    if row_factors is None:
        by_g, by_m = safe_rsqrt(row + 1e-9), (row + 1e-6).rsqrt()
    else:
        by_g = by_m = row_factors * safe_rsqrt(column)
    shape = momenta.shape
    averages = [row, column, (row + 1e-8).rsqrt(), (column + 1e-8).rsqrt()]
    raw = [g[None], w[None], momenta, rms[None], momenta * inverse, inverse[None], by_g * g]
    return torch.cat([*raw, *(each.expand(shape) for each in averages), by_m * momenta])


def divided(layers: Sequence[Tensor], mean_squares: Tensor, time: Tensor) -> list[Tensor]:
    """The layers of a network that takes raw features: the first has taken in the division and the features of time.

    layers: weight (out, in) and bias of each in turn. mean_squares: (28,), over the whole tensor. time: (11,).
    """
    weight, bias, *rest = layers
    scale = (mean_squares + 1e-5).rsqrt()
    return [weight[:, :FEATURES] * scale, bias + weight[:, FEATURES:] @ time, *rest]


def network(layers: Sequence[Tensor], x: Tensor) -> Tensor:
    """Direction and magnitude, (2, n), of n elements' features (28, n): linear layers with ReLU between them."""
    count = x.shape[1]
    if count == 1:
        x = x.expand(-1, 2)  # one column alone would take another kernel, which sums in another order
    last = len(layers) // 2 - 1
    for index, (weight, bias) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
        x = torch.addmm(bias[:, None], weight, x)
        x = x.relu_() if index < last else x
    return x[:, :count]


def pieces(shape: Sequence[int], most: int | None) -> Iterator[Piece]:
    """Places of parts of at most `most` elements that make up a tensor; one empty place for the whole.

    >>> [piece for piece in pieces((3, 2), 4)]
    [(slice(0, 2, None),), (slice(2, 3, None),)]
    """
    if most is None or math.prod(shape) <= most:
        yield ()
        return
    inner = math.prod(shape[1:])
    if inner <= most:
        step = most // inner
        yield from ((slice(start, min(start + step, shape[0])),) for start in range(0, shape[0], step))
        return
    for index in range(shape[0]):
        yield from ((slice(index, index + 1), *rest) for rest in pieces(shape[1:], most))


def at(x: Tensor, piece: Piece, *, stacked: bool) -> Tensor:
    """The part of a tensor at a place; where it has 1 element for all, that one. stacked: behind a first dimension."""
    lead = int(stacked)
    places = [slice(None) if x.shape[d + lead] == 1 else each for d, each in enumerate(piece)]
    return x[(slice(None), *places) if stacked else tuple(places)] if piece else x
