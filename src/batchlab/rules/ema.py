"""The decay of a moving average of the weights as the batch changes: ρ̂ = ρ^κ (Busbridge et al. 2023, arXiv 2307.13813).

ζ <- ρζ + (1 - ρ)θ at each update. What stays the same is the half-life in examples, B·ln ½/ln ρ. Holds together with
the optimizer's own rule (`with_optimizer`), while one update moves the weights little. For κ(1 - ρ) near 1 the average
has no memory left. A ρ that follows a schedule is moved point by point, at the same number of examples.

For a gradient that changes slowly, κ updates of (θ, ζ, g) are the κ-th power of one, and one scaled update differs
from them by δ alone (`scaling_error`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from batchlab.core.checks import check_inside, check_not_negative, check_positive, check_share
from batchlab.core.errors import InputError
from batchlab.rules.adam import BetaRule, scale_beta, scale_eps
from batchlab.rules.weight_decay import scale_weight_decay

Optimizer = Literal["sgd", "adam", "adamw", "rmsprop"]


def scale_decay(decay: float, kappa: float) -> float:
    """ρ^κ, for a batch κ times as large; also for an average taken every κ updates.

    >>> round(scale_decay(0.99, 8), 6), scale_decay(1.0, 8), scale_decay(0.0, 8)
    (0.922745, 1.0, 0.0)
    """
    check_share(decay=decay)
    check_positive(kappa=kappa)
    return float(decay**kappa)


def scaling_error(decay: float, kappa: float, *, learning_rate: float) -> float:
    """δ = -η·(κ - (1 - ρ^κ)/(1 - ρ)), per unit of a constant gradient: about -ηκ(κ - 1)(1 - ρ)/2. 0 <= ρ < 1.

    What κ updates of η and ρ put into ζ and one update of κη and ρ^κ does not, beside what both put there.

    >>> scaling_error(0.5, 2, learning_rate=1.0)
    -0.5
    """
    check_share(decay=decay)
    check_positive(kappa=kappa, learning_rate=learning_rate)
    if decay == 1:
        raise InputError("decay must lie in [0, 1), got 1: a frozen average has no error to speak of")
    return -learning_rate * (kappa - (1 - scale_decay(decay, kappa)) / (1 - decay))


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

    A library extension of the rule: computed so that a small m loses no digits. κ = 1 changes no bit.
    """
    check_share(momentum=momentum)
    check_positive(kappa=kappa)
    if momentum == 1 or kappa == 1:
        return momentum
    return -math.expm1(kappa * math.log1p(-momentum))


class Averaged(NamedTuple):
    """An optimizer and the average of its weights, at one batch size.

    learning_rate: η. decay: ρ, what the average keeps at an update. weight_decay: λ, decoupled for "adamw" and an L2
    penalty for "sgd". betas: Adam's two, or RMSprop's alpha alone; eps: ε. SGD has neither, and its momentum stays.
    """

    learning_rate: float
    decay: float
    weight_decay: float = 0.0
    betas: tuple[float, ...] = ()
    eps: float = 0.0


def with_optimizer(settings: Averaged, kappa: float, *, optimizer: Optimizer, beta_rule: BetaRule = "sde") -> Averaged:
    """All that the rule moves, for a batch κ times as large: ρ^κ, and what the optimizer needs beside it.

    "sgd": κη, λ kept. The others: √κ·η, ε/√κ and the betas by `beta_rule`, of which "sde" is the paper's and refuses
    κ(1 - β) > 1; "adamw": √κ·λ. An L2 penalty inside "adam" or "rmsprop" is refused: no rule covers it.

    >>> with_optimizer(Averaged(0.1, 0.99, weight_decay=1e-4), 8, optimizer="sgd")
    Averaged(learning_rate=0.8, decay=0.9227446944279201, weight_decay=0.0001, betas=(), eps=0.0)
    """
    check_positive(learning_rate=settings.learning_rate, kappa=kappa)
    check_not_negative(weight_decay=settings.weight_decay)
    if optimizer not in get_args(Optimizer):
        raise InputError(f"optimizer must be one of {sorted(get_args(Optimizer))}, got {optimizer!r}")
    if optimizer == "sgd":
        if settings.betas or settings.eps:
            raise InputError(f"sgd has no betas and no eps, got {settings.betas!r} and {settings.eps!r}")
        rate = kappa * settings.learning_rate
    elif optimizer != "adamw" and settings.weight_decay:
        raise InputError(
            f"weight_decay must be 0 for {optimizer}, got {settings.weight_decay!r}: an L2 penalty divided by √v has "
            'no rule; "adamw" has'
        )
    else:
        rate = math.sqrt(kappa) * settings.learning_rate
    return Averaged(
        learning_rate=rate,
        decay=scale_decay(settings.decay, kappa),
        weight_decay=scale_weight_decay(
            settings.weight_decay, kappa, learning_rate=settings.learning_rate, new_learning_rate=rate
        ),
        betas=tuple(scale_beta(beta, kappa, beta_rule=beta_rule) for beta in settings.betas),
        eps=scale_eps(settings.eps, kappa),
    )


class Stage(NamedTuple):
    """What holds from `start_examples` on, until the next stage starts. kappa: batch_size over the base's."""

    start_examples: float
    batch_size: float
    kappa: float
    settings: Averaged


def progressive(
    settings: Averaged,
    switches: Sequence[tuple[float, float]],
    *,
    base_batch_size: float,
    optimizer: Optimizer = "sgd",
    beta_rule: BetaRule = "sde",
) -> tuple[Stage, ...]:
    """Progressive scaling (the paper's algorithm 1): train at the base batch, then move all at once, at each switch.

    settings: at `base_batch_size`. switches: pairs of (examples seen, batch size from there on), in order. Each applies
    the rule with the ratio to the base batch, never to the stage before. The paper needed this for BYOL with a ViT at a
    batch of 24,576, κ = 6; at which epochs and in how many stages is not known here, so there is no default.

    A learning-rate schedule is the caller's: at the same number of examples it multiplies each stage's rate.

    >>> [stage.kappa for stage in progressive(Averaged(0.1, 0.99), [(1000, 64), (5000, 256)], base_batch_size=32)]
    [1.0, 2.0, 8.0]
    """
    check_positive(base_batch_size=base_batch_size)
    starts: list[tuple[float, float]] = [(0.0, base_batch_size), *switches]
    for (before, _), (start, size) in itertools.pairwise(starts):
        check_positive(switch_examples=start, switch_batch_size=size)
        if start <= before:
            raise InputError(f"switches must be at rising numbers of examples > 0, got {start!r} after {before!r}")
    return tuple(
        Stage(start, size, size / base_batch_size, _moved(settings, size / base_batch_size, optimizer, beta_rule))
        for start, size in starts
    )


def _moved(settings: Averaged, kappa: float, optimizer: Optimizer, beta_rule: BetaRule) -> Averaged:
    return with_optimizer(settings, kappa, optimizer=optimizer, beta_rule=beta_rule)


def stage_at(stages: Sequence[Stage], examples: float) -> Stage:
    """The stage that holds after `examples` examples; a switch at just so many has happened."""
    check_not_negative(examples=examples)
    begun = [stage for stage in stages if stage.start_examples <= examples]
    if not begun:
        raise InputError(
            f"stages must hold one that starts at {examples!r} examples or before, got {len(stages)} others"
        )
    return max(begun, key=lambda stage: stage.start_examples)
