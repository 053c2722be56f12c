"""Updates against examples: (S/S_min - 1)(E/E_min - 1) = 1 (McCandlish et al. 2018, arXiv 1812.06162, section 2.3).

S updates and E = B·S examples take a run to a target with a constant batch B, the learning rate being the best for
that batch. Sizes, the critical batch B_crit among them, are in examples; or all in tokens. The law holds for a noise
scale that stays near B_crit over the run, and for optimizers whose best drop in loss is ΔL_max/(1 + B_noise/B).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchlab.core.checks import check_not_negative, check_positive
from batchlab.core.errors import InputError


def steps(batch_size: float, *, s_min: float, b_crit: float) -> float:
    """S(B) = S_min·(1 + B_crit/B): updates to the target.

    >>> steps(64, s_min=100, b_crit=64)
    200.0
    """
    check_positive(batch_size=batch_size, s_min=s_min, b_crit=b_crit)
    return s_min * (1 + b_crit / batch_size)


def examples(batch_size: float, *, s_min: float, b_crit: float) -> float:
    """E(B) = E_min·(1 + B/B_crit) = B·S(B), with E_min = B_crit·S_min: examples to the target."""
    check_positive(batch_size=batch_size, s_min=s_min, b_crit=b_crit)
    return s_min * (b_crit + batch_size)


def min_steps(steps_at_batch: float, batch_size: float, *, b_crit: float) -> float:
    """S_min = S(B)/(1 + B_crit/B): from one run that took `steps_at_batch` updates at `batch_size`."""
    check_positive(steps_at_batch=steps_at_batch, batch_size=batch_size, b_crit=b_crit)
    return steps_at_batch / (1 + b_crit / batch_size)


def steps_ratio(batch_size: float, base_batch_size: float, *, b_crit: float) -> float:
    """S(B)/S(B₀) = (1 + B_crit/B)/(1 + B_crit/B₀), which needs no S_min. Monotone in B_crit.

    b_crit: from 0, where batch size changes nothing, to infinity, where updates are as 1/B.

    >>> steps_ratio(64, 32, b_crit=float("inf")), steps_ratio(64, 32, b_crit=0), steps_ratio(64, 32, b_crit=64)
    (0.5, 1.0, 0.6666666666666666)
    """
    check_positive(batch_size=batch_size, base_batch_size=base_batch_size)
    check_not_negative(b_crit=b_crit)
    if math.isinf(b_crit):
        return base_batch_size / batch_size
    return (1 + b_crit / batch_size) / (1 + b_crit / base_batch_size)


def efficiency(batch_size: float, *, noise_scale: float) -> float:
    """ΔL_opt(B)/ΔL_max = S_min/S(B) = 1/(1 + B_noise/B): the share of the best possible drop in loss, per update."""
    check_positive(batch_size=batch_size, noise_scale=noise_scale)
    return 1 / (1 + noise_scale / batch_size)


def exchange_rate(batch_size: float, *, b_crit: float) -> float:
    """r = -dE/dS = B²/B_crit: examples paid for one update saved, by who trains at `batch_size`."""
    check_positive(batch_size=batch_size, b_crit=b_crit)
    return batch_size**2 / b_crit


def adaptive_batch_size(noise_scale: float, *, exchange_rate: float) -> float:
    """B(s) = √(r·𝓑(s)): the batch that pays r examples for an update all along the run (appendix D).

    >>> adaptive_batch_size(64, exchange_rate=exchange_rate(64, b_crit=64))
    64.0
    """
    check_positive(noise_scale=noise_scale, exchange_rate=exchange_rate)
    return math.sqrt(exchange_rate * noise_scale)


def adaptive_gamma(noise_scales: Sequence[float]) -> float:
    """γ = (∫√𝓑 ds)²/(S_min·E_min) <= 1, of noise scales at equal stretches of noise-free updates s.

    With B(s) = √(r·𝓑) the front is (S/S_min - 1)(E/E_min - 1) = γ; at r = E_min/S_min both are 1 + √γ times their
    least, against 2 with a constant batch. 1 means that adapting gains nothing.
    """
    if len(noise_scales) == 0:
        raise InputError("noise_scales must hold at least one value, got none")
    for value in noise_scales:
        check_positive(noise_scales=value)
    roots = math.fsum(math.sqrt(value) for value in noise_scales)
    return roots**2 / (len(noise_scales) * math.fsum(noise_scales))
