"""Where an eigenvalue of the loss's Hessian shows in a batch, and the learning rate it allows (Granziol et al. 2022).

arXiv 2006.09092. The Hessian of b of N examples is H + ε_b. If ε_b is a symmetric random matrix whose entries have
variance σ²/𝔟, with 𝔟 = b/(1 - b/N) for draws without replacement, then with κ² = P·σ², P the number of parameters, an
outlier λ of H shows in the batch's spectrum at

  λ'(𝔟) = λ + κ²/(𝔟λ)   where λ > κ/√𝔟,   else it is hidden, and the edge of the noise is 2κ/√𝔟.

`measure.hessian` fits λ and κ² to a model, `rules.learning_rate` makes a rule of them: both stand on these functions.
"""

from __future__ import annotations

import math

from batchlab.core.errors import InputError


def effective_batch(batch_size: float, examples: float) -> float:
    """𝔟 = b/(1 - b/N): the batch of independent draws as noisy as b of N without replacement; infinite at b = N.

    >>> effective_batch(50, 100), effective_batch(100, 100)
    (100.0, inf)
    """
    if not 1 <= examples < math.inf:
        raise InputError(f"examples must be finite and >= 1, got {examples!r}")
    if not 0 < batch_size <= examples:
        raise InputError(f"batch_size must lie in (0, {examples}], the number of examples, got {batch_size!r}")
    return math.inf if batch_size == examples else batch_size / (1 - batch_size / examples)


def spike_edge(eigenvalue: float, kappa_sq: float, effective: float) -> float:
    """λ'₁(𝔟): where the largest eigenvalue λ₁ > 0 of H shows in the Hessian of a batch.

    >>> [spike_edge(value, 1.0, 1.0) for value in (0.5, 1.0, 2.0, 4.0)]
    [2.0, 2.0, 2.5, 4.25]
    """
    noise = _noise(eigenvalue, kappa_sq, effective)
    return eigenvalue + noise / eigenvalue if eigenvalue**2 > noise else 2 * math.sqrt(noise)


def mean_square_edge(eigenvalue: float, kappa_sq: float, effective: float, momentum: float = 0.0) -> float:
    """λ₁ + (1 + μ)/(1 - μ)·κ²/(𝔟λ₁): the curvature by which SGD on fresh batches grows or shrinks in mean square.

    Exact along a direction whose curvature in a batch has the mean λ₁ and the variance κ²/𝔟, for any 𝔟: it has no
    hidden branch. `stable_rate` of it is the learning rate at which the mean square neither grows nor shrinks.

    >>> mean_square_edge(2.0, 8.0, 4.0), mean_square_edge(2.0, 8.0, 4.0, momentum=0.5)
    (3.0, 5.0)
    """
    noise = _noise(eigenvalue, kappa_sq, effective)
    check_momentum(momentum)
    return eigenvalue + (1 + momentum) / (1 - momentum) * noise / eigenvalue


def stable_rate(eigenvalue: float, momentum: float = 0.0) -> float:
    """2(1 + μ)/λ: the learning rate below which heavy ball shrinks a direction of fixed curvature λ > 0.

    >>> stable_rate(4.0, 0.9)
    0.95
    """
    check_momentum(momentum)
    if not eigenvalue > 0:
        raise InputError(f"eigenvalue must be > 0: no learning rate is too large along it, got {eigenvalue!r}")
    return 2 * (1 + momentum) / eigenvalue


def _noise(eigenvalue: float, kappa_sq: float, effective: float) -> float:
    """κ²/𝔟, of checked arguments."""
    if not (0 < eigenvalue < math.inf and 0 <= kappa_sq < math.inf and effective > 0):
        raise InputError(
            "eigenvalue and effective must be > 0 and kappa_sq >= 0, got "
            f"eigenvalue={eigenvalue!r}, kappa_sq={kappa_sq!r}, effective={effective!r}"
        )
    return kappa_sq / effective


def check_momentum(momentum: float) -> None:
    """Heavy ball's must lie in [0, 1)."""
    if not 0 <= momentum < 1:
        raise InputError(f"momentum must lie in [0, 1), got {momentum!r}")
