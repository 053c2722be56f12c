"""How the best batch grows with training tokens, and the best learning rate with the batch (Shuai et al. 2024).

For each model size N and number of tokens D the batch of least loss, the vertex of one parabola in ln B, the learning
rate tuned at each; then B_opt = a·D^p over all. And η_opt ∝ B^γ: at each (N, D) the vertex in ln η for each batch, and
one slope with an intercept of its own for each (N, D). arXiv 2412.01505: p = 0.264, γ in [0.75, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.curves.log_line import LogLine
from batchlab.rules.fit.bootstrap import Rows, bootstrap
from batchlab.rules.fit.bowl import WITHIN, Optimum, check_bowl, learning_rate_optimum, optimum, vertex
from batchlab.rules.fit.power_laws import PowerLaw, power_law
from batchlab.rules.fit.table import RunTable
from batchlab.rules.fit.tuning import edge_note, ids, tuned, tuned_rows
from batchlab.rules.token_batch import TokenBatch

Array = NDArray[np.float64]
FEWEST_LENGTHS = 3


@dataclass(frozen=True)
class BatchOptimum(JsonNoun):
    """The best batch of one model on so many tokens. params: N. tokens: D. optimum: of the batch, in tokens."""

    params: float
    tokens: float
    optimum: Optimum


@dataclass(frozen=True)
class DataLaw(JsonNoun):
    """B_opt = a·D^p, both in tokens. law: through the vertices that are bracketed, with Student's interval.

    by_bootstrap: p again, its interval from drawing the runs of each (N, D) anew: approximate. At 90 % both held the
    truth in 200 tables of 8 D, 10 batches and 2 runs each: Student's in 88 %, the bootstrap's in 94 %.
    optima: every vertex. note: those left out, and best rates at the edge of their sweep.
    """

    law: PowerLaw
    by_bootstrap: Estimate
    optima: tuple[BatchOptimum, ...]
    note: str = ""

    def plan(self, *, tokens: float) -> TokenBatch:
        """B_opt for D training tokens; `outside` says where that lies beyond the runs'. Not for a fixed compute."""
        check_positive(tokens=tokens)
        return TokenBatch(self.law.value(tokens), "your runs, fixed data", self.law.outside(tokens))


def data_law(
    table: RunTable,
    *,
    within: float = WITHIN,
    draws: int = 200,
    seed: int = 0,
    coverage: float = 0.95,
) -> DataLaw:
    """a and p from finished runs with params, tokens, batch_tokens and loss, and learning_rate where it was swept.

    within: how far from the best batch the parabola reaches, as a factor. With a learning_rate column each (N, D, B)
    counts at its best rate, by the mean of its repeats; without one the rates must have been tuned before.

    Raises `InputError` where fewer than three different D have a bracketed best batch.
    """
    check_bowl(within, coverage)
    check_count(2, draws=draws)
    check_count(0, seed=seed)
    table.need("params", "tokens", "batch_tokens", "loss", law="data budget")
    kept = tuned_rows(table, "params", "tokens", "batch_tokens")
    optima, notes = _optima(table, kept, within, coverage)
    good = [each for each in optima if each.optimum.bracketed]
    if len({each.tokens for each in good}) < FEWEST_LENGTHS:
        raise InputError(
            f"tokens must hold at least {FEWEST_LENGTHS} lengths with a bracketed best batch for a data budget, got "
            f"{len({each.tokens for each in good})}{': ' + notes[0] if notes else ''}"
        )
    lengths, best = [each.tokens for each in good], [each.optimum.at.value for each in good]
    law = power_law(lengths, best, x_name="tokens", y_name="batch_tokens", coverage=coverage)
    slope = _drawn_slope(table, within)
    groups = [str(group) for group in ids(table["params"], table["tokens"])]
    drawn = bootstrap(slope, table.texts["run"], within=groups, draws=draws, seed=seed, coverage=coverage)
    method = f"least squares on ln batch_tokens over {len(good)} vertices, bootstrap over runs (approximate)"
    exponent = drawn.estimate(0, law.exponent.value, method, coverage)
    notes.append(edge_note(table, kept, "params", "tokens", "batch_tokens"))
    return DataLaw(law, exponent, tuple(optima), "; ".join(filter(None, notes)))


def _optima(table: RunTable, kept: Rows, within: float, coverage: float) -> tuple[list[BatchOptimum], list[str]]:
    chosen = table.take(kept)
    batches, losses = chosen["batch_tokens"], chosen["loss"]
    optima, notes = [], []
    for (params, tokens), rows in chosen.groups("params", "tokens"):
        where = f"params {params:.4g}, tokens {tokens:.4g}"
        try:
            found = optimum(batches[rows], losses[rows], name="batch_tokens", within=within, coverage=coverage)
        except InputError as error:
            notes.append(f"{where} was left out: {error}")
            continue
        optima.append(BatchOptimum(params, tokens, found))
        notes += [] if found.bracketed else [f"{where} was left out: {found.note}"]
    return optima, notes


def _drawn_slope(table: RunTable, within: float) -> Callable[[Rows], Sequence[float]]:
    """p of a drawn table, by its rows."""
    params, tokens, batch, losses = (table[name] for name in ("params", "tokens", "batch_tokens", "loss"))
    rates = table["learning_rate"] if "learning_rate" in table else np.ones(len(table))
    setting, cell = ids(params, tokens, batch), ids(params, tokens, batch, rates)
    group, u = ids(params, tokens), np.log(batch)
    lengths = np.array([tokens[group == each][0] for each in range(int(group.max()) + 1)])

    def slope(rows: Rows) -> Sequence[float]:
        rows = rows[tuned(losses[rows], setting[rows], cell[rows])]
        members = [rows[group[rows] == each] for each in range(len(lengths))]
        vertices = np.array([vertex(u[each], losses[each], within=within) for each in members])
        known = ~np.isnan(vertices)
        if len(np.unique(lengths[known])) < FEWEST_LENGTHS:
            raise InputError("too few lengths have a bracketed best batch")
        return [LogLine.through(lengths[known].tolist(), np.exp(vertices[known]).tolist()).slope]

    return slope


@dataclass(frozen=True)
class RateLaw(JsonNoun):
    """η_opt ∝ B^γ at fixed N and D. gamma: with Student's interval. batch_tokens, learning_rates: the vertices fitted.

    residuals: ln(measured/fitted) at each. groups: how many (N, D) share the slope. note: what was left out.
    """

    gamma: Estimate
    batch_tokens: tuple[float, ...]
    learning_rates: tuple[float, ...]
    residuals: tuple[float, ...]
    groups: int
    note: str = ""

    def learning_rate(self, base_rate: float, *, base_batch_tokens: float, batch_tokens: float) -> float:
        """η₀·(B/B₀)^γ, from a rate that was tuned at B₀; below the critical batch, and within the batches fitted."""
        check_positive(base_rate=base_rate, base_batch_tokens=base_batch_tokens, batch_tokens=batch_tokens)
        return float(base_rate * (batch_tokens / base_batch_tokens) ** self.gamma.value)


def rate_law(table: RunTable, *, within: float = WITHIN, coverage: float = 0.95) -> RateLaw:
    """γ from runs with params, tokens, batch_tokens, learning_rate and loss: at least three rates a batch.

    Batches whose best rate is not bracketed, and (N, D) with fewer than two such batches, are left out. Raises
    `InputError` where fewer than three batches are left, or no freedom to judge the slope by.
    """
    check_bowl(within, coverage)
    table.need("params", "tokens", "batch_tokens", "learning_rate", "loss", law="learning-rate law")
    points, notes = _rate_points(table, within, coverage)
    group = ids(points[:, 0], points[:, 1]) if len(points) else np.empty(0, dtype=np.intp)
    counts = np.bincount(group) if len(points) else np.empty(0, dtype=np.intp)
    many = counts[group] > 1 if len(points) else np.empty(0, dtype=bool)
    points, group = points[many], group[many]
    groups = len(np.unique(group))
    free = len(points) - groups - 1
    if len(np.unique(points[:, 2])) < 3 or free < 1:
        raise InputError(
            f"batch_tokens must hold at least 3 batches with a bracketed best learning rate, got "
            f"{len(np.unique(points[:, 2]))} and {free} degrees of freedom{': ' + notes[0] if notes else ''}"
        )
    x, y = _centred(np.log(points[:, 2]), group), _centred(np.log(points[:, 3]), group)
    spread = float(x @ x)
    gamma = float(x @ y) / spread
    residuals = y - gamma * x
    from scipy.special import stdtrit

    half = float(stdtrit(free, 0.5 + coverage / 2)) * math.sqrt(float(residuals @ residuals) / free / spread)
    method = f"one slope of ln learning_rate over {len(points)} vertices of {groups} settings, Student's interval"
    batches, rates, errors = (tuple(map(float, each)) for each in (points[:, 2], points[:, 3], residuals))
    estimate = Estimate(gamma, gamma - half, gamma + half, method, coverage)
    return RateLaw(estimate, batches, rates, errors, groups, "; ".join(notes))


def _rate_points(table: RunTable, within: float, coverage: float) -> tuple[Array, list[str]]:
    """(N, D, B, η_opt), one row a bracketed vertex."""
    found, notes = [], []
    rates, losses = table["learning_rate"], table["loss"]
    for key, rows in table.groups("params", "tokens", "batch_tokens"):
        where = "params {:.4g}, tokens {:.4g}, batch_tokens {:.4g}".format(*key)
        try:
            best = learning_rate_optimum(rates[rows], losses[rows], within=within, coverage=coverage)
        except InputError as error:
            notes.append(f"{where} was left out: {error}")
            continue
        if best.bracketed:
            found.append((*key, best.at.value))
        else:
            notes.append(f"{where} was left out: {best.note}")
    return np.array(found, dtype=np.float64).reshape(-1, 4), notes


def _centred(values: Array, group: NDArray[np.intp]) -> Array:
    which = np.unique(group, return_inverse=True)[1]
    means = np.bincount(which, values) / np.bincount(which)
    return values - means[which]
