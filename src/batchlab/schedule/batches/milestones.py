"""The batch size at given examples or tokens: any sizes, larger or smaller, as `MultiStepLR` has it for the rate.

To multiply the batch where a learning rate would be divided keeps SGD's noise η/B alike (Smith, Kindermans, Ying and Le
2018, arXiv 1711.00489).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping

from batchlab.core.checks import as_count, check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.schedule.batches.scheduled_batch import LrRule, ScheduledBatch, as_points


class Milestones(ScheduledBatch):
    """`start` until the first milestone, then the size of the last milestone that was reached.

    sizes: {seen: size}, in rising order of `seen`, each size a multiple of `multiple_of` (micro-batch x ranks).
    lr_rule, lr_batch (default the start): see `ScheduledBatch`.

    >>> batch = Milestones(256, {10_000: 1024, 50_000: 512})
    >>> [batch.at(seen) for seen in (0, 9_999, 10_000, 50_000)]
    [256, 256, 1024, 512]
    >>> Milestones.by_factors(128, {60: 5, 120: 5}).changes()
    [(0, 128), (60, 640), (120, 3200)]
    """

    def __init__(
        self,
        start: int,
        sizes: Mapping[int, int],
        *,
        multiple_of: int = 1,
        lr_rule: LrRule = "none",
        lr_batch: int | None = None,
    ) -> None:
        if not isinstance(sizes, Mapping):
            raise InputError(f"sizes must be of the form {{seen: size}}, got {sizes!r:.80}")
        self.points, multiple_of = as_points("sizes' points", sizes), as_count(multiple_of=multiple_of)
        self.sizes = [as_count(sizes=size) for size in (start, *sizes.values())]
        for size in self.sizes:
            if size % multiple_of:
                raise InputError(f"sizes must be multiples of multiple_of {multiple_of}, got {size}")
        super().__init__(self.sizes[0], sizes=self.sizes, multiple_of=multiple_of, lr_rule=lr_rule, lr_batch=lr_batch)

    @classmethod
    def by_factors(
        cls,
        start: int,
        factors: Mapping[int, float],
        *,
        multiple_of: int = 1,
        lr_rule: LrRule = "none",
        lr_batch: int | None = None,
    ) -> Milestones:
        """{seen: factor}: each multiplies the size before it, and the product must be a whole number."""
        check_count(start=start)
        if not isinstance(factors, Mapping):
            raise InputError(f"factors must be {{seen: factor}}, got {factors!r}")
        size, sizes = float(start), {}
        for point, factor in factors.items():
            check_positive(factors=factor)
            size *= factor
            if abs(size - round(size)) > 1e-9 * size:
                raise InputError(f"factors must give whole sizes, got {size:g} at {point}")
            sizes[point] = round(size)
        return cls(start, sizes, multiple_of=multiple_of, lr_rule=lr_rule, lr_batch=lr_batch)

    def at(self, seen: int) -> int:
        """The size of the next update after `seen`."""
        check_count(0, seen=seen)
        return self.sizes[bisect_right(self.points, seen)]

    def changes(self) -> list[tuple[int, int]]:
        """Every (seen, size), the start at 0 among them."""
        return list(zip([0, *self.points], self.sizes, strict=True))
