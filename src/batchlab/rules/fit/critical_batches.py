"""The critical batch against tokens, B_crit = a·D_min^p, from runs with any schedule (Bergsma et al. 2025).

For each N and B the losses of finished runs of several lengths make a curve L_B(D) = E + k·D^-β; read at one target
loss it gives the tokens D(B) to it, and D(B) = D_min(1 + B/B_crit) over B the critical batch, which takes twice the
least tokens D_min; then a power law over D_min. N parameters, D training tokens, B tokens of one update. arXiv
2505.13738; that k and β are each batch's own and E the model's is batchlab's reading of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_inside, check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.curves.tradeoff_fit import Tradeoff, fit_tradeoff
from batchlab.rules.fit.power_laws import PowerLaw, Values, checked, plain, power_law
from batchlab.rules.fit.table import RunTable, groups
from batchlab.rules.fit.tuning import tuned_rows

Array = NDArray[np.float64]
LEVELS = 3
FEWEST_BATCHES, FEWEST_LENGTHS = 3, 3


@dataclass(frozen=True)
class LossCurves(JsonNoun):
    """L_B(D) = E + k_B·D^-β_B of one model, one curve a batch. E: the loss that no number of tokens goes below.

    batch_tokens, k, beta: one entry a batch, D in tokens. low, high: the losses between which each curve was measured.
    residuals: ln(measured/fitted) of each run, by batch and tokens.
    """

    params: float
    E: float
    batch_tokens: tuple[float, ...]
    k: tuple[float, ...]
    beta: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    residuals: tuple[float, ...]

    def tokens(self, loss: float) -> tuple[tuple[float, float], ...]:
        """(B, D(B)) to a loss, of the batches whose runs lie on both sides of it: a curve is never carried beyond."""
        return tuple(
            (batch, ((loss - self.E) / k) ** (-1 / beta))
            for batch, k, beta, low, high in zip(self.batch_tokens, self.k, self.beta, self.low, self.high, strict=True)
            if low <= loss <= high
        )


def loss_curves(params: float, batch_tokens: Values, tokens: Values, loss: Values) -> LossCurves:
    """The curves of one model's finished runs: E by the least squared error of ln L, with k and β of each batch.

    For a given E, ln(L - E) is a straight line in ln D for each batch, so the error has one free number. Batches with
    fewer than two lengths are left out; at least one must have three.
    """
    check_positive(params=params)
    batches, lengths = checked(batch_tokens, tokens, "batch_tokens", "tokens")
    columns = tuple(map(np.array, (batches, lengths, checked(batch_tokens, loss, "batch_tokens", "loss")[1])))
    found = [rows for _, rows in groups(columns[0]) if len(np.unique(columns[1][rows])) > 1]
    if not any(len(np.unique(columns[1][rows])) >= FEWEST_LENGTHS for rows in found):
        raise InputError(
            f"tokens must hold at least {FEWEST_LENGTHS} different lengths for one batch at params {params:.4g}"
        )
    d, losses = [np.log(columns[1][rows]) for rows in found], [columns[2][rows] for rows in found]
    floor = _floor(d, losses)
    lines = [_line(x, np.log(y - floor)) for x, y in zip(d, losses, strict=True)]
    if not all(slope < 0 for _, slope in lines):
        raise InputError(f"loss must fall with tokens at every batch size, at params {params:.4g} it does not")
    fits = [np.exp(at + slope * x) + floor for (at, slope), x in zip(lines, d, strict=True)]
    return LossCurves(
        float(params),
        floor,
        tuple(float(columns[0][rows[0]]) for rows in found),
        tuple(math.exp(min(at, 700.0)) for at, _ in lines),
        tuple(-slope for _, slope in lines),
        tuple(float(y.min()) for y in losses),
        tuple(float(y.max()) for y in losses),
        tuple(float(r) for y, fit in zip(losses, fits, strict=True) for r in np.log(y / fit)),
    )


def _floor(d: Sequence[Array], losses: Sequence[Array]) -> float:
    """The E in [0, least loss) of least squared error."""
    from scipy.optimize import minimize_scalar

    least = min(float(y.min()) for y in losses)

    def error(gap: float) -> float:
        floor = least * -math.expm1(gap)  # L - E from 10⁻⁶ of the least loss to all of it
        total = 0.0
        for x, y in zip(d, losses, strict=True):
            at, slope = _line(x, np.log(y - floor))
            total += float((np.log((np.exp(at + slope * x) + floor) / y) ** 2).sum())
        return total

    grid = np.linspace(math.log(1e-6), 0.0, 101)
    best = int(np.argmin([error(float(gap)) for gap in grid]))
    ends = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 100)])
    found = minimize_scalar(error, bounds=ends, method="bounded", options={"xatol": 1e-12})
    return least * -math.expm1(float(found.x))


def _line(x: Array, y: Array) -> tuple[float, float]:
    dx = x - x.mean()
    slope = float(dx @ (y - y.mean()) / (dx @ dx))
    return float(y.mean()) - slope * float(x.mean()), slope


@dataclass(frozen=True)
class CriticalBatchLaw(JsonNoun):
    """B_crit = a·D_min^p, both in tokens. tradeoffs: for each model and target loss, with s_min, e_min = D_min, b_crit.

    params, target_losses: of each trade-off. curves: each model's. law: over the bracketed ones; None where fewer than
    three different D_min are, and then note says so.
    """

    law: PowerLaw | None
    params: tuple[float, ...]
    target_losses: tuple[float, ...]
    tradeoffs: tuple[Tradeoff, ...]
    curves: tuple[LossCurves, ...]
    note: str = ""


def critical_batch_law(
    table: RunTable, *, target_losses: float | Sequence[float] | None = None, coverage: float = 0.95
) -> CriticalBatchLaw:
    """B_crit against D_min from finished runs with params, tokens, batch_tokens and loss.

    With a learning_rate column each setting counts at its best rate; without one they must have been tuned before.

    target_losses: one or several, where the curves are read; None for three a model, spread over the losses that all
    its batches have on both sides. Nothing is extrapolated: a batch whose runs do not enclose a target takes no part in
    it. Each trade-off has its profile interval; the law's is Student's and takes its points as independent, which
    targets of one model are not: with several of them it is too narrow.

    Raises `InputError` for a model with fewer than three batches, and where no target is enclosed by three.
    """
    check_inside(coverage=coverage)
    targets = _targets(target_losses)
    table.need("params", "tokens", "batch_tokens", "loss", law="critical_batch_growth")
    curves, left_out = [], []
    chosen = table.take(tuned_rows(table, "params", "tokens", "batch_tokens"))
    batch_tokens, tokens, loss = (chosen[name] for name in ("batch_tokens", "tokens", "loss"))
    for (params,), rows in chosen.groups("params"):
        try:
            curves.append(loss_curves(params, batch_tokens[rows], tokens[rows], loss[rows]))
        except InputError as error:
            left_out.append(str(error))
    found = []
    for curve in curves:
        for target in _levels(curve) if targets is None else targets:
            pairs = curve.tokens(target)
            if len(pairs) < FEWEST_BATCHES:
                left_out.append(f"loss {target:.4g} at params {curve.params:.4g} has {len(pairs)} batches around it")
                continue
            fit = fit_tradeoff([b for b, _ in pairs], [d / b for b, d in pairs], coverage=coverage)
            found.append((curve.params, target, fit))
    if not found:
        raise InputError(
            f"no target loss has runs on both sides at {FEWEST_BATCHES} batch sizes: {'; '.join(left_out) or 'no runs'}"
        )
    law, why = _law(found, coverage)
    return CriticalBatchLaw(
        law,
        tuple(params for params, _, _ in found),
        tuple(target for _, target, _ in found),
        tuple(fit for _, _, fit in found),
        tuple(curves),
        "; ".join([*left_out, *why]),
    )


def _targets(given: float | Sequence[float] | None) -> tuple[float, ...] | None:
    if given is None:
        return None
    targets = plain([given] if isinstance(given, Real) else given, "target_losses")
    if not targets:
        raise InputError("target_losses must hold at least one loss, got none")
    for target in targets:
        check_positive(target_losses=target)
    return tuple(map(float, targets))


def _levels(curve: LossCurves) -> list[float]:
    low, high = max(curve.low), min(curve.high)
    if low >= high:
        return [(low + high) / 2]
    return [float(level) for level in np.geomspace(low, high, LEVELS + 2)[1:-1]]


def _law(found: Sequence[tuple[float, float, Tradeoff]], coverage: float) -> tuple[PowerLaw | None, list[str]]:
    good = [fit for _, _, fit in found if fit.bracketed]
    why = [
        f"B_crit at loss {target:.4g}, params {params:.4g} is not bracketed: {fit.note}"
        for params, target, fit in found
        if not fit.bracketed
    ]
    least, critical = [fit.e_min.value for fit in good], [fit.b_crit.value for fit in good]
    try:
        law = power_law(least, critical, x_name="least_tokens", y_name="batch_tokens", coverage=coverage)
    except InputError as error:
        return None, [*why, f"no law: {error}"]
    return law, why
