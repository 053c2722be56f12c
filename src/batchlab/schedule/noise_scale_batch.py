"""The batch that follows the noise scale: B(s) = √(r·𝓑(s)) (McCandlish et al. 2018, appendix D), with hysteresis."""

from __future__ import annotations

import math
from typing import Any

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate


class NoiseScaleBatch:
    """Moves the batch size towards √(r·𝓑) when the measured noise scale 𝓑 has clearly left it.

    batch_size: where it starts, in examples. exchange_rate: r, examples worth paying to save one update;
    r = B₀²/𝓑₀ keeps the planned batch B₀ while 𝓑 is at its planned 𝓑₀.
    minimum, maximum: bounds on the batch, in examples.
    deadband: nothing changes while the wanted size is within this factor of the present one (default √2).
    growth: the most one change multiplies or divides the batch by (default 2).
    patience: updates between two changes, so that the noise average can follow (default 20).

    An undefined, non-finite or non-positive estimate changes nothing. State: `state_dict`, `load_state_dict`.

    >>> control = NoiseScaleBatch(64, exchange_rate=64.0, minimum=8, maximum=512, patience=1)
    >>> control.next_batch(Estimate(1024.0, 900.0, 1100.0, "example")), control.next_batch(None)
    (128, 128)
    """

    def __init__(
        self,
        batch_size: int,
        *,
        exchange_rate: float,
        minimum: int,
        maximum: int,
        deadband: float = math.sqrt(2.0),
        growth: float = 2.0,
        patience: int = 20,
    ) -> None:
        if not 1 <= minimum <= batch_size <= maximum:
            raise InputError(
                f"sizes must satisfy 1 <= minimum <= batch_size <= maximum, got {minimum}, {batch_size}, {maximum}"
            )
        check_positive(exchange_rate=exchange_rate)
        for name, value in (("deadband", deadband), ("growth", growth), ("patience", patience)):
            if not value >= 1:
                raise InputError(f"{name} must be at least 1, got {value!r}")
        self.batch_size = batch_size
        self.exchange_rate, self.minimum, self.maximum = exchange_rate, minimum, maximum
        self.deadband, self.growth, self.patience = deadband, growth, patience
        self._waited = 0

    def next_batch(self, noise_scale: Estimate | None) -> int:
        """The batch size of the next update, given the present estimate of 𝓑 in examples."""
        self._waited += 1
        if noise_scale is None or not 0 < noise_scale.value < math.inf or self._waited < self.patience:
            return self.batch_size
        wanted = min(max(math.sqrt(self.exchange_rate * noise_scale.value), self.minimum), self.maximum)
        ratio = wanted / self.batch_size
        if 1 / self.deadband < ratio < self.deadband:
            return self.batch_size
        bounded = self.batch_size * min(max(ratio, 1 / self.growth), self.growth)
        self.batch_size = min(max(round(bounded), self.minimum), self.maximum)
        self._waited = 0
        return self.batch_size

    def state_dict(self) -> dict[str, Any]:
        """The batch size and the updates since it last changed."""
        return {"batch_size": self.batch_size, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.batch_size, self._waited = state["batch_size"], state["waited"]
