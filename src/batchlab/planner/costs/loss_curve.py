"""Loss for the money: a loss-per-token curve, which is of one global batch, and tokens per dollar, of a machine.

After D dollars the loss is L(D·tokens_per_dollar); a loss ℓ takes L⁻¹(ℓ)/tokens_per_dollar dollars (arXiv 2410.19456:
learning and hardware are measured apart; its exact construction is not known).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_count, check_positive, holds
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.planner.costs.run_cost import RunCost
from batchlab.planner.text_table import text_table

NOT_REACHED, OFF_THE_CURVE = "not reached", "off the curve"
_FEWEST = 2


@dataclass(frozen=True)
class LossCurve(JsonNoun):
    """Losses of one training run after so many tokens, ascending, read between the samples and never beyond them.

    batch: the run's global batch in sequences, None if it is not known: the curve holds for that batch alone.

    Between samples it is the monotone cubic of Fritsch and Carlson (1980) in log tokens. Samples that rise are first
    made to fall, by the nearest falling values in least squares (isotonic regression): `smoothed` says how far that
    moved one. A target that noise crosses early is so met where the curve's level meets it.

    >>> curve = LossCurve((1e6, 1e7, 1e8), (5.0, 4.0, 3.5), batch=256)
    >>> curve.loss(1e7), round(curve.tokens(4.5)), curve.tokens(3.0)
    (4.0, 2691197, None)
    """

    token_counts: tuple[float, ...]
    losses: tuple[float, ...]
    batch: int | None = None

    def __post_init__(self) -> None:
        columns: dict[str, object] = {"token_counts": self.token_counts, "losses": self.losses}
        for name, given in columns.items():
            if not isinstance(given, Iterable) or isinstance(given, str):
                raise InputError(f"{name} must be numbers in a sequence, got {given!r:.80}")
        counts, losses = (tuple(values) for values in (self.token_counts, self.losses))
        if len(counts) != len(losses) or len(counts) < _FEWEST:
            raise InputError(
                f"a curve needs as many losses as token counts, two at least, got {len(counts)}, {len(losses)}"
            )
        for count, loss in zip(counts, losses, strict=True):
            check_positive(token_counts=count)
            if not holds(math.isfinite, loss):
                raise InputError(f"losses must be finite, got {loss!r}")
        counts, losses = tuple(map(float, counts)), tuple(map(float, losses))
        if any(later <= earlier for earlier, later in pairwise(counts)):
            raise InputError(f"token_counts must ascend, got {list(counts)!r:.80}")
        if self.batch is not None:
            check_count(batch=self.batch)
        object.__setattr__(self, "token_counts", counts)
        object.__setattr__(self, "losses", losses)

    @cached_property
    def _falling(self) -> NDArray[np.float64]:
        from scipy.optimize import isotonic_regression

        return np.asarray(isotonic_regression(self.losses, increasing=False).x, dtype=np.float64)

    @cached_property
    def _curve(self) -> Any:
        from scipy.interpolate import PchipInterpolator

        return PchipInterpolator(np.log(self.token_counts), self._falling)

    @property
    def smoothed(self) -> float:
        """How far the largest move of a sample was that made the losses fall; 0 where they fell already."""
        return float(np.abs(self._falling - np.array(self.losses)).max())

    def loss(self, tokens: float) -> float | None:
        """The loss after so many tokens; None before the first sample and beyond the last."""
        check_positive(tokens=tokens)
        if not self.token_counts[0] <= tokens <= self.token_counts[-1]:
            return None
        return float(self._curve(math.log(tokens)))

    def tokens(self, loss: float) -> float | None:
        """The fewest tokens after which the curve is at `loss`; None where it is not reached.

        A loss above the first sample's is refused: when that was met is not known.
        """
        if not holds(lambda value: value <= self._falling[0], loss):
            raise InputError(f"loss must be at most {self._falling[0]:g}, the curve's first sample, got {loss!r}")
        if loss < self._falling[-1]:
            return None
        place = int(np.argmax(self._falling <= loss))
        if place == 0:
            return self.token_counts[0]
        from scipy.optimize import brentq

        def above(log_tokens: float) -> float:
            return float(self._curve(log_tokens)) - loss

        left, right = (math.log(count) for count in self.token_counts[place - 1 : place + 1])
        return self.token_counts[place] if above(right) >= 0 else math.exp(brentq(above, left, right, xtol=1e-12))


@dataclass(frozen=True)
class LossCost(JsonNoun):
    """One row's losses and dollars. losses: at each budget, None off the curve. dollars: to each target, None where it
    is not reached.

    warning: "" or why the curve may not be this row's.
    """

    row: RunCost
    losses: tuple[float | None, ...]
    dollars: tuple[float | None, ...]
    warning: str = ""


@dataclass(frozen=True)
class LossTable(JsonNoun):
    """budgets: USD. targets: losses. rows: in the order they came."""

    budgets: tuple[float, ...]
    targets: tuple[float, ...]
    rows: tuple[LossCost, ...]

    def table(self) -> str:
        """Plain text: loss at each budget, dollars to each target, and the warnings."""
        head = ["device", "count", "strategy", "batch"]
        head += [f"loss at {budget:g} USD" for budget in self.budgets] + [f"USD to {loss:g}" for loss in self.targets]
        lines = [
            [each.row.device, str(each.row.devices), each.row.strategy, str(each.row.batch)]
            + [OFF_THE_CURVE if value is None else f"{value:.4g}" for value in each.losses]
            + [NOT_REACHED if value is None else f"{value:.4g}" for value in each.dollars]
            for each in self.rows
        ]
        warnings = dict.fromkeys(each.warning for each in self.rows if each.warning)
        return text_table(head, lines) + "".join(f"\nwarning: {warning}" for warning in warnings)


def loss_per_dollar(
    curve: LossCurve, rows: Sequence[RunCost], *, budgets: Sequence[float] = (), targets: Sequence[float] = ()
) -> LossTable:
    """The loss of each row after `budgets` USD, and the USD it takes to each target loss.

    rows: of a `CostTable`, or runs alone; each needs a price. Nothing is extrapolated: a budget that buys more or less
    tokens than the curve holds is off the curve, and a target below it is not reached. A row whose batch is not the
    curve's gets a warning: loss per token is another there.
    """
    if not budgets and not targets:
        raise InputError("budgets or targets must hold one or more, got none of either")
    if not rows:
        raise InputError("rows must hold one or more, got none")
    wanted = [curve.tokens(target) for target in targets]
    return LossTable(
        tuple(map(float, budgets)),
        tuple(map(float, targets)),
        tuple(_loss_cost(curve, row, budgets, wanted) for row in rows),
    )


def _loss_cost(curve: LossCurve, row: RunCost, budgets: Sequence[float], wanted: Sequence[float | None]) -> LossCost:
    if row.tokens_per_dollar is None:
        raise InputError(f"loss per dollar needs a price, got none for {row.device}")
    rate = row.tokens_per_dollar
    check_positive(**{f"budgets[{place}]": budget for place, budget in enumerate(budgets)})
    losses = tuple(curve.loss(budget * rate) for budget in budgets)
    dollars = tuple(None if tokens is None else tokens / rate for tokens in wanted)
    return LossCost(row, losses, dollars, _warning(curve, row))


def _warning(curve: LossCurve, row: RunCost) -> str:
    if curve.batch is None:
        return "the curve's global batch is not given: its loss per token holds for one batch alone"
    if curve.batch == row.batch:
        return ""
    return f"batch {row.batch} is not the curve's {curve.batch}: its loss per token is another"
