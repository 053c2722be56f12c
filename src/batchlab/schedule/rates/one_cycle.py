"""1cycle: the learning rate up and down once, the momentum down and up (Smith 2018, arXiv 1803.09820).

With peak M, base b = M/ratio, half a cycle of s units and T >= 2s in all:

  shape   up to s        s to 2s                       2s to T
  paper   b to M         M to b                        b down to b/final_ratio
  log     b to M         M to 0, not below the floor   the floor b/final_ratio

all linear. "paper" is the text, fastai v1 and torch's `OneCycleLR(three_phase=True, anneal_strategy="linear")`; "log"
is what the author's solver did, by the logs of his runs. The momentum goes from p to q and back, and stays at p; his
solver went on to cycle at half the amplitude (`artefact`).
"""

from __future__ import annotations

import operator
from typing import Literal, get_args

import torch
from torch import Tensor

from batchlab.core.checks import check_count, check_not_negative, check_positive, check_truth, holds
from batchlab.core.errors import InputError
from batchlab.measure.course.learning_rate import ONE_CYCLE, set_momentum
from batchlab.schedule.rates.counted import Counted

Shape = Literal["paper", "log"]
CYCLE_SHARE, FINAL_RATIO, MOMENTUM = 0.9, 1000.0, (0.95, 0.85)


def cycle_rate(
    seen: float,
    *,
    peak: float,
    half: float,
    total: float,
    ratio: float = ONE_CYCLE,
    final_ratio: float = FINAL_RATIO,
    shape: Shape = "paper",
) -> float:
    """The rate after `seen` units; `half`, s, and `total`, T, in the same unit. Past T the last rate is held.

    >>> [round(cycle_rate(s, peak=1.2, half=3417, total=7080, ratio=12, shape="log"), 6) for s in (1000, 5000, 6900)]
    [0.42192, 0.644074, 0.0001]
    """
    _check(seen, half, total, ratio, final_ratio, shape)
    check_not_negative(peak=peak)
    base = peak / ratio
    floor = base / final_ratio
    if seen <= half:
        return base + (peak - base) * (seen / half)
    if seen < 2 * half:
        down = (seen - half) / half
        return peak + (base - peak) * down if shape == "paper" else max(peak * (1 - down), floor)
    if shape == "log":
        return floor
    rest = total - 2 * half
    done = min(seen - 2 * half, rest) / rest if rest else 0.0
    return base * (1 - done) + floor * done


def cycle_momentum(
    seen: float, *, half: float, momentum: tuple[float, float] = MOMENTUM, artefact: bool = False
) -> float:
    """The momentum after `seen` units: from the first of the pair to the second over s, back over s, and held.

    artefact: in place of holding it goes on to fall to halfway and rise again, each over s, as the author's solver did
    by its logs, which end long before it turns; for reproduction only.

    >>> round(cycle_momentum(7000, half=3417, artefact=True), 6)
    0.947571
    """
    check_not_negative(seen=seen)
    check_positive(half=half)
    high, low = _momenta(momentum)
    if seen < 2 * half:
        return high - (high - low) * (1 - abs(seen / half - 1))
    if not artefact:
        return high
    return high - 0.5 * (high - low) * (1 - abs((seen - 2 * half) / half % 2 - 1))


def _momenta(momentum: tuple[float, float]) -> tuple[float, float]:
    if not holds(lambda pair: len(pair) == 2 and 0 <= pair[1] <= pair[0] < 1, momentum):
        raise InputError(f"momentum must be (high, low) with 0 <= low <= high < 1, got {momentum!r}")
    return momentum


def _check(seen: float, half: float, total: float, ratio: float, final_ratio: float, shape: str) -> None:
    check_not_negative(seen=seen)
    check_positive(half=half, total=total, ratio=ratio, final_ratio=final_ratio)
    if not total >= 2 * half:
        raise InputError(f"total must be at least twice half, 2 x {half!r}, got {total!r}")
    if not ratio > 1:
        raise InputError(f"ratio, the peak over the base, must be > 1, got {ratio!r}")
    if not final_ratio >= 1:
        raise InputError(f"final_ratio must be at least 1, got {final_ratio!r}")
    if shape not in get_args(Shape):
        raise InputError(f"shape must be one of {list(get_args(Shape))}, got {shape!r}")


def check_cycle(ratio: float, final_ratio: float, shape: str, momentum: tuple[float, float] | None) -> None:
    """Refuses what `OneCycle` would."""
    _check(0, 1, 2, ratio, final_ratio, shape)
    if momentum is not None:
        _momenta(momentum)


class OneCycle(Counted):
    """One cycle of the learning rate and, against it, of the momentum or Adam's β₁; counted in examples or tokens.

    optimizer: the rate of each group is its peak M. A range test finds it, at this batch and weight decay
    (`measure.lr_range`, its `cycle().max_lr`). Every group must have a momentum or betas of floats, unless `momentum`
    is None. batch: units of an update over all ranks. total: T, units of the run. half: s, by default 0.45·T, for the
    cycle took 0.86 to 0.97 of the author's runs. ratio: M/b, 10 by default, 10 to 12 in his scripts. final_ratio: how
    far below b it ends, 1000 as in his logs; torch's default is 10^4. momentum: (high, low), (0.95, 0.85) by default;
    he takes (0.95, 0.8) for a shallow net and (0.9, 0.8) for DenseNet. shape, artefact: see the module.

    With another batch redo the range test; s and T stay in units. Not for runs that may be prolonged: `WSD`. A momentum
    set by hand is written over at each step.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    >>> schedule = OneCycle(optimizer, batch=50, total=500, half=200)
    >>> for update in range(4):
    ...     schedule.step()
    >>> schedule.get_last_lr(), optimizer.param_groups[0]["momentum"]
    ([1.0], 0.85)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        batch: int,
        total: int,
        half: int | None = None,
        ratio: float = ONE_CYCLE,
        final_ratio: float = FINAL_RATIO,
        momentum: tuple[float, float] | None = MOMENTUM,
        shape: Shape = "paper",
        artefact: bool = False,
    ) -> None:
        check_truth(artefact=artefact)
        check_count(2, total=total)
        half = max(1, round(CYCLE_SHARE * total / 2)) if half is None else half
        check_count(half=half)
        _check(0, half, total, ratio, final_ratio, shape)
        self.momentum = None if momentum is None else _momenta(momentum)
        self.half, self.total = operator.index(half), operator.index(total)
        self.ratio, self.final_ratio, self.artefact = ratio, final_ratio, artefact
        self.shape: Shape = shape
        self._check_momenta(optimizer)
        super().__init__(optimizer, batch=batch)

    def _check_momenta(self, optimizer: torch.optim.Optimizer) -> None:
        """Before anything is written."""
        groups = optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else []
        for group in groups if self.momentum is not None else []:
            betas = group.get("betas")
            if betas is None and "momentum" not in group:
                raise InputError(
                    f"momentum must be None for {type(optimizer).__name__}, which has no momentum and no betas, "
                    f"got {self.momentum!r}"
                )
            if betas is not None and isinstance(betas[0], Tensor):
                raise InputError(f"betas must be floats for their first to be cycled, got tensors: {betas!r}")

    @property
    def ends(self) -> int:
        """As `total`: from there on the last rate is held."""
        return self.total

    def rate(self, seen: int, base_lr: float) -> float:
        """`cycle_rate`, with the group's rate as the peak."""
        return cycle_rate(
            seen,
            peak=base_lr,
            half=self.half,
            total=self.total,
            ratio=self.ratio,
            final_ratio=self.final_ratio,
            shape=self.shape,
        )

    def _write_others(self) -> None:
        if self.momentum is None:
            return
        value = cycle_momentum(self._seen, half=self.half, momentum=self.momentum, artefact=self.artefact)
        set_momentum(self.optimizer, value)
