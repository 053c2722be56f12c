"""A batch that is doubled at stated tokens, and what such a doubling does to the loss.

For descent on λx²/2 with gradient noise of variance σ² an example, rate η and batch B, x' = (1 - ηλ)x - ηξ/√B has the
stationary loss

    E = η·σ²/(2B·(2 - ηλ))      for each direction, where 0 < ηλ < 2.

A doubling halves it; so does a cut of the rate to η' with η'/(2 - η'λ) = η/(2(2 - ηλ)), somewhat more than η/2. The
drop of the training loss at a doubling is noise that is removed, and a smaller rate or a decay at the end removes it
too: compare runs at equal tokens, after a decay, on validation data. On a small byte-level model, three seeds, a
doubling took 0.04 nats off the training loss, a halved rate 0.05; after a decay the doubled run stood 0.2 to 0.4 %
above the one that was not doubled, in three quarters of its updates.

Falcon2-11B (arXiv 2407.14885) doubled its batch four times in its first stage, on a rate that went on unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from batchlab.core.checks import as_count, check_positive, holds
from batchlab.core.errors import InputError
from batchlab.rules.tradeoff import steps_ratio
from batchlab.schedule.batches.milestones import Milestones
from batchlab.schedule.batches.scheduled_batch import LrRule, as_points


class BatchDoubling(Milestones):
    """`start`, and twice as much from each point of `double_at` on.

    double_at: rising, in the unit of `StepFacts.seen`, usually tokens. factor: another than 2, a whole number.
    lr_rule: "none" as in Falcon2, whose cosine ran on; "sqrt" or "linear" hold the noise, and so give up the drop of
        the loss for a larger step. See `ScheduledBatch.lr_factor`. A second moment with β₂ remembers twice the tokens
        after a doubling.

    Worth doing where the noise scale is far above the batch (`doubling_gain`); `NoiseScaleBatch` finds out by itself.

    >>> batch = BatchDoubling(2048, [10**9, 10**10], lr_rule="sqrt")
    >>> batch.at(10**9 - 1), batch.at(10**9), batch.at(10**12), round(batch.lr_factor(8192), 6)
    (2048, 4096, 8192, 2.0)
    """

    def __init__(
        self,
        start: int,
        double_at: Sequence[int],
        *,
        factor: int = 2,
        multiple_of: int = 1,
        lr_rule: LrRule = "none",
        lr_batch: int | None = None,
    ) -> None:
        start, factor = as_count(start=start), as_count(2, factor=factor)
        points = as_points("double_at", double_at)
        sizes = {point: start * factor ** (turn + 1) for turn, point in enumerate(points)}
        super().__init__(start, sizes, multiple_of=multiple_of, lr_rule=lr_rule, lr_batch=lr_batch)


def falcon2_doubling(double_at: Sequence[int], *, multiple_of: int = 1) -> BatchDoubling:
    """2048 to 32768 sequences of 2048 tokens in four doublings, the rate unchanged (Falcon2-11B, stage 1).

    double_at: the tokens of the four doublings, which were not published. The sizes rest on a second-hand reading.

    >>> falcon2_doubling([10**11, 2 * 10**11, 4 * 10**11, 8 * 10**11]).at(10**12)
    32768
    """
    if not holds(lambda points: len(points) == 4, double_at):
        found = len(double_at) if isinstance(double_at, Sequence) else repr(double_at)
        raise InputError(f"double_at must hold four points, got {found}")
    return BatchDoubling(2048, double_at, multiple_of=multiple_of)


def noise_floor(lr: float, batch: float, *, curvature: float, variance: float) -> float:
    """E = η·σ²/(2B·(2 - ηλ)), the mean stationary excess loss of plain SGD in one direction. B in examples.

    curvature: λ. variance: σ², of an example's gradient in that direction. The sum over directions is the whole.

    >>> noise_floor(0.1, 8, curvature=1.0, variance=1.0) / noise_floor(0.1, 16, curvature=1.0, variance=1.0)
    2.0
    """
    check_positive(lr=lr, batch=batch, curvature=curvature, variance=variance)
    if not lr * curvature < 2:
        raise InputError(f"lr must be below 2/curvature = {2 / curvature:g}, where descent is stable, got {lr!r}")
    return lr * variance / (2 * batch * (2 - lr * curvature))


def equivalent_lr(lr: float, batch_ratio: float, *, curvature: float = 0.0) -> float:
    """The rate η' at the old batch with the floor that η has at `batch_ratio` times that batch.

    η'/(2 - η'λ) = η/(r·(2 - ηλ)): 2f/(1 + fλ) with f the right side. curvature: λ; 0 for rates far below 1/λ, where
    it is η/r. Plain SGD on a quadratic; for Adam, whose temperature is η/√B, `temperature` with "adam".

    >>> round(equivalent_lr(0.1, 2, curvature=1.0), 5), equivalent_lr(0.1, 2)
    (0.05128, 0.05)
    """
    check_positive(lr=lr, batch_ratio=batch_ratio)
    if not holds(lambda value: 0 <= value < math.inf and lr * value < 2, curvature):
        raise InputError(f"curvature must be >= 0 and below 2/lr = {2 / lr:g}, got {curvature!r}")
    f = lr / (batch_ratio * (2 - lr * curvature))
    return 2 * f / (1 + f * curvature)


def doubling_gain(batch: float, noise_scale: float) -> float:
    """How many updates at `batch` one at twice that is worth: 2 far below the noise scale, 1 far above it.

    (1 + φ/B)/(1 + φ/(2B)), with the learning rate best for each (McCandlish et al. 2018). The tokens to a target grow
    by 2 over this. Doubling pays in tokens nothing, and in updates much, where φ >> B: at φ = 8B it is 1.8.

    >>> round(doubling_gain(64, 8 * 64), 3), round(doubling_gain(64, 1.0), 3)
    (1.8, 1.008)
    """
    return 1 / steps_ratio(2 * batch, batch, b_crit=noise_scale)


def temperature(lr: float, batch: float, *, reading: Literal["adam", "sgd"]) -> float:
    """Of the noise: η/√B for Adam, by which Falcon2's report reads its doublings, or η/B for SGD.

    One doubling is a cut of the rate by √2 in the first reading and by 2 in the second: say which one a figure uses.

    >>> temperature(0.1, 4, reading="adam"), temperature(0.1, 4, reading="sgd")
    (0.05, 0.025)
    """
    check_positive(lr=lr, batch=batch)
    if reading not in ("adam", "sgd"):
        raise InputError(f'reading must be "adam" or "sgd", got {reading!r}')
    return lr / math.sqrt(batch) if reading == "adam" else lr / batch
