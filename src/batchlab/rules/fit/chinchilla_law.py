"""L = E + A/N^α + B/D^β from runs of several sizes and lengths (Hoffmann et al. 2022, arXiv 2203.15556, approach 3).

N parameters, D training tokens, L the loss in nats a token. Least Huber loss (δ = 10⁻³) of ln L, by L-BFGS from the
best of a grid of starts; intervals by drawing the runs again. Minimised over C = 6ND the law gives N_opt ∝ C^(β/(α+β))
and D_opt ∝ C^(α/(α+β)).

The batch is taken as moderate: below the critical one, where it costs no data. Else give D/(1 + batch/critical batch)
as the tokens. Compare finished schedules alone, or runs of a constant learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_inside, check_positive
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.rules.fit.bootstrap import Rows, bootstrap
from batchlab.rules.fit.huber import least_huber, sum_of_powers
from batchlab.rules.fit.power_laws import Values, plain

Array = NDArray[np.float64]
DELTA = 1e-3
FLOP_PER_PARAM_TOKEN = 6.0
FEWEST_RUNS, FEWEST_VALUES = 6, 3
_STARTS = 12
_GRID = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)
_TOGETHER = 0.05  # spread of ln D about a line in ln N: 5 % in D says nothing of α and β apart
_NEGLIGIBLE = 1e-3


class LossConstants(NamedTuple):
    """E + A/N^α + B/D^β, N and D plain counts."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float


class BestShape(NamedTuple):
    """What a compute C = 6·params·tokens is best spent on."""

    params: float
    tokens: float


@dataclass(frozen=True)
class ChinchillaLaw(JsonNoun):
    """L = E + A/N^α + B/D^β, in nats a token, N and D plain counts.

    params_exponent, tokens_exponent: of N_opt and D_opt in the compute; they add to 1. params, tokens, losses: the runs
    fitted. residuals: ln(measured/fitted) at each. held_out: the same, by the law fitted without that run. note: what
    the reader must know; "" for nothing.
    """

    E: Estimate
    A: Estimate
    alpha: Estimate
    B: Estimate
    beta: Estimate
    params_exponent: Estimate
    tokens_exponent: Estimate
    params: tuple[float, ...]
    tokens: tuple[float, ...]
    losses: tuple[float, ...]
    residuals: tuple[float, ...]
    held_out: tuple[float, ...]
    delta: float = DELTA
    note: str = ""

    @property
    def constants(self) -> LossConstants:
        """The point estimates."""
        return LossConstants(self.E.value, self.A.value, self.alpha.value, self.B.value, self.beta.value)

    @property
    def leave_one_out(self) -> float:
        """The mean of |ln(measured/predicted)| over the runs, each predicted by the others; NaN if none could be."""
        known = [abs(error) for error in self.held_out if not math.isnan(error)]
        return float(np.mean(known)) if known else math.nan

    def loss(self, *, params: float, tokens: float) -> float:
        """L(N, D)."""
        check_positive(params=params, tokens=tokens)
        return _loss(self.constants, params, tokens)

    def best(self, *, compute: float) -> BestShape:
        """N = G(C/6)^(β/(α+β)), D = (C/6)/N with G = (αA/βB)^(1/(α+β)): least loss for C = 6ND FLOP."""
        check_positive(compute=compute)
        _, a, alpha, b, beta = self.constants
        pairs = compute / FLOP_PER_PARAM_TOKEN
        params = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * pairs ** (beta / (alpha + beta))
        return BestShape(params, pairs / params)


def chinchilla(
    params: Values,
    tokens: Values,
    loss: Values,
    *,
    runs: Sequence[Hashable] | None = None,
    delta: float = DELTA,
    draws: int = 200,
    seed: int = 0,
    coverage: float = 0.95,
) -> ChinchillaLaw:
    """The law, its intervals and what it misses, from one (N, D, L) a run, or a checkpoint of a constant rate.

    params: N. tokens: D. Plain counts. loss: nats a token, of one tokenizer and data set. runs: which run each row is
    of, None for one run a row; intervals and errors on what was left out take whole runs. delta: δ of the Huber loss on
    ln L, 10⁻³ in the source. draws: tables of the bootstrap; its percentile interval is approximate.

    Raises `InputError` for fewer than 6 runs or 3 different N or D, where N and D move together (then α and β cannot be
    told apart), and where the loss does not fall with both.

    >>> grid = [(n, d) for n in (1e8, 3e8, 1e9) for d in (2e9, 1e10, 5e10)]
    >>> losses = [1.7 + 400 / n**0.34 + 410 / d**0.28 for n, d in grid]
    >>> law = chinchilla(*zip(*grid), losses, draws=10)
    >>> round(law.alpha.value, 3), round(law.beta.value, 3), round(law.params_exponent.value, 3)
    (0.34, 0.28, 0.452)
    """
    check_inside(coverage=coverage)
    table, labels = _Table.of(params, tokens, loss), list(range(len(loss)) if runs is None else runs)
    if len(labels) != len(loss):
        raise InputError(f"runs and loss must be of one length, got {len(labels)} and {len(loss)}")
    _check_identified(table)
    found = _solve(table, delta)
    drawn = bootstrap(lambda rows: _drawn(table, rows, delta, found), labels, draws=draws, seed=seed, coverage=coverage)
    method = f"least Huber loss over {len(set(labels))} runs, bootstrap over runs (approximate)"
    estimates = {
        name: drawn.estimate(column, value, method, coverage)
        for column, (name, value) in enumerate(zip(_NAMES, _all(found), strict=True))
    }
    fitted = np.array([_loss(found, n, d) for n, d in zip(table.params, table.tokens, strict=True)])
    return ChinchillaLaw(
        **estimates,
        params=tuple(map(float, table.params)),
        tokens=tuple(map(float, table.tokens)),
        losses=tuple(map(float, table.losses)),
        residuals=tuple(map(float, np.log(table.losses / fitted))),
        held_out=tuple(map(float, _held_out(table, labels, delta, found))),
        delta=delta,
        note=_note(found, table),
    )


def chinchilla_constants(params: Values, tokens: Values, loss: Values, *, delta: float = DELTA) -> LossConstants:
    """The five constants alone, without intervals: what `chinchilla` fits, in milliseconds."""
    table = _Table.of(params, tokens, loss)
    _check_identified(table)
    return _solve(table, delta)


class _Table(NamedTuple):
    params: Array
    tokens: Array
    losses: Array

    @classmethod
    def of(cls, params: Values, tokens: Values, loss: Values) -> _Table:
        given = {"params": params, "tokens": tokens, "loss": loss}
        columns = {name: plain(column, name) for name, column in given.items()}
        for name, column in columns.items():
            for value in column:
                check_positive(**{name: value})
        lengths = {len(column) for column in columns.values()}
        if len(lengths) > 1:
            raise InputError(f"params, tokens and loss must be of one length, got {[len(c) for c in columns.values()]}")
        return cls(*(np.asarray([float(v) for v in column]) for column in columns.values()))

    def take(self, rows: Rows) -> _Table:
        return _Table(self.params[rows], self.tokens[rows], self.losses[rows])


_NAMES = ("E", "A", "alpha", "B", "beta", "params_exponent", "tokens_exponent")


def _check_identified(table: _Table) -> None:
    if len(table.losses) < FEWEST_RUNS:
        raise InputError(f"loss must hold at least {FEWEST_RUNS} runs for five constants, got {len(table.losses)}")
    for name, column in (("params", table.params), ("tokens", table.tokens)):
        if (count := len(np.unique(column))) < FEWEST_VALUES:
            raise InputError(f"{name} must hold at least {FEWEST_VALUES} different values, got {count}")
    n, d = np.log(table.params), np.log(table.tokens)
    n, d = n - n.mean(), d - d.mean()
    if np.std(d - (n @ d) / (n @ n) * n) < _TOGETHER:
        raise InputError(
            "params and tokens must not move together, as at one number of tokens a parameter: alpha and beta cannot "
            "be told apart; add shorter or longer runs of a model"
        )


def _solve(table: _Table, delta: float, start: LossConstants | None = None) -> LossConstants:
    """The constants are searched as ln of the three terms at the middle of the table, and α, β.

    start: constants to begin at, in place of the grid.
    """
    check_positive(delta=delta)
    n, d, log_loss = np.log(table.params), np.log(table.tokens), np.log(table.losses)
    n_middle, d_middle = float(n.mean()), float(d.mean())
    one, none = np.ones_like(n), np.zeros_like(n)
    terms = (
        [one, none, none, none, none],
        [none, one, n_middle - n, none, none],
        [none, none, none, one, d_middle - d],
    )
    model = sum_of_powers(np.stack([np.stack(columns, 1) for columns in terms]), log_loss)
    if start is None:
        starts = _grid_starts(table, n - n_middle, d - d_middle)
    else:
        e, a, alpha, b, beta = start
        starts = [np.array([math.log(e), math.log(a) - alpha * n_middle, alpha, math.log(b) - beta * d_middle, beta])]
    _, (e, a, alpha, b, beta) = least_huber(model, starts, delta)[0]
    for name, at, slope, x in (("params", a, alpha, n - n_middle), ("tokens", b, beta, d - d_middle)):
        _check_falls(name, at, slope, x, float(log_loss.min()))
    logs = [min(each, 700.0) for each in (e, a + alpha * n_middle, b + beta * d_middle)]
    e, a, b = (max(math.exp(each), 1e-300) for each in logs)
    return LossConstants(e, a, float(alpha), b, float(beta))


def _check_falls(name: str, at: float, slope: float, x: Array, log_least: float) -> None:
    """Of the power exp(at - slope·x)."""
    if not slope > 0:
        raise InputError(f"loss must fall with {name}, its exponent is fitted as {slope:.3g}")
    if at - slope * float(x.min()) < math.log(_NEGLIGIBLE) + log_least:
        raise InputError(f"loss must fall with {name}: what falls is below 0.1 % of the least loss, so no exponent")


def _grid_starts(table: _Table, n: Array, d: Array) -> list[Array]:
    """For each α and β of a grid the three terms are linear: non-negative least squares of the relative error."""
    from scipy.optimize import nnls

    found = []
    for alpha, beta in product(_GRID, _GRID):
        design = np.stack([np.ones_like(n), np.exp(-alpha * n), np.exp(-beta * d)], 1) / table.losses[:, None]
        terms, error = nnls(design, np.ones_like(n))
        floor = 1e-4 * table.losses.mean()
        e, a, b = np.log(np.maximum(terms, floor))
        found.append((error, np.array([e, a, alpha, b, beta])))
    found.sort(key=lambda each: each[0])
    return [start for _, start in found[:_STARTS]]


def _all(found: LossConstants) -> tuple[float, ...]:
    total = found.alpha + found.beta
    return (*found, found.beta / total, found.alpha / total)


def _drawn(table: _Table, rows: Rows, delta: float, start: LossConstants) -> tuple[float, ...]:
    drawn = table.take(rows)
    _check_identified(drawn)
    return _all(_solve(drawn, delta, start))


def _held_out(table: _Table, labels: Sequence[Hashable], delta: float, start: LossConstants) -> Array:
    """NaN where the rest does not identify the law."""
    errors = np.full(len(labels), math.nan)
    for run in dict.fromkeys(labels):
        left = np.array([label == run for label in labels])
        rest = table.take(np.flatnonzero(~left))
        try:
            _check_identified(rest)
            law = _solve(rest, delta, start)
        except InputError:
            continue
        for row in np.flatnonzero(left):
            errors[row] = math.log(table.losses[row] / _loss(law, table.params[row], table.tokens[row]))
    return errors


def _loss(law: LossConstants, params: float, tokens: float) -> float:
    return float(law.E + law.A * float(params) ** -law.alpha + law.B * float(tokens) ** -law.beta)


def _note(found: LossConstants, table: _Table) -> str:
    least, floor = float(table.losses.min()), found.E
    return "E cannot be told from 0: below 0.1 % of the least loss" if floor < _NEGLIGIBLE * least else ""
