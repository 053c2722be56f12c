"""How far to go along a Gauss-Newton direction, and what the step says of the damping: numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Callable

SEARCHES = ("armijo", "conservative", "goldstein")
SUFFICIENT, SHRINK, GROW, TRIES = 0.1, 0.8, 1.5, 15  # the authors' own, after Vaswani et al. 2019
LEAST_DAMPING, MOST_DAMPING, MOST_RATIO = 1e-12, 1e6, 5.0  # somax


def first_share(kind: str, last: float) -> float:
    """Where a search starts: "armijo" at 1.5 times the last share, at most 1; the others at the last one."""
    return min(GROW * last, 1.0) if kind == "armijo" else last


def search(
    start: float, loss: float, slope: float, loss_at: Callable[[float], float], *, goldstein: bool = False, eps: float
) -> tuple[float, float]:
    """s in (0, 1] and f(w + sδ): up to 15 times, s ← 0.8s while f(w) - f(w + sδ) + eps < -0.1·s·gᵀδ.

    slope: gᵀδ < 0. eps: rounding of one loss, as in the authors' code. goldstein: also s ← 1.5s, at most 1, while the
    decrease exceeds 0.9·s·|gᵀδ|. Without a decrease that suffices the last s is taken; NaN is no decrease.

    >>> search(1.0, 1.0, -8.0, lambda s: (1 - 4 * s) ** 2, eps=0.0)  # (1 - 4s)² is least at s = 1/4
    (0.40960000000000013, 0.4075545600000007)
    """
    share, after = start, loss_at(start)
    for _ in range(TRIES):
        tried = share
        if not loss - after + eps >= -SUFFICIENT * share * slope:
            share *= SHRINK
            after = loss_at(share)
        if goldstein and share < 1 and loss - after > -(1 - SUFFICIENT) * share * slope:
            share = min(share * GROW, 1.0)
            after = loss_at(share)
        if share == tried:
            break
    return share, after


def gain_ratio(loss: float, after: float, slope: float, curvature: float) -> float | None:
    """ρ = (f(w + δ) - f(w))/(gᵀδ + ½δᵀHδ), within ±5. curvature: δᵀHδ; the damping has no part in it.

    -5 where the model predicts that the loss grows; None, and no change of λ, where it predicts less than 1e-16 or
    where one of the two is not finite.

    >>> gain_ratio(1.0, 0.5, slope=-1.0, curvature=1.0)
    1.0
    """
    predicted = -(slope + 0.5 * curvature)
    if abs(predicted) <= 1e-16 or not math.isfinite(predicted) or not math.isfinite(after):
        return None
    ratio = (loss - after) / predicted if predicted > 0 else -MOST_RATIO
    return max(-MOST_RATIO, min(ratio, MOST_RATIO))


def next_damping(damping: float, ratio: float | None) -> float:
    """1.5·λ where ρ < 0.25, λ/2 where ρ > 0.75, within [1e-12, 1e6]; somax's trust region.

    >>> next_damping(1.0, 0.9), next_damping(1.0, 0.5), next_damping(1.0, -5.0)
    (0.5, 1.0, 1.5)
    """
    if ratio is None or 0.25 <= ratio <= 0.75:
        return damping
    return min(max(damping * (1.5 if ratio < 0.25 else 0.5), LEAST_DAMPING), MOST_DAMPING)
