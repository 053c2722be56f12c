"""A batch size that was fixed beforehand, as a function of the examples or tokens seen, and the rate that goes with it.

Thresholds count what `StepFacts.seen` counts, sizes what `StepFacts.batch` counts: one may be tokens and the other
sequences. Counted in updates instead, a schedule would stretch with every change of the batch.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Literal, get_args

from batchlab.core.checks import as_count, check_positive
from batchlab.core.errors import InputError
from batchlab.rules.learning_rate import linear, sqrt
from batchlab.schedule.batches.controller import BatchController, StepFacts

LrRule = Literal["none", "sqrt", "linear"]


class ScheduledBatch(BatchController):
    """The size is `at(seen)`; nothing that is measured moves it. A subclass gives `at` and `changes`.

    It holds nothing that `seen` does not tell, so a run resumes at any point: `at(seen)` is the size of the next update
    after `seen`. A skipped update keeps the size, and the next one that counts makes up for it.
    lr_rule: what `lr_factor` gives. lr_batch: the size at which the learning rate was stated; there the factor is 1.
    """

    def __init__(
        self, start: int, *, sizes: list[int], multiple_of: int, lr_rule: LrRule = "none", lr_batch: int | None = None
    ) -> None:
        super().__init__(start, minimum=min(sizes), maximum=max(sizes), multiple_of=multiple_of, growth=math.inf)
        if lr_rule not in get_args(LrRule):
            raise InputError(f'lr_rule must be "none", "sqrt" or "linear", got {lr_rule!r}')
        self.lr_rule, self.lr_batch = lr_rule, as_count(lr_batch=start if lr_batch is None else lr_batch)

    @abstractmethod
    def at(self, seen: int) -> int:
        """The size of the next update after `seen`."""

    @abstractmethod
    def changes(self) -> list[tuple[int, int]]:
        """Every (seen, size) at which the size becomes another, in order, the start at 0 among them."""

    def wanted(self, step: int, facts: StepFacts) -> float | None:
        """`at(facts.seen)`."""
        return self.at(facts.seen)

    def lr_factor(self, batch: int | None = None) -> float:
        """What the learning rate is multiplied by at `batch` (the present size if None), by `lr_rule`.

        "none": 1. "sqrt": √(B/B₀), which holds Adam's noise temperature η/√B. "linear": B/B₀, which holds SGD's, η/B.
        """
        size = self.batch_size if batch is None else batch
        check_positive(batch=size)
        if self.lr_rule == "none":
            return 1.0
        return (sqrt if self.lr_rule == "sqrt" else linear)(1.0, self.lr_batch, size)

    def updates(self, total: int, *, per_batch: int = 1) -> int:
        """Updates until at least `total` was seen, from the start.

        per_batch: what one unit of the batch adds to `seen`: the tokens of a sequence, where thresholds count tokens.
        """
        total, per_batch = as_count(0, total=total), as_count(per_batch=per_batch)
        seen = steps = 0
        for end in [*(point for point in self._breaks() if point < total), total]:
            added = self._added(seen, per_batch)
            turns = max(-(-(end - seen) // added), 0)
            steps, seen = steps + turns, seen + turns * added
        return steps

    def _breaks(self) -> list[int]:
        """Where what an update adds to `seen` may change."""
        return [point for point, _ in self.changes()]

    def _added(self, seen: int, per_batch: int) -> int:
        return self.at(seen) * per_batch


def as_points(name: str, given: Iterable[int]) -> list[int]:
    """The points, each of which must be an integer of at least 1, and larger than the one before."""
    if not isinstance(given, Iterable):
        raise InputError(f"{name} must be several integers, one after the other, got {given!r:.80}")
    points = [as_count(**{name: point}) for point in given]
    if any(b <= a for a, b in itertools.pairwise(points)):
        raise InputError(f"{name} must rise from one to the next, got {points!r:.80}")
    return points
