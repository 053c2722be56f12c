"""Whether the uses that were seen make up a parameter's gradient, by what random vectors say of both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchlab.measure.examples.factors import wide
from batchlab.measure.examples.layer_uses import Part


class GradientCheck(NamedTuple):
    """The numbers that tell whether the uses that were seen make up a parameter's gradient, still on their device.

    eps: of the numbers that were summed; fine: of the sums, over so many positions.
    """

    parameter: int
    eps: float
    numbers: list[Tensor]
    fine: float = 0.0
    positions: int = 0

    def fails(self, numbers: list[float]) -> bool:
        """Whether uᵀGv and uᵀ(ΣG_i)v differ by more than rounding explains; not where one is not finite."""
        if len(numbers) == 1:
            return numbers[0] > 0
        value, expected, squares, absolute = numbers[:4]
        spread = max(squares, 0.0) ** 0.5 + abs(value)
        allowed = self.fine * (8 * self.positions**0.5 * spread + 8 * absolute)
        if self.eps > self.fine:
            allowed += 4 * self.eps * (spread + numbers[4])
        return bool(abs(value - expected) > allowed)


def outside(gradient: Tensor, parts: list[Part]) -> Tensor:
    """The norm of the gradient outside the parts, which must be 0."""
    rest = gradient.detach().clone()
    for part in parts:
        part.of(rest).zero_()
    norm: Tensor = torch.linalg.vector_norm(wide(rest))
    return norm
