"""The decay of a moving average of the weights as the batch changes: ρ̂ = ρ^κ (Busbridge et al. 2023, arXiv 2307.13813).

ζ <- ρζ + (1 - ρ)θ at each update. What stays the same is the half-life in examples, B·ln ½/ln ρ. Holds together with
the optimizer's own rule, while one update moves the weights little. For κ(1 - ρ) near 1 the average has no memory left.
"""

from __future__ import annotations

import math

from batchlab.core.checks import check_inside, check_positive, check_share


def scale_decay(decay: float, kappa: float) -> float:
    """ρ^κ, for a batch κ times as large; also for an average taken every κ updates.

    >>> round(scale_decay(0.99, 8), 6), scale_decay(1.0, 8), scale_decay(0.0, 8)
    (0.922745, 1.0, 0.0)
    """
    check_share(decay=decay)
    check_positive(kappa=kappa)
    return float(decay**kappa)


def half_life_examples(decay: float, batch_size: float) -> float:
    """B·ln ½/ln ρ: after so many examples a weight counts half as much. 0 < ρ < 1."""
    check_inside(decay=decay)
    check_positive(batch_size=batch_size)
    return batch_size * math.log(0.5) / math.log(decay)


def decay_for_half_life(half_life_examples: float, batch_size: float) -> float:
    """ρ = ½^(B/h): the inverse of `half_life_examples`.

    >>> decay_for_half_life(1000, 500) ** 2
    0.5000000000000001
    """
    check_positive(half_life_examples=half_life_examples, batch_size=batch_size)
    return float(0.5 ** (batch_size / half_life_examples))


def scale_momentum(momentum: float, kappa: float) -> float:
    """m̂ = 1 - (1 - m)^κ, for averages that state the weight of the new value, as PyTorch's BatchNorm does.

    A library extension of the rule: computed so that a small m loses no digits.
    """
    check_share(momentum=momentum)
    check_positive(kappa=kappa)
    return 1.0 if momentum == 1 else -math.expm1(kappa * math.log1p(-momentum))
