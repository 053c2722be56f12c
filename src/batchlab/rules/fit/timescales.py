"""The best timescale of the weights against tokens a parameter, τ_opt = c·(D/N)^m, from a user's own runs.

τ = B/(ηλD), N parameters, D training tokens, B tokens of one update (Bergsma et al. 2025, arXiv 2505.13738). For each
model, length, batch and rate a sweep of weight decay: the vertex of a parabola of the loss in ln τ; then a power law
over tokens a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.rules.fit.bowl import WITHIN, Optimum, check_bowl, timescale_optimum
from batchlab.rules.fit.power_laws import PowerLaw, power_law
from batchlab.rules.fit.table import RunTable
from batchlab.rules.optimizer_family import decay_kind

FEWEST_SWEEPS = 3


@dataclass(frozen=True)
class TimescaleOptimum(JsonNoun):
    """One sweep of weight decay. params: N. tokens: D. batch_tokens: B. learning_rate: peak η. optimum: of τ."""

    params: float
    tokens: float
    batch_tokens: float
    learning_rate: float
    optimum: Optimum


@dataclass(frozen=True)
class TimescaleLaw(JsonNoun):
    """τ_opt = c·(D/N)^m. law: over the sweeps whose optimum is bracketed. sweeps: all. note: those left out."""

    law: PowerLaw
    sweeps: tuple[TimescaleOptimum, ...]
    note: str = ""


def timescale(table: RunTable, *, within: float = WITHIN, coverage: float = 0.95) -> TimescaleLaw:
    """c and m from runs with params, tokens, batch_tokens, learning_rate, weight_decay and loss.

    Runs that share all but weight decay are one sweep; it needs three λ within a factor `within` of the best and its
    least inside them, else it is left out and noted. The law needs three different D/N. Its interval is Student's, over
    the sweeps' vertices; each vertex has its own too.

    Raises `InputError` for λ = 0, whose τ is infinite, for an optimizer column that names a coupled decay (as adam),
    and where fewer than three sweeps are bracketed. Only below the critical batch: above it no λ helps.
    """
    check_bowl(within, coverage)
    table.need("params", "tokens", "batch_tokens", "learning_rate", "weight_decay", "loss", law="timescale")
    _check_decay(table)
    keys = ("params", "tokens", "batch_tokens", "learning_rate")
    tau = table["batch_tokens"] / (table["learning_rate"] * table["weight_decay"] * table["tokens"])
    sweeps, left_out = [], []
    for key, rows in table.groups(*keys):
        try:
            found = timescale_optimum(tau[rows], table["loss"][rows], within=within, coverage=coverage)
        except InputError as error:
            left_out.append(f"{_sweep(key)} was left out: {error}")
            continue
        params, tokens, batch_tokens, learning_rate = key
        sweeps.append(TimescaleOptimum(params, tokens, batch_tokens, learning_rate, found))
        if not found.bracketed:
            left_out.append(f"{_sweep(key)} was left out: {found.note}")
    good = [sweep for sweep in sweeps if sweep.optimum.bracketed]
    if len(good) < FEWEST_SWEEPS:
        why = f": {left_out[0]}" if left_out else ""
        raise InputError(
            f"the timescale law needs at least {FEWEST_SWEEPS} sweeps of weight decay, got {len(good)} usable ones{why}"
        )
    per_parameter = [sweep.tokens / sweep.params for sweep in good]
    values = [sweep.optimum.at.value for sweep in good]
    line = power_law(per_parameter, values, x_name="tokens_per_parameter", y_name="tau", coverage=coverage)
    return TimescaleLaw(line, tuple(sweeps), "; ".join(left_out))


def _check_decay(table: RunTable) -> None:
    if not (table["weight_decay"] > 0).all():
        raise InputError("weight_decay must be > 0 in every row, got 0: its timescale is infinite")
    for optimizer in table.texts.get("optimizer", ()):
        if decay_kind(optimizer) in ("l2", "adaptive_l2", "normalised"):
            raise InputError(
                f"optimizer must decay its weights apart from the gradient, as adamw does, got {optimizer!r}: the "
                "timescale means nothing for an L2 penalty"
            )


def _sweep(key: Sequence[float]) -> str:
    return "the sweep at params {:.4g}, tokens {:.4g}, batch_tokens {:.4g}, learning_rate {:.4g}".format(*key)
