"""Weight decay by the timescale of the weights: τ = B/(ηλD) = 1/(ηλS) (Bergsma et al. 2025, arXiv 2505.13738).

AdamW makes the weights an exponential average of the updates, with a memory of 1/(ηλ) updates: τ is that memory as a
fraction of the run. The best τ hardly changes with the batch size, below the critical batch; above it no λ helps.
η is the peak learning rate (under μP the width-scaled one). B and D, the whole run, count one unit.

Only for decay that is decoupled and multiplied by the learning rate, as `torch.optim.AdamW` does it. Not for
`torch.optim.Adam(weight_decay=...)` or SGD's, which are L2 penalties in the gradient. Fitted on runs of one epoch.
"""

from __future__ import annotations

from batchlab.core.checks import check_not_negative, check_positive
from batchlab.core.errors import InputError


def timescale(*, batch_size: float, learning_rate: float, weight_decay: float, total_examples: float) -> float:
    """τ = B/(ηλD), the fraction of the run that the weights remember.

    >>> round(timescale(batch_size=256, learning_rate=1e-3, weight_decay=0.1, total_examples=256e4), 12)
    1.0
    """
    check_positive(
        batch_size=batch_size, learning_rate=learning_rate, weight_decay=weight_decay, total_examples=total_examples
    )
    _check_run(batch_size, total_examples)
    return batch_size / (learning_rate * weight_decay * total_examples)


def from_timescale(tau: float, *, batch_size: float, learning_rate: float, total_examples: float) -> float:
    """λ = B/(ηDτ): the weight decay that has the timescale τ; the inverse of `timescale`."""
    check_positive(tau=tau, batch_size=batch_size, learning_rate=learning_rate, total_examples=total_examples)
    _check_run(batch_size, total_examples)
    return batch_size / (learning_rate * total_examples * tau)


def scale_weight_decay(weight_decay: float, kappa: float, *, learning_rate: float, new_learning_rate: float) -> float:
    """λ̂ = λ·κ·η/η̂, for a batch κ times as large on as many examples: it keeps B/(ηλ), the timescale in examples.

    learning_rate, new_learning_rate: η and η̂, the peaks at the two batch sizes. λ̂ = κλ where η stays, √κ·λ where it
    goes by the square root (as in Busbridge et al. 2023, arXiv 2307.13813), λ where it goes linearly: so also for SGD's
    L2 penalty, which shrinks the weights by ηλ an update too. First order in ηλ: of (1 - ηλ)^κ = 1 - η̂λ̂. λ = 0 stays.

    >>> scale_weight_decay(0.1, 16, learning_rate=1e-3, new_learning_rate=4e-3)
    0.4
    """
    check_not_negative(weight_decay=weight_decay)
    check_positive(kappa=kappa, learning_rate=learning_rate, new_learning_rate=new_learning_rate)
    return weight_decay * (kappa * (learning_rate / new_learning_rate))


def _check_run(batch_size: float, total_examples: float) -> None:
    if total_examples < batch_size:
        raise InputError(
            f"total_examples must be at least batch_size: a run of {total_examples!r} is less than one "
            f"update of {batch_size!r}"
        )
