"""The critical batch size as the batch that costs 20 % more data (Zhang et al. 2024, arXiv 2410.21676).

Steps to a target are steps(B) = a + b/B, so that a run at B takes aB + b examples. With r the overhead allowed over a
base batch B_o, on a part of the law where data hardly depend on the batch,

  aB* + b = (1 + r)(aB_o + b)   gives   B* = (1 + r)·B_o + r·b/a.

a = S_min and b = E_min of `fit_tradeoff`, b/a = B_crit: B* is B_crit stretched and moved, and so is its interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from batchlab.core.checks import check_positive, holds
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.curves.tradeoff_fit import Tradeoff, fit_tradeoff


@dataclass(frozen=True)
class CriticalBatch(JsonNoun):
    """B*, in the unit of the batch sizes, and what it follows from.

    size: B* with its interval; infinite above where the steps do not bound it. overhead: r. base: B_o.
    fit: a = fit.s_min, b = fit.e_min, the residuals ln(measured/fitted) at each size, the censored runs.
    bracketed: whether B* and its interval are bounded and B* lies among the sizes tried; B_crit need not. note: why
    not, and the fit's own.
    """

    size: Estimate
    overhead: float
    base: float
    fit: Tradeoff
    bracketed: bool
    note: str = ""

    def data_overhead(self, batch_size: float) -> float:
        """(aB + b)/(aB_o + b) - 1: the data that a run at `batch_size` needs beyond the base's, as a share."""
        check_positive(batch_size=batch_size)
        a, b = self.fit.s_min.value, self.fit.e_min.value
        return a * (batch_size - self.base) / (a * self.base + b)


def critical_batch(
    batch_sizes: Sequence[float],
    steps: Sequence[float | None],
    overhead: float = 0.2,
    base: float | None = None,
    *,
    coverage: float = 0.95,
) -> CriticalBatch:
    """B*: where the data to the target are `overhead` above those at `base`, from (batch size, steps to target) a run.

    batch_sizes: in any one unit, examples, sequences or tokens; B* is in it too. steps: updates to the target; None or
    infinity where it was not reached, treated as in `fit_tradeoff`. Runs of one size are repeats: their ln steps are
    averaged. Of a search over other settings give the best, as the source does.
    overhead: r, 0.2 in the source. base: B_o; None for the smallest size tried. The source takes 256 sequences of 512
    tokens, a size of its own grid. B* is never below (1 + r)·B_o, so a base near B_crit makes B* large: choose one
    where halving the batch still doubles the steps.

    The interval is that of B_crit, mapped: `fit_tradeoff` says for which errors it holds. The base is a chosen number
    and adds nothing to it.

    Raises `InputError` for fewer than 3 sizes, for what is not positive, and where no plateau is seen (a = 0): B* is
    then unbounded. Not for runs with one fixed learning rate, β₂ or weight average at all sizes: small batches then
    look bad, and B* comes out too large.

    >>> round(critical_batch([16, 64, 256, 1024], [500, 200, 125, 106.25]).size.value, 6)
    32.0
    """
    if not holds(lambda overhead: 0 < overhead < math.inf, overhead):
        raise InputError(f"overhead must be finite and > 0, as 0.2 for 20 %, got {overhead!r}")
    if base is not None:
        check_positive(base=base)
    fit = fit_tradeoff(batch_sizes, steps, coverage=coverage)
    chosen = fit.batch_sizes[0] if base is None else float(base)
    low, value, high = (
        (1 + overhead) * chosen + overhead * b for b in (fit.b_crit.low, fit.b_crit.value, fit.b_crit.high)
    )
    if not math.isfinite(value):
        raise InputError(
            f"no plateau seen: B* unbounded. The steps fall as 1/B up to batch size {fit.batch_sizes[-1]:g}; B* is at "
            f"least {low:.4g} at {100 * coverage:g} % coverage. Add larger batch sizes"
        )
    origin = "the smallest size tried" if base is None else "as given"
    method = f"{100 * overhead:g} % more data than at batch size {chosen:g} ({origin}), {fit.b_crit.method}"
    why = _why_not_bracketed(fit, value, high)
    notes = [note for note in (why, fit.note) if note]
    return CriticalBatch(
        Estimate(value, low, high, method, coverage), float(overhead), chosen, fit, not why, "; ".join(notes)
    )


def _why_not_bracketed(fit: Tradeoff, value: float, high: float) -> str:
    smallest, largest = fit.batch_sizes[0], fit.batch_sizes[-1]
    if fit.b_crit.low == 0:
        return "not bracketed: the steps may not fall with the batch size at all"
    if high == math.inf:
        return f"not bracketed: no plateau is sure up to batch size {largest:g}"
    if not smallest <= value <= largest:
        return f"not bracketed: B* = {value:.4g} lies outside the sizes tried, {smallest:g} to {largest:g}"
    return ""
