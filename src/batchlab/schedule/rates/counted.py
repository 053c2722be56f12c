"""Learning rates as functions of examples or tokens seen, in the form of torch's schedulers: what all of them share."""

from __future__ import annotations

import math
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from batchlab.core.checks import check_count, holds
from batchlab.core.errors import InputError


class Counting:
    """How far a run is, in units of one kind, examples or tokens: exact, for a float loses single tokens past 2^53.

    batch: the units of one update, which `step` takes where it is told no other. It may be set in mid-run, and then
    holds from the next update on.
    """

    _seen = 0
    _batch = 1

    @property
    def seen(self) -> int:
        """The units so far."""
        return self._seen

    @property
    def batch(self) -> int:
        """The units of one update."""
        return self._batch

    @batch.setter
    def batch(self, batch: int) -> None:
        check_count(batch=batch)
        self._rebatch(operator.index(batch))

    @property
    def units(self) -> int:
        """What `step()` counts where it is told no number."""
        return self._batch

    def _rebatch(self, batch: int) -> None:
        self._batch = batch

    def _add(self, count: int | None) -> None:
        check_count(count=self.units if count is None else count)
        self._seen += self.units if count is None else operator.index(count)

    def _counts(self) -> dict[str, Any]:
        return {"seen": self._seen, "batch": self._batch}

    def _take_counts(self, state: dict[str, Any]) -> None:
        seen, batch = taken(state, "seen"), taken(state, "batch")
        check_count(0, seen=seen)
        check_count(batch=batch)
        self._seen, self._batch = operator.index(seen), operator.index(batch)


class Counted(Counting, LRScheduler, ABC):
    """A learning rate that is a function of the units seen, whatever batches they came in.

    To write one, give `rate(seen, base_lr)`, a pure function; `ends` too, where there is an end. It holds for the
    update that starts at `seen`, and `step` is called once after each update, accumulated or not.

    optimizer: its groups' rates are the `base_lr` of each, of which a schedule says the share; `base_lrs` may be
    changed in mid-run. A group that is added later joins at the next `step`, with its rate then. A rate that is a
    tensor is filled in place. batch: the units of one update over all ranks, examples or tokens as the schedule says.

    State: units seen, batch, updates, base rates and the rates in force, all plain numbers; settings are no part of
    it, so that a run may be resumed with others. Set `batch` after loading to go on with another one. Loading
    gives the groups the rates they were saved with, in whichever order optimizer and schedule are made and loaded; a
    rate that something else wrote since is left alone until the next `step`. In `SequentialLR` every step counts
    `batch` units, and milestones are in updates.

    Each step writes the whole rate: what another schedule made of it is undone, in `ChainedScheduler` and beside
    `ReduceLROnPlateau` too. To have a factor on top, change `base_lrs`.

    >>> class Halving(Counted):
    ...     def rate(self, seen, base_lr):
    ...         return base_lr * 0.5 ** (seen / 1000)
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    >>> schedule = Halving(optimizer, batch=500)
    >>> schedule.step(), schedule.step(), schedule.step(1000)
    (None, None, None)
    >>> schedule.seen, schedule.get_last_lr()
    (2000, [0.1])
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, batch: int) -> None:
        check_count(batch=batch)
        self._batch, self._told_of_end = operator.index(batch), False
        super().__init__(optimizer)

    @abstractmethod
    def rate(self, seen: int, base_lr: float) -> float:
        """The learning rate of an update that starts after `seen` units, for a group whose own rate is `base_lr`."""

    @property
    def ends(self) -> int | None:
        """The units after which nothing changes any more; None if there is no such end."""
        return None

    def step(self, count: int | None = None) -> None:
        """Counts one update of `count` units, `batch` by default, and writes the rates of the next.

        Past `ends` the last rates are held, with a warning at the first update that started there.
        """
        if self.ends is not None and self._seen >= self.ends and not self._told_of_end:
            self._told_of_end = True
            warnings.warn(
                f"{type(self).__name__} ended at {self.ends}, and the run goes on at its last learning rate: "
                f"{self._last_lr}",
                UserWarning,
                stacklevel=2,
            )
        self._add(count)
        self._step_count += 1
        self.last_epoch += 1
        self._write()

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the next update, one a group, as the schedule has them."""
        return list(self._rates())

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON."""
        rates = {
            "base_lrs": [float(base) for base in self.base_lrs],
            "lr": [float(group["lr"]) for group in self.optimizer.param_groups],
        }
        return {**self._counts(), "updates": self.last_epoch, **rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; see the class for the order."""
        bases, rates, updates = (taken(state_dict, name) for name in ("base_lrs", "lr", "updates"))
        if not isinstance(bases, Sequence) or not isinstance(rates, Sequence):
            raise InputError(f"base_lrs and lr must be one finite rate >= 0 a group, got {bases!r} and {rates!r}")
        if len(rates) > len(self.optimizer.param_groups):
            raise InputError(
                f"the optimizer must have the {len(rates)} parameter groups of the state, "
                f"got {len(self.optimizer.param_groups)}"
            )
        if len(bases) != len(rates) or not all(map(_is_rate, [*bases, *rates])):
            raise InputError(f"base_lrs and lr must be one finite rate >= 0 a group, got {bases!r} and {rates!r}")
        check_count(-1, updates=updates)  # what waits in a SequentialLR has had none, not even its first
        self._take_counts(state_dict)
        self.base_lrs, self.last_epoch = [float(base) for base in bases], updates
        self._step_count = updates + 1
        ours = [as_number(lr) for lr in self._last_lr]
        for group, mine, rate in zip(self.optimizer.param_groups, ours, rates, strict=False):
            if as_number(group["lr"]) == mine:
                put(group, "lr", rate)
        self._join()
        self._write_others()
        self._note()

    def _initial_step(self) -> None:
        self._step_count, self.last_epoch, self._seen = 1, 0, 0
        self.base_lrs = []
        self._write()

    def _update_lr(self, epoch: int | None = None) -> None:
        if epoch is not None:
            self.last_epoch, self._seen = epoch, epoch * self.units
        self._write()

    def _write(self) -> None:
        self._join()
        for group, rate in zip(self.optimizer.param_groups, self._rates(), strict=True):
            put(group, "lr", rate)
        self._write_others()
        self._note()

    def _rates(self) -> list[float]:
        return [self.rate(self._seen, float(base)) for base in self.base_lrs]

    def _join(self) -> None:
        """Takes in groups that are new, with the rate that they have."""
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            base = as_number(group.setdefault("initial_lr", _copy(group["lr"])))
            if not _is_rate(base):
                raise InputError(f"lr of parameter groups must be finite and >= 0, got {base!r}")
            self.base_lrs.append(base)

    def _write_others(self) -> None:
        """Writes what goes with the rate, such as a momentum."""

    def _note(self) -> None:
        self._last_lr = [_copy(group["lr"]) for group in self.optimizer.param_groups]


def put(group: dict[str, Any], key: str, value: float) -> None:
    """Writes a number of a parameter group, in place where it is a tensor."""
    if isinstance(group[key], Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def as_number(value: float | Tensor) -> float:
    """A setting of a parameter group as a plain float."""
    return float(value)


def _is_rate(value: float) -> bool:
    return holds(lambda lr: 0 <= lr < math.inf, value)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def taken(state: dict[str, Any], name: str) -> Any:
    """An entry of a saved state; `InputError` where there is none, as in the state of another schedule."""
    if name not in state:
        raise InputError(f"the state must hold {name!r}, got {sorted(state)}: it is of another schedule")
    return state[name]
