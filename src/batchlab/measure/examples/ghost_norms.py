"""Squared norms of per-example gradients from what a layer took in and what came back to it.

A layer that is linear in its weight gives example i the gradient G_i = Σ_t b_t ⊗ a_t over the positions t at which it
was used. |G_i|² needs no G_i (Goodfellow 2015 for one position, Li et al. 2021 for many):
|G_i|² = Σ_{t,s} (a_t·a_s)(b_t·b_s). Where few positions make that the cheaper form it is used, else G_i is made for a
few examples at a time (Bu et al. 2022 choose likewise). Where a few random projections of it are enough, and cheaper
than both, they are taken (`projected_norms`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from batchlab.measure.examples.factors import (
    Dense,
    Factors,
    Piece,
    Vectors,
    Witness,
    products,
    row_squares,
    wide,
    wide_or_index,
    witness_of,
)
from batchlab.measure.examples.projected_norms import Projections, projected_squares

HALF = 64  # positions from which on two halves are faster than the whole


class Norms(NamedTuple):
    """squares: [n]. rule: "ghost", "instantiated" or "projected". witness: None where none was asked for."""

    squares: Tensor
    rule: str
    witness: Witness | None


class Means(NamedTuple):
    """memory_bytes: of temporary tensors. projections: to be taken where they pay; exact norms without."""

    memory_bytes: int
    projections: Projections | None = None


def piece_norms(piece: Piece, vectors: Vectors | None, means: Means) -> Norms:
    """|G_i|² of a parameter that was used once."""
    if isinstance(piece, Dense):
        return Norms(row_squares(piece.gradients.reshape(len(piece), -1)), "instantiated", piece.witness(vectors))
    rule, signs = _rule(piece, means.projections), None
    squares, witnesses = [], []
    for start, stop in _chunks(piece, _bytes(piece, rule, means.projections), means.memory_bytes):
        left, right = piece.chunk(start, stop)
        if rule != "instantiated":
            left, right = wide_or_index(left), wide_or_index(right)
        if piece.indexed:
            squares.append(_embedding_squares(left, right))
        elif rule == "projected" and means.projections is not None:
            signs = means.projections.signs(piece, left) if signs is None else signs
            squares.append(projected_squares(left, right, signs))
        elif rule == "ghost":
            squares.append(_gram_squares(left, right))
        else:
            squares.append(_squares_of(products(left, right)))
        witnesses.append(witness_of(left, right, vectors))
    return Norms(_joined(squares), rule, _sum(witnesses))


def joint_norms(pieces: Sequence[Piece], vectors: Vectors | None, means: Means) -> Norms:
    """|Σ_k G_ik|² of a parameter that was used several times, with the terms between its uses."""
    merged = _side_by_side(pieces)
    if merged is not None:
        return piece_norms(merged, vectors, means)
    size, squares = 8 * pieces[0].dense(0, 1).numel(), []
    for start, stop in _chunks(pieces[0], size, means.memory_bytes):
        gradients = pieces[0].dense(start, stop).reshape(stop - start, -1)
        for piece in pieces[1:]:
            gradients = gradients + piece.dense(start, stop).reshape(stop - start, -1)
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

    def with_embeddings(self, pieces: Sequence[Factors], vectors: Vectors | None, means: Means) -> Norms:
        """|G_out + G_in|², given the embedding's uses in the order of `picked`.

        Where |G_out|² is projected it can come out below 0.
        """
        merged = _side_by_side(pieces)
        if merged is None:
            raise ValueError("pieces must be an embedding's uses alone")
        inner = piece_norms(merged, vectors, means)
        _, c = merged.chunk(0, len(merged))
        cross = ((self.picked.mT @ wide(self.right)) * wide(c)).flatten(1).sum(1)
        squares = self.own.squares + inner.squares + 2 * cross
        squares = squares if self.own.rule == "projected" else _not_negative(squares)
        return Norms(squares, self.own.rule, _sum([self.own.witness, inner.witness]))


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


def _rule(piece: Factors, projections: Projections | None) -> str:
    """T²(R + C) multiplications for the two Gram matrices, T·R·C for the gradient itself."""
    if projections is not None and projections.pay(piece):
        return "projected"
    small = piece.positions * (piece.rows + piece.columns) < piece.rows * piece.columns
    return "ghost" if piece.indexed or piece.positions == 1 or small else "instantiated"


def _bytes(piece: Factors, rule: str, projections: Projections | None) -> int:
    """Held for one example: what its chunk takes, and Gram matrices, its gradient or projections of it."""
    made = 2 * piece.positions**2 if rule == "ghost" else piece.rows * piece.columns
    if piece.indexed:
        made = 2 * piece.positions * piece.columns
    if rule == "projected" and projections is not None:
        made = projections.count * (piece.positions + min(piece.rows, piece.columns))
    return piece.bytes + 4 * piece.blocks * made


def _chunks(piece: Piece, size: int, memory_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, min(len(piece), memory_bytes // max(1, size)))
    for start in range(0, len(piece), step):
        yield start, min(start + step, len(piece))


def _squares_of(gradients: Tensor) -> Tensor:
    """Of each of [n, ...], which may be overwritten."""
    if gradients.is_cuda:
        norms: Tensor = torch.linalg.vector_norm(gradients, dim=tuple(range(1, gradients.ndim)))
        return norms.square()
    return gradients.square_().sum(tuple(range(1, gradients.ndim)))


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
