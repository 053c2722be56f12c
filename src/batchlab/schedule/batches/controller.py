"""What every rule that moves the batch along a run has in common: facts in, a batch size out, and what holds it still.

A rule says what it wants; `BatchController.next_batch` decides, and is the same for all rules. Sizes are global, over
all ranks and micro-batches of one update.
"""

from __future__ import annotations

import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch.distributed as dist

from batchlab.core.checks import as_count, check_count, check_truth, holds, is_count
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.measure.noise.batch_tests import Moments, Placement, place_batch
from batchlab.measure.noise.coordinate_test import CoordinateMoments
from batchlab.parallel.agree import agree_min

_SILENT = 100  # updates; a test that is due now and then, or a noise scale measured seldom, comes sooner
ANY_SIZE = sys.float_info.max  # the wish of a rule to which no size is too large: infinity is not reacted to
_NEARLY = 1e-9  # a float that is a whole number but for rounding counts as that number


@dataclass(frozen=True)
class StepFacts:
    """What is known after an update. Whatever was not measured is None.

    seen: examples (or tokens) so far, this update included. batch: of this update, in the controller's unit.
    loss: mean over the batch, before the update. noise_scale: the running estimate, in the unit of `batch`.
    batch_test: of this update's gradients (`batch_moments`, `coordinate_moments`). seconds: of this update.
    skipped: nothing was changed, for the loss or a gradient was not finite.

    Every rank must make the same decision, so it must have the same facts: see `agreed`.
    """

    seen: int
    batch: int
    loss: float | None = None
    noise_scale: Estimate | None = None
    batch_test: Moments | CoordinateMoments | None = None
    seconds: float | None = None
    skipped: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", as_count(0, seen=self.seen))
        object.__setattr__(self, "batch", as_count(batch=self.batch))
        check_truth(skipped=self.skipped)
        object.__setattr__(self, "skipped", bool(self.skipped))
        for name in ("loss", "seconds"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _number(name, value))
        if self.noise_scale is not None and not isinstance(self.noise_scale, Estimate):
            raise InputError(f"noise_scale must be an Estimate or None, got {self.noise_scale!r}")
        if self.batch_test is not None and not isinstance(self.batch_test, (Moments, CoordinateMoments)):
            raise InputError(f"batch_test must be Moments, CoordinateMoments or None, got {self.batch_test!r:.80}")

    @property
    def counts(self) -> bool:
        """Whether the update changed anything: not skipped, and its loss not known to be NaN or infinite."""
        return not self.skipped and (self.loss is None or math.isfinite(self.loss))

    def agreed(self, process_group: dist.ProcessGroup | None = None) -> StepFacts:
        """With the slowest rank's `seconds`, and `skipped` where any rank skipped or its loss is not finite.

        Every rank must call. Outside a process group it changes nothing. The other facts must be equal already: what
        was summed over ranks is.
        """
        told = self.seconds if self.seconds is not None and math.isfinite(self.seconds) else -1.0
        slowest, skipped = (-least for least in agree_min([-told, -float(not self.counts)], process_group))
        if process_group is None and not dist.is_initialized():
            return self
        return replace(self, seconds=slowest if slowest >= 0 else None, skipped=bool(skipped))


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value.item() if hasattr(value, "item") else value)  # of an array or a tensor, without a warning
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be a number or None, got {value!r:.80}") from None


class BatchController(ABC):
    """The batch size of the next update, from what was measured so far. A subclass gives `wanted`, and only that.

        facts = StepFacts(seen, batch, loss=loss, noise_scale=noise.step())
        batch = controller.next_batch(step, facts)

    batch_size: where it starts. minimum, maximum: bounds. multiple_of: sizes are rounded down to a multiple of it,
        never below the minimum; the start and the maximum must be multiples (micro-batch x ranks, where those are
        fixed). growth: the most one change multiplies or divides by, at least 1; one `multiple_of` is always allowed.
    deadband: nothing changes while the wanted size is within this factor of the present one.
    patience: updates from one change (or the start) to the next, for what is measured needs time to follow.

    It never reacts to a skipped update, to a loss that is not finite, or to a wish that is None, NaN, infinite or <= 0;
    a skipped update does not count for patience either. `needs` names the facts that a rule reads, beyond `seen` and
    `batch`, so that a loop need not measure others. Given equal facts, all ranks decide alike: see `StepFacts.agreed`.

    Warns once where a fact in `needs` has not come for longer than `patience` and 100 updates, though a change was due:
    a loop that measures nothing would hold the batch still in silence.

    capped: whether the maximum is what kept the size from being larger, at the last wish.

    A rule that remembers something overrides `note`, `rule_state` and `load_rule_state`.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        batch_size: int,
        *,
        maximum: int,
        minimum: int = 1,
        multiple_of: int = 1,
        growth: float = 2.0,
        deadband: float = 1.0,
        patience: int = 1,
    ) -> None:
        check_count(batch_size=batch_size, minimum=minimum, maximum=maximum, multiple_of=multiple_of, patience=patience)
        if not minimum <= batch_size <= maximum:
            raise InputError(
                f"sizes must satisfy 1 <= minimum <= batch_size <= maximum, got {minimum}, {batch_size}, {maximum}"
            )
        for name, value in (("batch_size", batch_size), ("maximum", maximum)):
            if value % multiple_of:
                raise InputError(f"{name} must be a multiple of multiple_of {multiple_of}, got {value}")
        for name, factor in (("growth", growth), ("deadband", deadband)):
            if not holds(lambda each: each >= 1, factor):
                raise InputError(f"{name} must be at least 1, got {factor!r}")
        self.batch_size = int(batch_size)
        self.minimum, self.maximum, self.multiple_of = int(minimum), int(maximum), int(multiple_of)
        self.growth, self.deadband, self.patience = float(growth), float(deadband), int(patience)
        self._waited, self._missed, self.capped = 0, 0, False

    @abstractmethod
    def wanted(self, step: int, facts: StepFacts) -> float | None:
        """The rule: the size it would have now, without bounds or rounding; None if it has no opinion."""

    def note(self, step: int, facts: StepFacts) -> None:  # noqa: B027
        """What a rule remembers of an update that was not skipped; called before `wanted`."""

    def rule_state(self) -> dict[str, Any]:
        """What `note` left, as plain numbers."""
        return {}

    def load_rule_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Takes over what `rule_state` gave."""

    @final
    def next_batch(self, step: int, facts: StepFacts) -> int:
        """The size of the next update. step: updates so far, the one that the facts are of included."""
        if not facts.counts:
            return self.batch_size
        due = self.due
        self._waited += 1
        self._watch_for_facts(facts, due)
        self.note(step, facts)
        if self._waited < self.patience:
            return self.batch_size
        wish = self.wanted(step, facts)
        if wish is None or not 0 < wish < math.inf:
            return self.batch_size
        wanted = float(wish)
        size = self._decided(min(max(wanted, self.minimum), self.maximum))
        self.capped = wanted > self.maximum and size < self._decided(wanted)
        if size != self.batch_size:
            self.batch_size, self._waited = size, 0
        return self.batch_size

    def _watch_for_facts(self, facts: StepFacts, due: bool) -> None:
        missing = sorted(name for name in self.needs if getattr(facts, name) is None)
        wanted = due or self._waited < self.patience
        self._missed = self._missed + 1 if missing and wanted else 0
        if self._missed == max(self.patience, _SILENT) + 1:
            warnings.warn(
                f"{type(self).__name__} reads {', '.join(missing)}, which has not come for {self._missed} updates: "
                f"the batch stays at {self.batch_size}",
                stacklevel=3,
            )

    def _decided(self, wanted: float) -> int:
        """Deadband, growth, rounding; `wanted` is in the bounds."""
        ratio, unit = wanted / self.batch_size, self.multiple_of
        if 1 / self.deadband < ratio < self.deadband:
            return self.batch_size
        if ratio >= 1:
            size = math.floor(min(wanted, max(self.batch_size * self.growth, self.batch_size + unit)) / unit + _NEARLY)
            return max(size * unit, self.batch_size)
        least = math.ceil(min(self.batch_size / self.growth, self.batch_size - unit) / unit - _NEARLY)
        return max(max(math.floor(wanted / unit + _NEARLY), least) * unit, self._lowest)

    @property
    def _lowest(self) -> int:
        """The least allowed size: the minimum, rounded up to a multiple."""
        return -(-self.minimum // self.multiple_of) * self.multiple_of

    @property
    def due(self) -> bool:
        """Whether the next `next_batch` may change the size: what is costly to measure can wait until then."""
        return self._waited + 1 >= self.patience

    def place(self, *, workers: int = 1, max_micro_batch: int | None = None, accumulation: int = 1) -> Placement:
        """The present size as micro_batch x workers x accumulation, rounded up; `batch_size` becomes that product.

        max_micro_batch: the most examples a worker holds at once. accumulation: the least. The most that `maximum`
        holds where rounding up would pass it (Lau, Liu and Kolar 2024; `place_batch`). Call it after `next_batch` in a
        loop of equal micro-batches; one that takes a ragged last micro-batch has no need of it.
        """
        placed = place_batch(
            self.batch_size,
            self.maximum,
            workers=workers,
            max_micro_batch=max_micro_batch,
            accumulation=accumulation,
        )
        if placed.batch % self.multiple_of:
            raise InputError(
                f"multiple_of must divide micro_batch x workers x accumulation = {placed.batch}, got {self.multiple_of}"
            )
        self.batch_size = placed.batch
        return placed

    @final
    def state_dict(self) -> dict[str, Any]:
        """The size, the updates since it last changed, and what the rule remembers: plain numbers, of any ranks."""
        state = {"controller": type(self).__name__, "batch_size": self.batch_size, "waited": self._waited}
        return state | {"capped": self.capped} | self.rule_state()

    @final
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave. `InputError` where that was of another controller, or is incomplete.

        Bounds and limits are this controller's own. A size outside its bounds, or no multiple (other ranks, a smaller
        cap), becomes the nearest one below that is allowed, or the least, with a warning.
        """
        if not isinstance(state, Mapping):
            raise InputError(f"the state must be what state_dict gave, got {state!r:.80}")
        name = state.get("controller", type(self).__name__)  # batchlab once wrote no name
        if name != type(self).__name__:
            raise InputError(f"the state is of a {name}, this is a {type(self).__name__}")
        if not is_count(state.get("batch_size")) or not is_count(state.get("waited"), 0):
            raise InputError(f"the state must hold batch_size and waited, whole numbers, got {state!r:.80}")
        self.load_rule_state(state)
        self.batch_size, self._waited = self._allowed(int(state["batch_size"])), int(state["waited"])
        self.capped = bool(state.get("capped", False)) and self.batch_size + self.multiple_of > self.maximum

    def _allowed(self, size: int) -> int:
        allowed = max(min(size, self.maximum) // self.multiple_of * self.multiple_of, self._lowest)
        if allowed != size:
            warnings.warn(
                f"the state's batch_size {size} is not in {self.minimum}..{self.maximum} in multiples of "
                f"{self.multiple_of}: going on with {allowed}",
                stacklevel=3,
            )
        return allowed
