"""Regime adaptation: train a large batch for as many updates as the small one (Hoffer et al. 2017, arXiv 1705.08741).

With κ = B/B_ref the epochs and every milestone are κ times as many, and the rate √κ times as high: the covariance of a
step, η²/B times the gradients' second moment, stays. That is κ times the examples: a cure for the generalisation gap
that costs all that a larger batch saves but time, where the devices are there. Ghost batch norm and clipping, the other
parts of the paper's recipe, are apart from it.

The code released multiplies by ⌈κ⌉, and does not shrink below the reference batch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import torch

from batchlab.core.checks import check_count, check_positive, check_truth, holds, is_count
from batchlab.core.errors import InputError
from batchlab.rules.learning_rate import rescale
from batchlab.schedule.rates.counted import Counted, taken

LrRule = Literal["sqrt", "linear", "none"]
REF_BATCH = 128


@dataclass(frozen=True)
class Regime:
    """A step schedule at one batch size. epochs, milestones: of the whole data, exact, so that they may be fractions.

    cost: examples over those of the reference run. reason: what was moved and what it costs, in a sentence.
    """

    learning_rate: float
    batch: int
    epochs: float
    milestones: tuple[float, ...]
    cost: float
    reason: str

    def updates(self, examples: int) -> float:
        """epochs·examples/batch, of batches that run on over the end of an epoch.

        Where every epoch ends with a ragged batch instead there are more of them, and relatively more of large ones.
        """
        check_count(examples=examples)
        return self.epochs * examples / self.batch


def adapt_regime(
    *,
    learning_rate: float,
    batch: int,
    epochs: float,
    milestones: Sequence[float] = (),
    ref_batch: int = REF_BATCH,
    lr_rule: LrRule = "sqrt",
    keep_updates: bool = True,
) -> Regime:
    """The regime of `ref_batch` moved to `batch`, larger or smaller.

    learning_rate, epochs, milestones: as tuned at ref_batch, 128 in the paper's text; milestones in epochs, rising.
    lr_rule: "sqrt", the paper's, "linear" or "none". keep_updates: False leaves the epochs, and so makes κ times fewer
    updates: the paper's "+LR" runs, which lose accuracy.

    >>> adapted = adapt_regime(learning_rate=0.1, batch=2048, epochs=164, milestones=(81, 122))
    >>> round(adapted.learning_rate, 12), adapted.epochs, adapted.milestones, adapted.cost
    (0.4, 2624, (1296, 1952), 16.0)
    >>> adapted.reason
    'η·4 by the sqrt rule, epochs·16 to keep the updates of batch 128: 16 times the examples'
    """
    _check(batch, ref_batch, milestones, lr_rule)
    check_positive(learning_rate=learning_rate, epochs=epochs)
    if milestones and milestones[-1] > epochs:
        raise InputError(f"milestones must not lie beyond the {epochs!r} epochs, got {milestones!r}")
    kappa = Fraction(operator.index(batch), operator.index(ref_batch)) if keep_updates else Fraction(1)
    rate = rescale(learning_rate, ref_batch, batch, rule=lr_rule)
    moved = f"η·{rate / learning_rate:.4g} by the {lr_rule} rule, "
    if keep_updates:
        moved += (
            f"epochs·{float(kappa):.4g} to keep the updates of batch {ref_batch}: {float(kappa):.4g} times the examples"
        )
    else:
        moved += f"epochs kept: as many examples, in {ref_batch / batch:.4g} times the updates of batch {ref_batch}"
    scaled = tuple(_times(kappa, milestone) for milestone in milestones)
    return Regime(rate, operator.index(batch), _times(kappa, epochs), scaled, float(kappa), moved)


def _times(kappa: Fraction, epochs: float) -> float:
    exact = kappa * _exact(epochs)
    return int(exact) if exact.denominator == 1 else float(exact)


def _exact(epochs: float) -> Fraction:
    """As the decimal that was written: 0.1 is a tenth, not the nearest binary number, which lies above it."""
    return Fraction(repr(float(epochs)))


def _check(batch: int, ref_batch: int, milestones: Sequence[float], lr_rule: str) -> None:
    check_count(batch=batch, ref_batch=ref_batch)
    if lr_rule not in get_args(LrRule):
        raise InputError(f"lr_rule must be one of {list(get_args(LrRule))}, got {lr_rule!r}")
    if not holds(lambda values: list(values) == sorted(set(values)) and all_finite(values), milestones):
        raise InputError(f"milestones must be finite, > 0 and rising, got {milestones!r}")


def all_finite(values: Sequence[float]) -> bool:
    """Whether each is finite and > 0."""
    return all(0 < value < math.inf for value in values)


class RegimeAdaptation(Counted):
    """The step schedule of a reference run, at another batch, by its updates.

    optimizer: its rates are those of the reference run. batch: examples of an update over all ranks. examples: in an
    epoch. epochs, milestones, ref_batch, lr_rule, keep_updates: as in `adapt_regime`; epochs, where given, say where
    it ends. gamma: what the rate is multiplied by at each milestone, one number (0.1 by default) or one for each.

    When the batch changes in mid-run (`schedule.batch = ...`) rate and pace change with it: each update goes on to
    count as one of the reference run, however many examples it holds. `regime` is the adapted regime, with its cost.

    Where the data or the budget are given rather than the updates, `keep_updates=False`, or a schedule in examples.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    >>> schedule = RegimeAdaptation(optimizer, batch=512, examples=1024, epochs=2, milestones=(1,), lr_rule="none")
    >>> rates = []
    >>> for update in range(10):
    ...     rates += schedule.get_last_lr()
    ...     schedule.step()
    >>> [round(rate, 4) for rate in rates], schedule.seen / 1024, schedule.regime.cost
    ([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01], 5.0, 4.0)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        batch: int,
        examples: int,
        epochs: float | None = None,
        milestones: Sequence[float],
        gamma: float | Sequence[float] = 0.1,
        ref_batch: int = REF_BATCH,
        lr_rule: LrRule = "sqrt",
        keep_updates: bool = True,
    ) -> None:
        _check(batch, ref_batch, milestones, lr_rule)
        check_count(examples=examples)
        check_truth(keep_updates=keep_updates)
        milestones = tuple(map(float, milestones))
        each: Any = gamma if holds(lambda several: list(several) is not None, gamma) else [gamma] * len(milestones)
        gammas: list[float] = list(each)
        if len(gammas) != len(milestones) or not holds(all_finite, gammas):
            raise InputError(f"gamma must be > 0, one number or one for each of {len(milestones)}, got {gamma!r}")
        self.milestones, self.gammas = milestones, gammas
        self.examples, self.epochs, self.keep_updates = operator.index(examples), epochs, keep_updates
        self.ref_batch = operator.index(ref_batch)
        self.lr_rule: LrRule = lr_rule
        self._since, self._place = 0, Fraction(0)  # the last change of batch: units seen, examples of the reference run
        self._adapted(1.0, batch)  # before anything is written, for what it refuses
        super().__init__(optimizer, batch=batch)

    @property
    def regime(self) -> Regime:
        """The regime at the present batch, with the first group's rate; without `epochs`, up to the last milestone."""
        return self._adapted(float(self.base_lrs[0]), self._batch)

    def _adapted(self, learning_rate: float, batch: int) -> Regime:
        epochs = self.epochs if self.epochs is not None else max(self.milestones, default=1)
        return adapt_regime(
            learning_rate=learning_rate,
            batch=batch,
            epochs=epochs,
            milestones=self.milestones,
            ref_batch=self.ref_batch,
            lr_rule=self.lr_rule,
            keep_updates=self.keep_updates,
        )

    @property
    def ends(self) -> int | None:
        """The examples at which the epochs are over, at the present batch."""
        if self.epochs is None:
            return None
        left = _exact(self.epochs) * self.examples - self._place
        return self._since + math.ceil(left / self._pace())

    def rate(self, seen: int, base_lr: float) -> float:
        """The group's rate, moved to the batch, times the gammas of the milestones that are passed."""
        place = self._place_at(seen)
        passed = [g for at, g in zip(self.milestones, self.gammas, strict=True) if place >= _exact(at) * self.examples]
        return base_lr * rescale(1.0, self.ref_batch, self._batch, rule=self.lr_rule) * math.prod(passed)

    def _pace(self) -> Fraction:
        """Examples of the reference run that one example counts for."""
        return Fraction(self.ref_batch, self._batch) if self.keep_updates else Fraction(1)

    def _place_at(self, seen: int) -> Fraction:
        return self._place + (seen - self._since) * self._pace()

    def _rebatch(self, batch: int) -> None:
        self._place, self._since = self._place_at(self._seen), self._seen
        super()._rebatch(batch)
        self._write()

    def _initial_step(self) -> None:
        self._since, self._place = 0, Fraction(0)
        super()._initial_step()

    def state_dict(self) -> dict[str, Any]:
        """As `Counted`'s, with where the batch last changed."""
        place = [self._place.numerator, self._place.denominator]
        return {**super().state_dict(), "since": self._since, "place": place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Counted`'s."""
        since, place = taken(state_dict, "since"), taken(state_dict, "place")
        check_count(0, since=since)
        if not holds(lambda pair: len(pair) == 2 and is_count(pair[0], 0) and is_count(pair[1]), place):
            raise InputError(f"place must be a numerator and a denominator, got {place!r}")
        super().load_state_dict(state_dict)
        self._since, self._place = since, Fraction(*place)
