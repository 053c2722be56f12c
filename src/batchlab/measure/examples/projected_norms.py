"""|G_i|² of each example's gradient from a few random projections of it (Hutchinson 1990).

For a vector u of independent random signs E|uᵀG|² = |G|². A layer that is linear in its weight has G = Σ_t b_t ⊗ a_t,
so that uᵀG = Σ_t (u·b_t) a_t: k projections cost k·T·(R + C) multiplications, where G itself costs T·R·C. One draw
serves all examples of a pass. The sum over them is then off by the relative variance 2/(k·r) at most,
r = tr(M)²/tr(M²) of M = Σ_i G_i G_iᵀ, which is at least 1 and mostly far more; layers and passes are independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchlab.measure.examples.factors import Factors

ENOUGH = 8


class Projections:
    """Random signs for as many projections of each gradient, drawn anew in each pass.

    count: how many; 8 are batchlab's own choice: on a byte transformer they make tr(Σ) of one batch of 64 vary by 7 %,
    where it varies by 25 % from batch to batch, and the noise scale's spread grow by 4 %.
    """

    def __init__(self, count: int = ENOUGH) -> None:
        self.count, self._generator = count, torch.Generator("cpu")

    def begin(self, passes: int) -> None:
        """Before pass number `passes`, on which alone its signs depend."""
        self._generator.manual_seed(passes)

    def pay(self, piece: Factors) -> bool:
        """Whether they are cheaper than both exact forms, by a factor of two for products as narrow as these."""
        both = piece.rows + piece.columns
        return not piece.indexed and 2 * self.count * both < min(piece.positions * both, piece.rows * piece.columns)

    def signs(self, piece: Factors, like: Tensor) -> Tensor:
        """±1 for the longer side, whose product with them is one for all examples: [blocks, max(rows, columns), k]."""
        size = (piece.blocks, max(piece.rows, piece.columns), self.count)
        bits = torch.randint(2, size, generator=self._generator, dtype=torch.int8, device="cpu")
        return bits.to(like.device, like.dtype).mul_(2).sub_(1)


def projected_squares(left: Tensor, right: Tensor, signs: Tensor) -> Tensor:
    """Σ_k |u_kᵀG_i|²/K of a chunk, [c], of left [c, blocks, T, rows] and right [c, blocks, T, columns].

    >>> left, right = torch.randn(2, 5, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    >>> every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).T  # all signs there are: no chance is left
    >>> torch.allclose(projected_squares(left, right, every[None]), (left.mT @ right).square().sum((1, 2, 3)))
    True
    """
    if left.shape[3] < right.shape[3]:
        left, right = right, left
    if len(signs) == 1:
        projected = (left.flatten(0, 2) @ signs[0]).view(*left.shape[:3], -1)
    else:
        projected = left @ signs
    return (projected.mT @ right).square_().sum((1, 2, 3)).div_(signs.shape[2])
