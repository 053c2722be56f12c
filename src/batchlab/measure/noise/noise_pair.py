"""|G|² and tr(Σ) from squared gradient norms at two batch sizes (McCandlish et al. 2018, A.1)."""

from __future__ import annotations

import math
from typing import NamedTuple

from batchlab.core.errors import InputError


class NoisePair(NamedTuple):
    """grad_sq estimates |G|² and trace estimates tr(Σ), both without bias: either can come out negative."""

    grad_sq: float
    trace: float


def unbiased_pair(small_sq_norm: float, big_sq_norm: float, small: float, big: float) -> NoisePair:
    """Solves E|g_n|² = |G|² + tr(Σ)/n for n = small and n = big.

    small_sq_norm: mean of the pieces' |g|². big_sq_norm: |g|² of their mean gradient. small, big: examples in them.
    For ragged pieces n_1..n_k of N examples both parts stay unbiased with the plain mean of |g_i|² and
    small = 1/mean(1/n_i), or with the mean weighted by n_i/N and small = N/k. The second is the analysis of variance:
    its tr(Σ) = Σ n_i|g_i - g|²/(k-1) is never negative, depends on no piece's size alone, and varies less.

    >>> unbiased_pair(3.0, 1.5, 4, 16)
    NoisePair(grad_sq=1.0, trace=8.0)
    """
    if not 1 <= small < big:
        raise InputError(f"the two sizes must satisfy 1 <= small < big, got small={small!r}, big={big!r}")
    trace = (small_sq_norm - big_sq_norm) / (1 / small - 1 / big)
    return NoisePair(big_sq_norm - trace / big, trace)


def noise_scale(grad_sq: float, trace: float) -> float:
    """tr(Σ)/|G|², in examples; NaN where |G|² is not positive. Average both parts first: a mean of ratios is biased.

    >>> noise_scale(1.0, 8.0)
    8.0
    """
    return trace / grad_sq if grad_sq > 0 else math.nan
