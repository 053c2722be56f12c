"""What is said of each layer's Adam updates at a reading, and when that is an alarm."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.measure.course.adam_update import HIGH, UpdateSums

REMEMBERED = 50


@dataclass(frozen=True)
class AlarmLimits:
    """When a layer is called unstable; all defaults are batchlab's, set where simulated gradients leave the bell.

    "bimodal": Sarle's coefficient above `sarle`, or |u| > 0.8 in more than `high_share` of the coordinates and in more
    than twice as many as where gradients are independent (which counts for β1 up to 0.5), or var u above
    `variance_ratio` times its white value, at `consecutive` readings in a row. "frozen": √v̂ < ε in more than
    `frozen_share`. "disaligned": the cosine of u with g below `cosine` while RMS(u) is above `norm_ratio` times its
    running median. Layers of fewer than `fewest` coordinates raise none.
    """

    sarle: float = 0.8
    high_share: float = 0.3
    variance_ratio: float = 10.0
    consecutive: int = 2
    frozen_share: float = 0.5
    cosine: float = 0.01
    norm_ratio: float = 2.0
    fewest: int = 64

    def __post_init__(self) -> None:
        for name in ("sarle", "high_share", "variance_ratio", "frozen_share", "norm_ratio"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be > 0, got {getattr(self, name)!r}")
        check_count(consecutive=self.consecutive, fewest=self.fewest)
        if not -1 <= self.cosine <= 1:
            raise InputError(f"cosine must lie in [-1, 1], got {self.cosine!r}")


@dataclass(frozen=True)
class LayerStability(JsonNoun):
    """One layer's updates at one step; NaN for what is undefined.

    t: the optimizer's step. coordinates: watched ones with a gradient at that step: those of an absent token's row, or
    of a dead unit, decay to u = 0 and would narrow the rest. variance_ratio: var u over (1 - β1)/(1 + β1); 1 for
    gradients independent in time, (1 + β1)/(1 - β1) for a sign update. sarle: 1/3 Gaussian, 1 two points. high_share:
    of |u| > 0.8. lag1: correlation of successive gradients, a running mean over readings.
    eps_share: of √v̂ < ε. root_over_eps: geometric mean of √v̂/ε. rms, bound: RMS(u), and what no gradients can exceed.
    cosine: of u with the gradient; √(1 - β1²) = 0.44 for independent ones, less where coordinates differ in scale.
    dip, dip_p: Hartigan's statistic and p-value, None unless asked for. alarms: of "bimodal", "frozen", "disaligned".
    """

    name: str
    t: int
    coordinates: int
    variance_ratio: float
    sarle: float
    high_share: float
    lag1: float
    eps_share: float
    root_over_eps: float
    rms: float
    bound: float
    cosine: float
    dip: float | None = None
    dip_p: float | None = None
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True)
class StabilityReading(JsonNoun):
    """All layers after `step` updates that the monitor has seen."""

    step: int
    layers: tuple[LayerStability, ...]

    @property
    def alarms(self) -> tuple[tuple[str, str], ...]:
        """(layer, alarm) of this reading."""
        return tuple((layer.name, alarm) for layer in self.layers for alarm in layer.alarms)

    def layer(self, name: str) -> LayerStability:
        """One layer by its name."""
        for each in self.layers:
            if each.name == name:
                return each
        raise InputError(f"name must be one of {[each.name for each in self.layers]!r:.200}, got {name!r}")


@dataclass
class LayerRecord:
    """What a layer carries from reading to reading: the mean of lag-1 correlations, alarms in a row, past RMS(u)."""

    lag_sum: float = 0.0
    lag_weight: float = 0.0
    in_a_row: int = 0
    rms: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def take(
        self, layer: LayerStability, lag1: float, keep: float, limits: AlarmLimits, *, white: float, warm: bool
    ) -> LayerStability:
        """The layer with its running correlation and its alarms; none before it is warm. white: (1 - β1)/(1 + β1)."""
        if math.isfinite(lag1):
            self.lag_sum, self.lag_weight = keep * self.lag_sum + lag1, keep * self.lag_weight + 1
        running = self.lag_sum / self.lag_weight if self.lag_weight else math.nan
        alarms = self._alarms(layer, limits, white) if warm and layer.coordinates >= limits.fewest else ()
        if math.isfinite(layer.rms):
            self.rms.append(layer.rms)
        return replace(layer, lag1=running, alarms=alarms)

    def _alarms(self, layer: LayerStability, limits: AlarmLimits, white: float) -> tuple[str, ...]:
        in_the_bell = math.erfc(HIGH / math.sqrt(2 * white))
        crowded = layer.high_share > max(limits.high_share, 2 * in_the_bell)
        bimodal = layer.sarle > limits.sarle or crowded
        self.in_a_row = self.in_a_row + 1 if bimodal or layer.variance_ratio > limits.variance_ratio else 0
        usual = statistics.median(self.rms) if self.rms else math.inf
        raised = {
            "bimodal": self.in_a_row >= limits.consecutive,
            "frozen": layer.eps_share > limits.frozen_share,
            "disaligned": layer.cosine < limits.cosine and layer.rms > limits.norm_ratio * usual,
        }
        return tuple(name for name, holds in raised.items() if holds)

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers."""
        return {
            "lag_sum": self.lag_sum,
            "lag_weight": self.lag_weight,
            "in_a_row": self.in_a_row,
            "rms": list(self.rms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.lag_sum, self.lag_weight, self.in_a_row = state["lag_sum"], state["lag_weight"], state["in_a_row"]
        self.rms = deque(state["rms"], maxlen=REMEMBERED)


def describe(name: str, sums: UpdateSums, t: float, bound: float, white: float) -> LayerStability:
    """A layer's statistics from its sums. white: (1 - β1)/(1 + β1). lag1 is this reading's own."""
    n = sums.n or math.nan
    root = math.exp(min(700.0, sums.log_root / sums.positive)) if sums.positive else 0.0
    return LayerStability(
        name=name,
        t=int(t),
        coordinates=round(sums.n) if math.isfinite(sums.n) else 0,
        variance_ratio=sums.variance / white,
        sarle=sums.sarle,
        high_share=sums.high / n,
        lag1=sums.lag1,
        eps_share=sums.below / n,
        root_over_eps=root,
        rms=sums.rms,
        bound=bound,
        cosine=sums.cosine,
    )
