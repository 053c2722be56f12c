"""How large the gradient of a batch is: E|g_B|² = |G|² + tr(Σ)/B (McCandlish et al. 2018, arXiv 1812.06162, A.1).

G is the true gradient, Σ the covariance of an example's, B_n = tr(Σ)/|G|² the noise scale. A larger batch has a smaller
gradient, down to |G|: what was set against its size, as a clipping threshold is, moves by the same factor. Of a mean
gradient over independent examples, at the same weights; of root mean squares, so where the norm is heavy-tailed a
threshold that is seldom met is not kept at the same share of updates.
"""

from __future__ import annotations

import math

from batchlab.core.checks import check_positive, holds
from batchlab.core.errors import InputError


def norm_ratio(base_batch_size: float, batch_size: float, *, noise_scale: float) -> float:
    """√(E|g_B|²/E|g_B₀|²) = √((1 + B_n/B)/(1 + B_n/B₀)). Sizes and noise scale in one unit, examples or tokens.

    noise_scale: > 0; infinite for its limit √(B₀/B), far below the noise scale.

    >>> norm_ratio(100, 400, noise_scale=float("inf")), norm_ratio(100, 400, noise_scale=1200)
    (0.5, 0.5547001962252291)
    """
    check_positive(base_batch_size=base_batch_size, batch_size=batch_size)
    if not holds(lambda scale: scale > 0, noise_scale):
        raise InputError(f"noise_scale must be > 0, got {noise_scale!r}")
    if math.isinf(noise_scale):
        return math.sqrt(base_batch_size / batch_size)
    return math.sqrt((1 + noise_scale / batch_size) / (1 + noise_scale / base_batch_size))


def scale_clip_norm(clip_norm: float, base_batch_size: float, batch_size: float, *, noise_scale: float) -> float:
    """The clipping threshold c·√(E|g_B|²/E|g_B₀|²), which cuts the root mean square of the norm by as much as before.

    >>> scale_clip_norm(1.0, 64, 64e9, noise_scale=192)
    0.50000000075
    """
    check_positive(clip_norm=clip_norm)
    return clip_norm * norm_ratio(base_batch_size, batch_size, noise_scale=noise_scale)
