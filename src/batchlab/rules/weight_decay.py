"""Weight decay by the timescale of the weights: τ = B/(ηλD) = 1/(ηλS) (Bergsma et al. 2025, arXiv 2505.13738).

AdamW makes the weights an exponential average of the updates, with a memory of 1/(ηλ) updates: τ is that memory as a
fraction of the run. The best τ hardly changes with the batch size, below the critical batch; above it no λ helps.
η is the peak learning rate (under μP the width-scaled one). B and D, the whole run, count one unit.

Across models and tokens the best τ is a power of tokens a parameter: `power_lines`.

Only for decay that is decoupled and multiplied by the learning rate, as `torch.optim.AdamW` does it. Not for
`torch.optim.Adam(weight_decay=...)` or SGD's, which are L2 penalties in the gradient; `scale_weight_decay` says
what carries over to SGD's. Fitted on runs of one epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from batchlab.core.checks import check_not_negative, check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.rules.optimizer_family import Decay, decay_kind
from batchlab.rules.published import law


def timescale(*, batch_size: float, learning_rate: float, weight_decay: float, total_examples: float) -> float:
    """τ = B/(ηλD), the fraction of the run that the weights remember.

    >>> round(timescale(batch_size=256, learning_rate=1e-3, weight_decay=0.1, total_examples=256e4), 12)
    1.0
    """
    check_positive(
        batch_size=batch_size, learning_rate=learning_rate, weight_decay=weight_decay, total_examples=total_examples
    )
    _check_run(batch_size, total_examples)
    return _over(batch_size, learning_rate * weight_decay * total_examples, "learning_rate*weight_decay*total_examples")


def from_timescale(tau: float, *, batch_size: float, learning_rate: float, total_examples: float) -> float:
    """λ = B/(ηDτ): the weight decay that has the timescale τ; the inverse of `timescale`."""
    check_positive(tau=tau, batch_size=batch_size, learning_rate=learning_rate, total_examples=total_examples)
    _check_run(batch_size, total_examples)
    return _over(batch_size, learning_rate * total_examples * tau, "learning_rate*total_examples*tau")


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


def _over(batch_size: float, product: float, factors: str) -> float:
    """Their ratio, where floats hold it."""
    if not 0 < product < math.inf or math.isinf(batch_size / product):
        raise InputError(f"{factors} must be within the range of floats, and batch_size over it too, got {product!r}")
    return batch_size / product


def _check_run(batch_size: float, total_examples: float) -> None:
    if total_examples < batch_size:
        raise InputError(
            f"total_examples must be at least batch_size: a run of {total_examples!r} is less than one "
            f"update of {batch_size!r}"
        )


class DecayBase(NamedTuple):
    """A run whose weight decay was tuned: what the relative form moves from. learning_rate: the peak η."""

    weight_decay: float
    learning_rate: float
    batch_tokens: float
    tokens: float
    params: float


@dataclass(frozen=True)
class DecayChoice(JsonNoun):
    """The weight decay of a run, by the power law of its timescale.

    weight_decay: λ. timescale: τ = B/(ηλD), which it gives the run. tokens_per_parameter: D/N. form: "relative", from a
    run that was tuned, or "absolute", by the paper's own prefactor. outside: which inputs lie beyond the range that the
    law was fitted over, of the base too; "" if none does.
    """

    weight_decay: float
    timescale: float
    tokens_per_parameter: float
    form: Literal["relative", "absolute"]
    outside: str = ""


def power_lines(
    *,
    params: float,
    tokens: float,
    batch_tokens: float,
    learning_rate: float,
    base: DecayBase | None = None,
    absolute: bool = False,
    optimizer: str = "adamw",
) -> DecayChoice:
    """λ_opt = B/(ηDτ_opt) with τ_opt = c·(D/N)^m, m = -0.527 (Bergsma et al. 2025, arXiv 2505.13738).

    params: N. tokens: D, of the whole run. batch_tokens: B, one update's. learning_rate: the peak η, under μP the
    width-scaled one. Plain counts, B and D both in tokens.
    base: a tuned run of yours; then λ = λ₀·(B/B₀)(η₀/η)(D₀/D)·((D₀/N₀)/(D/N))^m, which needs neither the paper's c nor
    its tokenizer. absolute: True takes c = 1.084 in its place; c is unverified, from memory, consistent with the
    τ = 0.21 that the paper reports at 20 tokens a parameter. One of the two must be given.
    optimizer: its name; refused where its decay is not decoupled, or not known to be (`optimizer_family.decay_kind`).

    Scale η or λ by the batch, never both: with η ∝ √B, λ ∝ √B keeps τ. The λ is for the parameter groups that decay;
    leaving norms and embeddings out changes what a λ does, so keep the groups of the base. Below the critical batch
    alone: above it no λ rescues the loss.

    >>> base = DecayBase(weight_decay=0.1, learning_rate=2e-3, batch_tokens=2**19, tokens=1.22e10, params=6.1e8)
    >>> power_lines(params=6.1e8, tokens=1.22e10, batch_tokens=2**20, learning_rate=2e-3, base=base).weight_decay
    0.2
    """
    check_positive(params=params, tokens=tokens, batch_tokens=batch_tokens, learning_rate=learning_rate)
    _check_decoupled(optimizer)
    if (base is None) == (not absolute):
        raise InputError(
            "base must be a run whose weight decay was tuned, or absolute=True takes the paper's own prefactor: give "
            f"one of them, got base={base!r}, absolute={absolute!r}"
        )
    rule, per_parameter = law("power_lines_timescale"), tokens / params
    run = {"batch_size": batch_tokens, "learning_rate": learning_rate, "total_examples": tokens}
    if base is None:
        tau, outside = rule["c"] * per_parameter ** rule["m"], rule.outside(tokens_per_parameter=per_parameter)
        return DecayChoice(from_timescale(tau, **run), tau, per_parameter, "absolute", outside)
    if not isinstance(base, DecayBase):
        raise InputError(f"base must be a rules.weight_decay.DecayBase, got {base!r}")
    check_positive(base_params=base.params)
    own = timescale(
        batch_size=base.batch_tokens,
        learning_rate=base.learning_rate,
        weight_decay=base.weight_decay,
        total_examples=base.tokens,
    )
    of_base = base.tokens / base.params
    tau = own * (per_parameter / of_base) ** rule["m"]
    decay = from_timescale(tau, **run)
    outside = rule.outside(tokens_per_parameter=per_parameter, base_tokens_per_parameter=of_base)
    return DecayChoice(decay, tau, per_parameter, "relative", outside)


_L2 = "its weight_decay is an L2 penalty in the gradient, for which the timescale means nothing"
_NO_TIMESCALE: dict[Decay, str] = {
    "l2": _L2,
    "adaptive_l2": _L2,
    "normalised": "its weight_decay joins before the step is rescaled to the weights' norm",
    "unknown": "how its weight_decay enters is not known here",
}


def _check_decoupled(optimizer: str) -> None:
    kind = decay_kind(optimizer)
    if kind != "decoupled":
        raise InputError(
            f"optimizer must decay its weights apart from the gradient, as adamw does, got {optimizer!r}: "
            f"{_NO_TIMESCALE[kind]}"
        )
