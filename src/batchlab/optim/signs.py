"""The sign of a tensor's entries, NaN where the entry is not finite: torch's own is 0 for NaN, and would hide it."""

from __future__ import annotations

import torch
from torch import Tensor


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; NaN for NaN and infinities.

    >>> sign(torch.tensor([-3.0, 0.0, 0.5, torch.nan, torch.inf]))
    tensor([-1.,  0.,  1., nan, nan])
    """
    return x.sign().add_(x * 0)


def signs(xs: list[Tensor]) -> list[Tensor]:
    """`sign` of each."""
    found = list(torch._foreach_sign(xs))
    torch._foreach_add_(found, torch._foreach_mul(xs, 0.0))
    return found
