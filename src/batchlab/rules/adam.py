"""Adam's hyperparameters as the batch grows κ times, so that an example weighs the same.

The gradient of a κ times larger batch has 1/κ of the variance, so √v shrinks by √κ and η̂ = √κ·η, ε̂ = ε/√κ. The
averages keep their memory in examples: exactly by β̂ = β^κ ("half_life", Grendel-GS, Zhao et al. 2024, arXiv
2406.18533), to first order in κ(1 - β) by β̂ = 1 - κ(1 - β) ("sde", Malladi et al. 2022, arXiv 2205.10287; Busbridge
et al. 2023, arXiv 2307.13813). Holds where noise dominates the gradient: far below the noise scale. Near it and above,
β₁ also carries speed from update to update, and moving it with the batch costs updates: there keep the betas.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from batchlab.core.checks import check_not_negative, check_positive, check_share, holds
from batchlab.core.errors import InputError

BetaRule = Literal["half_life", "sde"]


class AdamSettings(NamedTuple):
    """Adam's hyperparameters, by torch's names."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float


def adam_for_batch(
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    *,
    kappa: float,
    beta_rule: BetaRule = "half_life",
) -> AdamSettings:
    """All of them moved together, for a batch κ times as large (κ < 1: smaller).

    The learning rate goes by the square root; `rules.learning_rate.surge` is the law that knows where that ends.

    >>> adam_for_batch(1e-3, kappa=4)
    AdamSettings(learning_rate=0.002, betas=(0.6561, 0.996005996001), eps=5e-09)
    """
    check_positive(learning_rate=learning_rate, kappa=kappa)
    if not holds(lambda pair: len(pair) == 2, betas):
        raise InputError(f"betas must be two numbers in [0, 1], got {betas!r}")
    first, second = (scale_beta(beta, kappa, beta_rule=beta_rule) for beta in betas)
    return AdamSettings(learning_rate * math.sqrt(kappa), (first, second), scale_eps(eps, kappa))


def scale_beta(beta: float, kappa: float, *, beta_rule: BetaRule = "half_life") -> float:
    """β^κ, or 1 - κ(1 - β), which is refused where κ(1 - β) > 1. κ = 1 changes no bit."""
    check_share(beta=beta)
    check_positive(kappa=kappa)
    if beta_rule == "half_life":
        return float(beta**kappa)
    if beta_rule != "sde":
        raise InputError(f'beta_rule must be "half_life" or "sde", got {beta_rule!r}')
    if kappa * (1 - beta) > 1:
        raise InputError(f"kappa*(1 - beta) must be at most 1, got {kappa!r}*(1 - {beta!r}): beta would be negative")
    return beta if kappa == 1 else 1 - kappa * (1 - beta)


def scale_eps(eps: float, kappa: float) -> float:
    """ε/√κ, which keeps ε's share in √v + ε."""
    check_not_negative(eps=eps)
    check_positive(kappa=kappa)
    return eps / math.sqrt(kappa)
