"""A learning rate that follows the examples by a schedule and the batch size by a rule, both at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.rules.learning_rate import rescale
from batchlab.schedule.batches.controller import BatchController
from batchlab.schedule.batches.scheduled_batch import LrRule, ScheduledBatch
from batchlab.schedule.rates.counted import Counted
from batchlab.schedule.rates.power import Power
from batchlab.schedule.rates.regime_adaptation import RegimeAdaptation

LrFactor = Callable[[int], float]


class HeldRate(Counted):
    """A learning rate that stands: for an `AdaptiveBatch` whose rate moves with the batch alone.

    optimizer, batch: see `Counted`.
    """

    def rate(self, seen: int, base_lr: float) -> float:
        """The group's own."""
        return base_lr


class BatchRate:
    """η = schedule(seen, η₀·f(B)): of an update of B examples that starts after `seen`.

    schedule: at its start or where it is resumed. factor: f, 1 at the size for which the optimizer's rates η₀ were
    stated. size: of the first update. It is the schedule's base rates that move, so that it shows the rate in force.
    """

    def __init__(self, schedule: Counted, factor: LrFactor, size: int) -> None:
        self.schedule, self._factor = schedule, factor
        self._base_lrs = [float(base) for base in schedule.base_lrs]
        self._begin(size)

    def _begin(self, size: int) -> None:
        """The rate of the next update, of `size` examples."""
        if self.schedule.batch != size:
            self.schedule.batch = size
        bases = self._moved(size)
        rates = [self.schedule.rate(self.schedule.seen, base) for base in bases]
        self.schedule.load_state_dict({**self.schedule.state_dict(), "base_lrs": bases, "lr": rates})

    @property
    def learning_rate(self) -> float:
        """In force, of the optimizer's first group."""
        return float(self.schedule.optimizer.param_groups[0]["lr"])

    def step(self, size: int, next_size: int) -> None:
        """Counts an update of `size` examples, and sets the rate of the next one, of `next_size`."""
        if self.schedule.batch != size:
            self.schedule.batch = size
        self.schedule.base_lrs = list(self._moved(next_size))
        self.schedule.step()
        if next_size != size:
            self.schedule.batch = next_size

    def _moved(self, size: int) -> list[float]:
        """The base rates at a size; groups that were added since join at the rate that they had."""
        self._base_lrs += [float(base) for base in self.schedule.base_lrs[len(self._base_lrs) :]]
        factor = self._factor(size)
        check_positive(lr_rule=factor)
        return [base * factor for base in self._base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"base_lrs": list(self._base_lrs), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], size: int) -> None:
        """Takes over what `state_dict` gave. size: of the next update, another than was foreseen under other bounds."""
        self.schedule.load_state_dict(state["schedule"])
        self._base_lrs = [float(base) for base in state["base_lrs"]]
        if self.schedule.batch != size:
            self._begin(size)


def lr_factor(controller: BatchController, rule: LrRule | LrFactor | None, base: int) -> LrFactor:
    """f(B) by a rule: "none", "linear", "sqrt" from `base`, a function, or for None what a `ScheduledBatch` has.

    >>> from batchlab.schedule.batches.batch_ramp import BatchRamp
    >>> lr_factor(BatchRamp(4, 8, over=8), "sqrt", 4)(16)
    2.0
    """
    check_count(lr_batch=base)
    own = controller if isinstance(controller, ScheduledBatch) and controller.lr_rule != "none" else None
    if rule is None:
        return own.lr_factor if own is not None else unmoved
    if own is not None:
        raise InputError(f"lr_rule must be None where the controller has its own, {own.lr_rule!r}, got {rule!r}")
    if callable(rule):
        return rule
    if rule not in ("none", "linear", "sqrt"):
        raise InputError(f'lr_rule must be "none", "linear", "sqrt" or a function of the size, got {rule!r}')
    return unmoved if rule == "none" else lambda size: rescale(1.0, base, size, rule=rule)


def unmoved(size: int) -> float:
    """1: the rate does not follow the batch."""
    return 1.0


def check_schedule(schedule: Counted | None, factor: LrFactor, batch: int | None) -> None:
    """Refuses what does not count examples, or follows the batch twice. batch: what it must be made with, or None."""
    if schedule is None:
        if factor is not unmoved:
            raise InputError("a rate that moves with the batch needs schedule: HeldRate(optimizer, batch=...) at least")
        return
    name = type(schedule).__name__
    if not isinstance(schedule, Counted):
        raise InputError(
            f"schedule must count examples, so be a Counted, got {name}: by updates it would stretch as the batch "
            "moves, and one that Accelerate has prepared steps once for every rank"
        )
    if factor is not unmoved and isinstance(schedule, (Power, RegimeAdaptation)):
        raise InputError(f"lr_rule must be none with a {name}, which moves with the batch by itself")
    if batch is not None and (schedule.batch != batch or schedule.seen):
        raise InputError(
            f"the {name} must be new and made with batch={batch}, where the controller starts, got {schedule.batch} "
            f"after {schedule.seen}"
        )
