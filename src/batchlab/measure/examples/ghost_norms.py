"""Squared norms of per-example gradients from what a layer took in and what came back to it.

A layer that is linear in its weight gives example i the gradient G_i = Σ_t b_t ⊗ a_t over the positions t at which it
was used. |G_i|² needs no G_i (Goodfellow 2015 for one position, Li et al. 2021 for many):
|G_i|² = Σ_{t,s} (a_t·a_s)(b_t·b_s). Where few positions make that the cheaper form it is used, else G_i is made for a
few examples at a time (Bu et al. 2022 choose likewise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

HALF = 64  # positions from which on two halves are faster than the whole


def wide_or_index(tensor: Tensor) -> Tensor:
    """An index as it is, anything else `wide`."""
    return tensor if tensor.dtype == torch.int64 else wide(tensor)


def wide(tensor: Tensor) -> Tensor:
    """In float64 if it is, else in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


class Witness(NamedTuple):
    """uᵀ(Σ_i G_i)v from the pieces, to be held against uᵀGv of the gradient G that autograd gave.

    value: the number itself. squares, absolute: Σ|term|² and Σ|term| of the terms that it is the sum of, which tell
    how far rounding may carry it; where the terms are sums themselves, squares is about their own terms.
    """

    value: Tensor
    squares: Tensor
    absolute: Tensor


class Vectors(NamedTuple):
    """The fixed u and v of a parameter, seen as a matrix: its first dimension, and all others as one."""

    u: Tensor
    v: Tensor

    def of(self, gradient: Tensor) -> Tensor:
        """uᵀGv of a dense or sparse gradient."""
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            return torch.dot(self.u[gradient.indices()[0]], wide(gradient.values()).flatten(1) @ self.v)
        return torch.dot(self.u, wide(gradient).reshape(len(self.u), -1) @ self.v)

    def spread(self, gradient: Tensor) -> Tensor:
        """√(Σ(u_j G_jk v_k)²), what independent errors of G's entries would amount to."""
        squares = (gradient.to_dense() if gradient.is_sparse else gradient).float().square()
        return torch.dot(self.u.square(), squares.reshape(len(self.u), -1) @ self.v.square()).sqrt()


def draw_vectors(shape: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int) -> Vectors:
    """Normal u and v for a parameter of `shape`, the same for the same seed."""
    rows, columns = (shape[0] if shape else 1), math.prod(shape[1:])
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    both = torch.randn(rows + columns, generator=generator, dtype=dtype).to(device)
    return Vectors(both[:rows], both[rows:] if len(shape) > 1 else torch.ones_like(both[rows:]))


@dataclass
class Dense:
    """Gradients [n, *shape] of n examples that are small enough to be held: of biases and norm layers.

    terms: what was summed to make them, or numbers of that size: they tell how far rounding may carry the sums.
    """

    gradients: Tensor
    terms: Tensor

    def __len__(self) -> int:
        return len(self.gradients)

    def dense(self, start: int, stop: int) -> Tensor:
        """Those of the examples start..stop."""
        return self.gradients[start:stop]

    def witness(self, vectors: Vectors | None) -> Witness | None:
        """See `Witness`; None without vectors."""
        if vectors is None:
            return None
        terms = self.gradients.sum(0).reshape(len(vectors.u), -1) * vectors.u[:, None] * vectors.v
        return Witness(terms.sum(), row_squares(self.terms.reshape(1, -1))[0], terms.abs().sum())


@dataclass
class Factors:
    """G_i = Σ_t left_t ⊗ right_t, each block of rows for itself.

    chunk(start, stop): left [c, blocks, T, rows] and right [c, blocks, T, columns] of those examples; where indexed,
    left is int64 [c, T], the rows of an embedding, and right [c, T, columns]. bytes: of what one example's chunk takes.
    """

    examples: int
    blocks: int
    positions: int
    rows: int
    columns: int
    chunk: Callable[[int, int], tuple[Tensor, Tensor]]
    indexed: bool = False
    bytes: int = 0

    def __len__(self) -> int:
        return self.examples

    def dense(self, start: int, stop: int) -> Tensor:
        """Σ_t left_t ⊗ right_t, [c, blocks·rows, columns]."""
        left, right = self.chunk(start, stop)
        right = wide(right)
        if self.indexed:
            out = right.new_zeros(len(left), self.rows, self.columns)
            return out.scatter_add_(1, left[:, :, None].expand_as(right), right)
        return (wide(left).mT @ right).flatten(1, 2)

    def witness(self, vectors: Vectors | None) -> Witness | None:
        """See `Witness`; None without vectors."""
        return _terms(*self.chunk(0, self.examples), vectors)


Piece = Dense | Factors


def matrix_factors(left: Tensor, right: Tensor) -> Factors:
    """`Factors` of one block, from [n, T, rows] and [n, T, columns]."""
    (n, positions, rows), columns = left.shape, right.shape[2]
    return Factors(n, 1, positions, rows, columns, lambda i, j: (left[i:j, None], right[i:j, None]))


def row_factors(index: Tensor, right: Tensor, rows: int) -> Factors:
    """`Factors` of an embedding of `rows` rows, from int64 [n, T] and [n, T, columns]."""
    n, positions, columns = right.shape
    return Factors(n, 1, positions, rows, columns, lambda i, j: (index[i:j], right[i:j]), indexed=True)


def _terms(left: Tensor, right: Tensor, vectors: Vectors | None) -> Witness | None:
    if vectors is None:
        return None
    second = (wide(right) @ vectors.v).flatten()
    if left.dtype == torch.int64:
        first = vectors.u[left]
    elif left.shape[1] == 1:
        first = wide(left) @ vectors.u
    else:
        first = wide(left) @ vectors.u.view(left.shape[1], -1, 1)
    terms = first.flatten() * second
    return Witness(terms.sum(), torch.dot(terms, terms), terms.abs().sum())


class Norms(NamedTuple):
    """squares: [n]. rule: "ghost" or "instantiated". witness: None where none was asked for."""

    squares: Tensor
    rule: str
    witness: Witness | None


def piece_norms(piece: Piece, vectors: Vectors | None, memory_bytes: int) -> Norms:
    """|G_i|² of a parameter that was used once."""
    if isinstance(piece, Dense):
        return Norms(row_squares(piece.gradients.flatten(1)), "instantiated", piece.witness(vectors))
    ghost = _gram_is_cheaper(piece)
    squares, witnesses = [], []
    for start, stop in _chunks(piece, _bytes(piece, ghost), memory_bytes):
        left, right = map(wide_or_index, piece.chunk(start, stop))
        if piece.indexed:
            squares.append(_embedding_squares(left, right))
        elif ghost:
            squares.append(_gram_squares(left, right))
        else:
            squares.append((left.mT @ right).square_().sum((1, 2, 3)))
        witnesses.append(_terms(left, right, vectors))
    return Norms(_joined(squares), "ghost" if ghost else "instantiated", _sum(witnesses))


def joint_norms(pieces: Sequence[Piece], vectors: Vectors | None, memory_bytes: int) -> Norms:
    """|Σ_k G_ik|² of a parameter that was used several times, with the terms between its uses."""
    merged = _side_by_side(pieces)
    if merged is not None:
        return piece_norms(merged, vectors, memory_bytes)
    size, squares = 8 * pieces[0].dense(0, 1).numel(), []
    for start, stop in _chunks(pieces[0], size, memory_bytes):
        gradients = pieces[0].dense(start, stop).flatten(1)
        for piece in pieces[1:]:
            gradients = gradients + piece.dense(start, stop).flatten(1)
        squares.append(row_squares(gradients))
    return Norms(_joined(squares), "instantiated", _sum([piece.witness(vectors) for piece in pieces]))


@dataclass
class TiedOutput:
    """What is kept of an output layer's use of an embedding's weight: [n, T, S] numbers and not [n, T, rows].

    Between G_out = Σ_t b_t ⊗ a_t and G_in = Σ_s e_{row s} ⊗ c_s stands Σ_{t,s} b_t[row s] (a_t·c_s).
    picked: b_t[row s]. right: a. own: |G_out|² and its witness.
    """

    picked: Tensor
    right: Tensor
    own: Norms

    def with_embeddings(self, pieces: Sequence[Factors], vectors: Vectors | None, memory_bytes: int) -> Norms:
        """|G_out + G_in|², given the embedding's uses in the order of `picked`."""
        merged = _side_by_side(pieces)
        if merged is None:
            raise ValueError("pieces must be an embedding's uses alone")
        inner = piece_norms(merged, vectors, memory_bytes)
        _, c = merged.chunk(0, len(merged))
        cross = ((self.picked.mT @ wide(self.right)) * wide(c)).flatten(1).sum(1)
        return Norms(
            _not_negative(self.own.squares + inner.squares + 2 * cross),
            self.own.rule,
            _sum([self.own.witness, inner.witness]),
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _sum(witnesses: Sequence[Witness | None]) -> Witness | None:
    known = [witness for witness in witnesses if witness is not None]
    if len(known) < 2:
        return known[0] if known else None
    return Witness(*(torch.stack(part).sum() for part in zip(*known, strict=True)))


def _not_negative(squares: Tensor) -> Tensor:
    """Only rounding can make a squared norm negative. NaN stays."""
    return squares.clamp_min(0)


def _side_by_side(pieces: Sequence[Piece]) -> Factors | None:
    """Uses of one weight as one use at more positions, where their factors are of one kind."""
    factors = [piece for piece in pieces if isinstance(piece, Factors)]
    if len(factors) < len(pieces) or len({(piece.indexed, piece.blocks) for piece in factors}) > 1:
        return None
    first, dim = factors[0], 1 if factors[0].indexed else 2
    if len(factors) == 1:
        return first

    def chunk(start: int, stop: int) -> tuple[Tensor, Tensor]:
        lefts, rights = zip(*(piece.chunk(start, stop) for piece in factors), strict=True)
        return torch.cat(lefts, dim), torch.cat(rights, dim)

    positions = sum(piece.positions for piece in factors)
    held = sum(piece.bytes for piece in factors) + 4 * positions * first.blocks * (first.rows + first.columns)
    size = (first.examples, first.blocks, positions, first.rows, first.columns)
    return Factors(*size, chunk, first.indexed, held)


def _gram_is_cheaper(piece: Factors) -> bool:
    """T²(R + C) multiplications for the two Gram matrices, T·R·C for the gradient itself."""
    small = piece.positions * (piece.rows + piece.columns) < piece.rows * piece.columns
    return piece.indexed or piece.positions == 1 or small


def _bytes(piece: Factors, ghost: bool) -> int:
    """Held for one example: what its chunk takes, and Gram matrices or its gradient."""
    made = 2 * piece.positions**2 if ghost else piece.rows * piece.columns
    if piece.indexed:
        made = 2 * piece.positions * piece.columns
    return piece.bytes + 4 * piece.blocks * made


def _chunks(piece: Piece, size: int, memory_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, min(len(piece), memory_bytes // max(1, size)))
    for start in range(0, len(piece), step):
        yield start, min(start + step, len(piece))


def row_squares(matrix: Tensor) -> Tensor:
    """Σ_k m_ik², [n]. As a sum: a product of a row and a column loses two digits more."""
    return matrix.square().sum(1)


def _gram_squares(left: Tensor, right: Tensor) -> Tensor:
    if left.shape[2] == 1:
        return (left.square().sum((2, 3)) * right.square().sum((2, 3))).sum(1)
    blocks = _gram_dot(left.flatten(0, 1), right.flatten(0, 1))
    return _not_negative(blocks.view(len(left), -1).sum(1))


def _gram_dot(left: Tensor, right: Tensor) -> Tensor:
    """Σ_{t,s} (LLᵀ)_ts (RRᵀ)_ts. Both are symmetric: from 128 positions on, a CPU gains by making half of them once."""
    n, positions = left.shape[:2]
    half = positions // 2
    if not left.is_cpu or positions % 2 or half < HALF:
        return torch.bmm(left, left.mT).mul_(torch.bmm(right, right.mT)).sum((1, 2))
    halves = [side.reshape(2 * n, half, -1) for side in (left, right)]
    first, second = (torch.bmm(side[:, :half], side[:, half:].mT) for side in (left, right))
    return _gram_dot(*halves).view(n, 2).sum(1).add_(first.mul_(second).sum((1, 2)), alpha=2)


def _embedding_squares(index: Tensor, right: Tensor) -> Tensor:
    """Positions of one example that meet in one row are summed before they are squared."""
    n, rows = len(index), index.max() + 1
    found, where = torch.unique(index + rows * torch.arange(n, device=index.device)[:, None], return_inverse=True)
    sums = right.new_zeros(len(found), right.shape[2]).index_add_(0, where.flatten(), right.flatten(0, 1))
    return right.new_zeros(n).index_add_(0, found // rows, sums.square().sum(1))


def unfold(input: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """The patches [N, C, L, ∏kernel] of a padded input [N, C, *spatial], in the order of a convolution's output."""
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        input = input.unfold(2 + dim, gap * (size - 1) + 1, step)[..., ::gap]
    spatial = len(kernel)
    return input.reshape(*input.shape[:2], math.prod(input.shape[2 : 2 + spatial]), math.prod(kernel))


def pad_for(padding: str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """What `torch.nn.functional.pad` needs, the last dimension first."""
    sides: list[int] = []
    for dim in reversed(range(len(kernel))):
        if padding == "valid":
            sides += [0, 0]
        elif padding == "same":
            both = dilation[dim] * (kernel[dim] - 1)
            sides += [both // 2, both - both // 2]
        else:
            sides += [int(padding[dim])] * 2
    return sides


def padded(input: Tensor, sides: list[int]) -> Tensor:
    """With zeros on its sides."""
    return F.pad(input, sides) if any(sides) else input
