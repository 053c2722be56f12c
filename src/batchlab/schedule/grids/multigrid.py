"""Multigrid training: the shape of a batch moves, and its size with it, so that an update costs alike throughout.

Wu, Girshick, He, Feichtenhofer and Krähenbühl 2020, "A Multigrid Method for Efficiently Training Video Models", arXiv
1912.00998. A long cycle over epochs goes from coarse shapes with large batches to the full shape, once in each stage of
the learning rate, which is multiplied with the batch; a short cycle over updates changes the spatial size within it and
changes no rate. Where the paper and the code released differ or the paper is silent, this is the code.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from batchlab.core.checks import check_count, check_not_negative, check_positive, holds
from batchlab.core.errors import InputError
from batchlab.schedule.grids.multigrid_cycles import (
    LONG_CYCLES,
    SHORT_CYCLES,
    BatchNormRule,
    Factors,
    GridShape,
    LongEntry,
    base_sizes,
    batch_norm_rule,
    cycle_batches,
    entry_rates,
    long_entries,
)
from batchlab.schedule.rates.counted import Counted

EPOCH_FACTOR, EVALUATIONS = 1.5, 3
_RATES = ("epoch_factor", "gamma", "warmup_epochs", "warmup_rate")


@dataclass(frozen=True)
class Multigrid:
    """The schedule of a run that was tuned at one shape, batch and stepwise rate: a pure function of the epoch.

    sizes: the default shape, (T, H, W) of a clip or (H, W) of a picture. batch: its examples an update, over all ranks.
    steps: the epochs at which the baseline's rate falls, 0 first; epochs: its last. epoch_factor: how many times as
    many epochs (1.5; there are fewer updates in them).
    long_cycle: factors of the default sizes, one for each axis, coarse to fine; by default the paper's for three axes,
    the paper's without time for two. Empty: no long cycle. short_cycle: the shapes that come before the base one in
    turn, each factor of the default size, or None for the base's size; empty for none.
    gamma: what a stage multiplies the rate by (0.1). warmup_epochs: of this run's own epochs, linear from
    warmup_rate, a share of the base rate, as in the baseline.
    smallest: the least size of any axis that the model takes.

    The examples of an epoch are seen once, whatever their shape. Evaluate at the full shape. The optimizer's state is
    kept where the shape changes. Not for models that are bound to one size, as with position embeddings that are not
    interpolated, nor where decoding the data is what takes the time: it is decoded epoch_factor times as often.
    Raises `InputError` for what makes a size below `smallest` or a batch of 0.

    >>> schedule = Multigrid((32, 224, 224), batch=64, steps=[0, 94, 154, 196], epochs=239)
    >>> [(entry.sizes, entry.factor, entry.end) for entry in schedule.entries[:4]]
    [((8, 158, 158), 8, 73), ((16, 158, 158), 4, 110), ((16, 224, 224), 2, 142), ((32, 224, 224), 1, 158)]
    >>> [(shape.sizes, batch) for shape, batch in schedule.cycle(0)]
    [((8, 112, 112), 1024), ((8, 158, 158), 512), ((8, 158, 158), 512)]
    >>> schedule.length, schedule.rate(150), schedule.rate(160)
    (358, 1.0, 0.8)
    """

    sizes: Sequence[int]
    batch: int
    steps: Sequence[int]
    epochs: int
    epoch_factor: float = EPOCH_FACTOR
    long_cycle: Sequence[Factors] | None = None
    short_cycle: Sequence[Factors] | None = None
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    warmup_rate: float = 0.0
    smallest: int = 1
    entries: tuple[LongEntry, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("sizes", "steps"):
            if not _are_several(given := getattr(self, name)):
                raise InputError(f"{name} must be several integers, one after the other, got {given!r:.80}")
        for size in self.sizes:
            check_count(sizes=size)
        check_count(batch=self.batch, smallest=self.smallest)
        check_positive(gamma=self.gamma)
        check_not_negative(warmup_epochs=self.warmup_epochs, warmup_rate=self.warmup_rate)
        long_cycle = _cycle("long_cycle", self.long_cycle, self.sizes, LONG_CYCLES)
        short_cycle = _cycle("short_cycle", self.short_cycle, self.sizes, SHORT_CYCLES)
        entries = long_entries(
            self.sizes,
            self.steps,
            self.epochs,
            long_cycle=long_cycle,
            short_cycle=short_cycle,
            epoch_factor=self.epoch_factor,
        )
        numbers: dict[str, Any] = {name: int(getattr(self, name)) for name in ("batch", "epochs", "smallest")}
        numbers |= {name: float(getattr(self, name)) for name in _RATES}
        numbers |= {"sizes": tuple(map(int, self.sizes)), "steps": tuple(map(int, self.steps))}
        plain = {name: _floats(each) for name, each in (("long_cycle", long_cycle), ("short_cycle", short_cycle))}
        for name, value in (numbers | plain | {"entries": tuple(entries)}).items():
            object.__setattr__(self, name, value)
        if self.length < 1:
            raise InputError(
                f"epoch_factor must leave an epoch at least, got {self.epoch_factor!r} of {self.epochs} epochs"
            )
        for entry in entries:
            for shape, _ in self._cycle_of(entry):
                if min(shape.sizes) < self.smallest:
                    raise InputError(f"no size must be below smallest {self.smallest}, got the shape {shape.sizes}")
        if not 0 <= self.warmup_epochs <= self.length:
            raise InputError(f"warmup_epochs must be at most the {self.length} epochs, got {self.warmup_epochs:g}")

    @property
    def length(self) -> int:
        """The epochs of the run."""
        return self.entries[-1].end

    def at(self, epoch: int) -> LongEntry:
        """The entry of the long cycle that an epoch belongs to; past the end, the last."""
        check_count(0, epoch=epoch)
        ends = [entry.end for entry in self.entries]
        return self.entries[min(bisect_right(ends, epoch), len(ends) - 1)]

    def cycle(self, epoch: int) -> list[tuple[GridShape, int]]:
        """The shapes of the epoch's updates in turn, each with its batch over all ranks."""
        return self._cycle_of(self.at(epoch))

    def _cycle_of(self, entry: LongEntry) -> list[tuple[GridShape, int]]:
        short_cycle = self.short_cycle or ()
        batches = cycle_batches(self.sizes, entry.sizes, short_cycle)
        sizes = [self._short(entry, factors) for factors in short_cycle] + [entry.sizes]
        return [
            (GridShape(each, place), self.batch * entry.factor * times)
            for place, (each, times) in enumerate(zip(sizes, batches, strict=True))
        ]

    def _short(self, entry: LongEntry, factors: Factors) -> tuple[int, ...]:
        scaled = base_sizes(self.sizes, factors)
        return tuple(e if f is None else s for e, s, f in zip(entry.sizes, scaled, factors, strict=True))

    def rate(self, epoch: float) -> float:
        """What the base rate is multiplied by at an epoch, a fraction where in its midst."""
        check_not_negative(epoch=epoch)
        if epoch >= self.warmup_epochs:
            return self._plain_rate(epoch)
        return self.warmup_rate + (self._plain_rate(self.warmup_epochs) - self.warmup_rate) * epoch / self.warmup_epochs

    def _plain_rate(self, epoch: float) -> float:
        rates = entry_rates(self.entries, self.gamma, halve=bool(self.long_cycle))
        return rates[bisect_right([first for first, _ in rates], epoch) - 1][1]

    def evaluates(self, epoch: int, times: int = EVALUATIONS) -> bool:
        """Whether to evaluate after the epoch: about `times` times a shape, and at the end of each and of the run."""
        check_count(times=times)
        entry = self.at(epoch)
        every = (entry.end - entry.first) // times + 1
        return epoch + 1 == self.length or (entry.end - 1 - epoch) % every == 0

    def batch_norm(self, epoch: int, devices: int = 1, base: int = 8) -> BatchNormRule:
        """How BatchNorm's statistics range over `base` examples in the epoch, by the base shape's batch on a device.

        Over all devices where even these have fewer together: alone, a device is left its plain BatchNorm.
        """
        check_count(devices=devices)
        rule = batch_norm_rule(self.batch * self.at(epoch).factor / devices, base)
        if rule.kind != "sync":
            return rule
        joined = min(rule.number, devices)
        return BatchNormRule("sync" if joined > 1 else "plain", joined)

    def settings(self) -> dict[str, Any]:
        """All that was given, fit for JSON: `Multigrid(**settings)` is the same."""
        return {name: value for name, value in asdict(self).items() if name != "entries"}


class Epochs(Protocol):
    """What the rate needs of a batch sampler: where an update of the run lies."""

    def locate(self, batches: int, /) -> tuple[int, int]:
        """The epoch and the place in it of the batch after `batches`."""

    def epoch_length(self, epoch: int, /) -> int | None:
        """Batches of the epoch."""

    def start_of(self, epoch: int, /) -> int:
        """Batches before the epoch."""


class MultigridLR(Counted):
    """The learning rate of multigrid training; the groups' own are those for the default batch. Counts updates.

    batches: the sampler of the run, which says at which epoch an update is: `data.multigrid_batches.MultigridBatches`.
    `step` is called once after each update, without a count.

    >>> from batchlab.data.multigrid.multigrid_batches import MultigridBatches
    >>> schedule = Multigrid((16, 16), batch=8, steps=[0, 4], epochs=6)
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    >>> lr, rates = MultigridLR(optimizer, schedule, MultigridBatches(256, schedule)), []
    >>> for update in range(lr.ends):
    ...     rates.append(round(lr.get_last_lr()[0], 6))
    ...     lr.step()
    >>> sorted(set(rates), reverse=True)
    [0.2, 0.1, 0.01]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, multigrid: Multigrid, batches: Epochs) -> None:
        self.multigrid, self.batches = multigrid, batches
        super().__init__(optimizer, batch=1)

    @property
    def ends(self) -> int:
        """The updates of the run."""
        return self.batches.start_of(self.multigrid.length)

    def rate(self, seen: int, base_lr: float) -> float:
        """Of the update after `seen` updates."""
        epoch, place = self.batches.locate(seen)
        return base_lr * self.multigrid.rate(epoch + place / (self.batches.epoch_length(epoch) or 1))


def _are_several(given: Any) -> bool:
    return not isinstance(given, str) and holds(lambda each: len(each) >= 0, given)


def _floats(cycle: Sequence[Factors]) -> tuple[tuple[float | None, ...], ...]:
    """Python's, which JSON has."""
    return tuple(tuple(f if f is None else float(f) for f in factors) for factors in cycle)


def _cycle(
    name: str,
    given: Sequence[Factors] | None,
    sizes: Sequence[int],
    published: dict[int, Any],
) -> tuple[tuple[float | None, ...], ...]:
    if given is None and len(sizes) not in published:
        raise InputError(f"{name} must be given for shapes of {len(sizes)} axes: it is known for {sorted(published)}")
    for factors in () if given is None else given:
        if not _are_several(factors):
            raise InputError(f"{name} must hold a factor for each axis of each of its shapes, got {factors!r:.80}")
    return tuple(
        tuple(f if f is None else float(f) for f in factors)
        for factors in (published[len(sizes)] if given is None else given)
    )
