"""What a layer's use of a parameter says of each example's gradient: the gradients themselves, or their factors.

A layer that is linear in its weight gives example i the gradient G_i = Σ_t b_t ⊗ a_t over the positions t at which it
was used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def wide_or_index(tensor: Tensor) -> Tensor:
    """An index as it is, anything else `wide`."""
    return tensor if tensor.dtype == torch.int64 else wide(tensor)


def wide(tensor: Tensor) -> Tensor:
    """In float64 if it is, else in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def products(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ·right of [..., T, rows] and [..., T, columns], `wide`.

    On a GPU, where one is in half precision, as under autocast, both are taken so and summed in float32: the layer's
    own gradient is made of such products, which take a tenth of float32's time.
    """
    half = next((each.dtype for each in (left, right) if each.dtype in (torch.float16, torch.bfloat16)), None)
    if half is None or not left.is_cuda:
        return wide(left).mT @ wide(right)
    a, b = (each.to(half).flatten(0, -3) for each in (left, right))
    return torch.bmm(a.mT, b, out_dtype=torch.float32).view(*left.shape[:-2], left.shape[-1], right.shape[-1])


def row_squares(matrix: Tensor) -> Tensor:
    """Σ_k m_ik², [n]. As a sum: a product of a row and a column loses two digits more."""
    return matrix.square().sum(1)


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
    generator = torch.Generator("cpu").manual_seed(seed)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    both = torch.randn(rows + columns, generator=generator, dtype=dtype, device="cpu").to(device)
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
        if self.indexed:
            right = wide(right)
            out = right.new_zeros(len(left), self.rows, self.columns)
            return out.scatter_add_(1, left[:, :, None].expand_as(right), right)
        return products(left, right).flatten(1, 2)

    def witness(self, vectors: Vectors | None) -> Witness | None:
        """See `Witness`; None without vectors."""
        return witness_of(*self.chunk(0, self.examples), vectors)


Piece = Dense | Factors


def matrix_factors(left: Tensor, right: Tensor) -> Factors:
    """`Factors` of one block, from [n, T, rows] and [n, T, columns]."""
    (n, positions, rows), columns = left.shape, right.shape[2]
    return Factors(n, 1, positions, rows, columns, lambda i, j: (left[i:j, None], right[i:j, None]))


def row_factors(index: Tensor, right: Tensor, rows: int) -> Factors:
    """`Factors` of an embedding of `rows` rows, from int64 [n, T] and [n, T, columns]."""
    n, positions, columns = right.shape
    return Factors(n, 1, positions, rows, columns, lambda i, j: (index[i:j], right[i:j]), indexed=True)


def witness_of(left: Tensor, right: Tensor, vectors: Vectors | None) -> Witness | None:
    """The `Witness` of a chunk's factors; None without vectors."""
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
