"""Warm-up, stable, decay: the schedule whose end may be decided late (Hu et al. 2024, arXiv 2404.06395).

A cool-down is 10 to 20 % of a run in most reports (10 % in arXiv 2408.13359). The best stable rate still falls as the
run gets longer: of that see `power`.
"""

from __future__ import annotations

import torch

from batchlab.core.checks import check_not_negative
from batchlab.schedule.rates.cooled import Cooled, Shape, check_shape, check_span, cool_down


def wsd_share(
    seen: float,
    *,
    warmup: float = 0,
    total: float | None = None,
    decay: float | None = None,
    shape: Shape = "1-sqrt",
    floor: float = 0.0,
) -> float:
    """The share of the peak after `seen` units: s/W in the warm-up, 1, then the cool-down over the last `decay`.

    seen, warmup, total, decay: in one unit. floor: the share at the end, held from `total` on.

    >>> [wsd_share(s, warmup=100, total=1000, decay=400, shape="linear") for s in (0, 50, 100, 600, 800, 1000)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    check_not_negative(seen=seen)
    check_span(warmup, total, decay)
    check_shape(shape, floor)
    if seen < warmup:
        return seen / warmup
    if total is None or decay is None or seen < total - decay:
        return 1.0
    return cool_down((seen - (total - decay)) / decay, shape, floor)


class WSD(Cooled):
    """The rate rises linearly over `warmup`, stays, and falls over `decay` units; all counted in one unit.

    optimizer: the rates of its groups are the peaks. batch: units of an update over all ranks. warmup: units; 0 by
    default. total, decay: where the cool-down ends and its length; leave both out and call `start_decay(over=...)`
    when the run should end. shape: of the cool-down, see `cooled`; "1-sqrt" by default, after Hägele et al. 2024.
    floor: the share of the peak it ends at.

    With another batch the peak moves (`rules.learning_rate`), warm-up and cool-down stay as many units. Not for a run
    whose length is known and will not change: a cosine or linear decay over all of it is as good there.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    >>> schedule = WSD(optimizer, batch=100, warmup=200, shape="linear")
    >>> rates = []
    >>> for update in range(6):
    ...     rates += schedule.get_last_lr()
    ...     schedule.step()
    ...     if update == 3:
    ...         schedule.start_decay(over=200)
    >>> rates
    [0.0, 0.2, 0.4, 0.4, 0.4, 0.2]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        batch: int,
        warmup: int = 0,
        total: int | None = None,
        decay: int | None = None,
        shape: Shape = "1-sqrt",
        floor: float = 0.0,
    ) -> None:
        super().__init__(optimizer, batch=batch, warmup=warmup, total=total, decay=decay, shape=shape, floor=floor)

    def rate(self, seen: int, base_lr: float) -> float:
        """The group's peak times `wsd_share`."""
        share = wsd_share(
            seen, warmup=self.warmup, total=self.total, decay=self.decay, shape=self.shape, floor=self.floor
        )
        return base_lr * share
