"""The orthogonal matrix nearest to a given one, roughly, by matrix products alone (Jordan et al. 2024, Muon).

  X ← G/max(|G|, ε)          |G| Frobenius's norm; tall matrices are turned so that A is the smaller Gram matrix
  A = XXᵀ,  X ← aX + (bA + cA²)X          `steps` times

Each step takes every singular value x to ax + bx³ + cx⁵ and leaves the singular vectors. With Jordan's coefficients it
does not settle at 1: after five steps x in [0.01, 1] lands in [0.68, 1.21], and below 0.001 it stays small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchlab.core.errors import InputError

JORDAN = (3.4445, -4.7750, 2.0315)


class NewtonSchulz(NamedTuple):
    """How matrices are orthogonalised; the defaults are Jordan's and torch's.

    dtype: of the products; float16 overflows in A². eps: ε, the least norm that is divided by.
    """

    steps: int = 5
    coefficients: tuple[float, float, float] = JORDAN
    dtype: torch.dtype = torch.bfloat16
    eps: float = 1e-7


JORDANS = NewtonSchulz()


def orthogonalised(g: Tensor, how: NewtonSchulz = JORDANS) -> Tensor:
    """UVᵀ of G = USVᵀ, but for singular values between 0.68 and 1.21 instead of 1; of zeros, zeros.

    g: [..., rows, columns], each matrix of a stack by itself; unchanged. Returns the same shape in `how.dtype`. Costs
    `steps`·(4·n²·m + 2·n³) operations for n rows and m ≥ n columns. NaN spreads over the whole matrix. Not where the
    small singular directions are noise of rounding: they are raised by up to 3.44⁵ = 485.

    >>> o = orthogonalised(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), NewtonSchulz(dtype=torch.float64))
    >>> [round(x, 2) for x in o.diag().tolist()], o[0, 1].item()
    ([1.12, 0.68], 0.0)
    """
    if g.ndim < 2:
        raise InputError(f"g must have rows and columns, got shape {tuple(g.shape)}")
    if g.ndim > 3:
        return orthogonalised(g.flatten(0, -3), how).view(g.shape)
    a, b, c = how.coefficients
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(how.dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=how.eps)
    product = torch.addmm if g.ndim == 2 else torch.baddbmm
    for _ in range(how.steps):
        gram = x @ x.mT
        gram = product(gram, gram, gram, beta=b, alpha=c)
        x = product(x, gram, x, beta=a)
    return x.mT if tall else x


def orthogonality_error(o: Tensor) -> Tensor:
    """|OOᵀ - 1|/√n over the smaller side n: the RMS distance of the squared singular values from 1, for each matrix.

    >>> orthogonality_error(torch.eye(3, 5)).item()
    0.0
    """
    x = (o.mT if o.size(-2) > o.size(-1) else o).to(torch.promote_types(o.dtype, torch.float32))
    identity = torch.eye(x.size(-2), dtype=x.dtype, device=x.device)
    return (x @ x.mT - identity).square().sum((-2, -1)).div(max(x.size(-2), 1)).sqrt()
