"""What to train with a compute or a number of tokens, from a user's own runs: all laws of Shuai et al. 2024 together.

Three questions that are not one: how N, D, S and B grow along a compute budget (`compute`), how the best batch grows
with the tokens of a run (`data`), and how the best learning rate moves with the batch (`rate`). Beside them the loss
law of the same runs (`loss`), whose exponents of N and D hold the frontier's against another method. arXiv 2412.01505.

Prefactors belong to the tokenizer, data set, optimizer and schedule of the runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from batchlab.core.checks import check_count, check_not_negative, check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.rules.batch import ComputeBudget
from batchlab.rules.fit.bowl import WITHIN, check_bowl
from batchlab.rules.fit.chinchilla_law import ChinchillaLaw, chinchilla
from batchlab.rules.fit.data_laws import DataLaw, RateLaw, data_law, rate_law
from batchlab.rules.fit.frontier import CELLS, ComputeLaws, compute_laws
from batchlab.rules.fit.table import RunTable
from batchlab.rules.fit.tuning import least_losses
from batchlab.rules.token_batch import TokenBatch

T = TypeVar("T")


@dataclass(frozen=True)
class Budgets(JsonNoun):
    """The laws that the runs tell; None for one that they do not, and `notes` says why.

    compute: N, D, S and B against C = 6ND. data: B_opt against D. rate: γ of η_opt ∝ B^γ. loss: E + A/N^α + B/D^β.
    """

    compute: ComputeLaws | None
    data: DataLaw | None
    rate: RateLaw | None
    loss: ChinchillaLaw | None
    notes: tuple[str, ...] = ()

    def for_compute(self, *, compute: float) -> ComputeBudget:
        """N, D, S and B for C FLOP. `batch.outside` says where C lies beyond the frontier; it then extrapolates."""
        if self.compute is None:
            raise InputError(f"these runs tell no law of a compute budget: {'; '.join(self.notes)}")
        return self.compute.plan(compute=compute)

    def for_tokens(self, *, tokens: float) -> TokenBatch:
        """B_opt for D training tokens. Not for a fixed compute."""
        if self.data is None:
            raise InputError(f"these runs tell no law of a data budget: {'; '.join(self.notes)}")
        return self.data.plan(tokens=tokens)

    def learning_rate_scale(self, *, base_batch_tokens: float, batch_tokens: float) -> float:
        """(B/B₀)^γ: what the best learning rate is multiplied by."""
        check_positive(base_batch_tokens=base_batch_tokens, batch_tokens=batch_tokens)
        if self.rate is None:
            raise InputError(f"these runs tell no law of the learning rate: {'; '.join(self.notes)}")
        return self.rate.learning_rate(1.0, base_batch_tokens=base_batch_tokens, batch_tokens=batch_tokens)


def budgets(
    table: RunTable,
    *,
    within: float = WITHIN,
    warmup_steps: float = 0,
    cells: int = CELLS,
    draws: int = 200,
    seed: int = 0,
    coverage: float = 0.95,
) -> Budgets:
    """All four laws from runs with params, tokens, batch_tokens and loss, and learning_rate where it was swept.

    The options are those of `compute_laws`, `data_law`, `rate_law` and `chinchilla`. Raises `InputError` where the runs
    tell neither the law of a compute budget nor that of a data budget, and for an option that no law takes.
    """
    check_bowl(within, coverage)
    check_not_negative(warmup_steps=warmup_steps)
    check_count(2, cells=cells, draws=draws)
    check_count(0, seed=seed)
    table.need("params", "tokens", "batch_tokens", "loss", law="budgets")
    notes = list(table.notes)
    compute = _try(
        "compute budget",
        notes,
        lambda: compute_laws(table, warmup_steps=warmup_steps, cells=cells, draws=draws, seed=seed, coverage=coverage),
    )
    data = _try("data budget", notes, lambda: data_law(table, within=within, draws=draws, seed=seed, coverage=coverage))
    if compute is None and data is None:
        raise InputError(f"these runs tell no budget: {'; '.join(notes)}")
    if "learning_rate" in table:
        rate = _try("learning rate", notes, lambda: rate_law(table, within=within, coverage=coverage))
    else:
        rate = None
        notes.append("no law of the learning rate: without a learning_rate column the runs are taken as tuned")
    loss = _try("loss", notes, lambda: _loss_law(table, draws, seed, coverage))
    notes += [law.note for law in (data, rate, loss) if law is not None and law.note]
    return Budgets(compute, data, rate, loss, tuple(notes))


def _try(name: str, notes: list[str], fit: Callable[[], T]) -> T | None:
    try:
        return fit()
    except InputError as error:
        notes.append(f"no law of the {name}: {error}")
        return None


def _loss_law(table: RunTable, draws: int, seed: int, coverage: float) -> ChinchillaLaw:
    params, tokens, losses, runs = least_losses(table)
    return chinchilla(params, tokens, losses, runs=runs, draws=draws, seed=seed, coverage=coverage)
