"""What a block of code used, as plain numbers: joules, watts, CO2e, and joules for each unit of what was done."""

from __future__ import annotations

import math
from dataclasses import dataclass

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun

JOULES_PER_KWH = 3.6e6
FEW_SAMPLES = 20


@dataclass(frozen=True)
class ComponentEnergy(JsonNoun):
    """One component's share: joules in all, and idle_watts before the block, None if that was not measured.

    source: "counter", "sampled" (a power sensor, integrated) or "estimated" (a model of the hardware).
    """

    component: str
    joules: float
    source: str
    idle_watts: float | None = None


@dataclass(frozen=True)
class EnergyRate(JsonNoun):
    """Joules for one step, one example, one unit of progress; None for what was not given."""

    joules_per_step: float | None
    joules_per_example: float | None
    joules_per_progress: float | None


@dataclass(frozen=True)
class EnergyUse(JsonNoun):
    """What a block used. seconds: wall time. samples: readings of the meter, the first and the last among them.

    components: of the machine, none part of another. g_per_kwh: grams of CO2e for a kWh of the grid, as the user gave
    it; None leaves carbon unknown. pue: the power of the whole building for one watt of the machine. note: what the
    meter guessed or could not read.

    >>> use = EnergyUse(60.0, (ComponentEnergy("gpu", 3600.0, "counter", 20.0),), samples=121, g_per_kwh=400.0)
    >>> use.kwh, use.mean_watts, use.net_joules, round(use.kg_co2e, 6)
    (0.001, 60.0, 2400.0, 0.0004)
    """

    seconds: float
    components: tuple[ComponentEnergy, ...]
    samples: int
    g_per_kwh: float | None = None
    pue: float = 1.0
    note: str = ""

    @property
    def joules(self) -> float:
        """All components' joules, idle power included; NaN where one could not be metered."""
        return sum(each.joules for each in self.components)

    @property
    def net_joules(self) -> float | None:
        """Joules beyond what the idle machine would have used in that time; None if idle power was not measured.

        Not clamped: of a block that does nothing it scatters around 0.
        """
        idle = [each.idle_watts for each in self.components]
        known = [watts for watts in idle if watts is not None]
        return self.joules - sum(known) * self.seconds if len(known) == len(idle) else None

    @property
    def kwh(self) -> float:
        """`joules` in kilowatt-hours."""
        return self.joules / JOULES_PER_KWH

    @property
    def mean_watts(self) -> float:
        """joules/seconds. A lower power is not a lower energy: what takes longer may use more."""
        return self.joules / self.seconds if self.seconds > 0 else math.nan

    @property
    def kg_co2e(self) -> float | None:
        """kWh · g_per_kwh/1000 · pue; None without g_per_kwh. It tells nothing that the joules do not."""
        return None if self.g_per_kwh is None else self.kwh * self.g_per_kwh / 1000 * self.pue

    @property
    def source(self) -> str:
        """The one source of all components, or "mixed"."""
        sources = {each.source for each in self.components}
        return sources.pop() if len(sources) == 1 else "mixed"

    @property
    def few_samples(self) -> bool:
        """Whether there were under 20 readings: power between them was not seen, and counters lag by up to 0.1 s."""
        return self.samples < FEW_SAMPLES

    def component(self, name: str) -> ComponentEnergy:
        """The share of "gpu", "cpu", "ram" or another component."""
        for each in self.components:
            if each.component == name:
                return each
        raise InputError(f"component must be one of {[each.component for each in self.components]}, got {name!r}")

    def per(
        self,
        *,
        steps: float | None = None,
        examples: float | None = None,
        progress: float | None = None,
        net: bool = False,
    ) -> EnergyRate:
        """Joules for each of the steps and examples done in the block, and for each unit of progress made in it.

        progress: in the user's own unit, such as points of accuracy gained or nats of loss lost; where there was none
        the rate is NaN. net: without the idle machine's share.
        """
        joules = self.net_joules if net else self.joules
        if joules is None:
            raise InputError("net energy needs the idle power: measure with Energy(idle_seconds=...)")
        given = {"steps": steps, "examples": examples}
        check_positive(**{name: count for name, count in given.items() if count is not None})
        made = progress if progress is None or 0 < progress < math.inf else math.nan
        return EnergyRate(*(None if count is None else joules / count for count in (steps, examples, made)))


def check_carbon(g_per_kwh: float | None, pue: float) -> None:
    """Refuses an intensity that is none and a building that gives power away."""
    if g_per_kwh is not None and not 0 <= g_per_kwh < math.inf:
        raise InputError(f"g_per_kwh must be finite and >= 0, or None, got {g_per_kwh!r}")
    if not 1 <= pue < math.inf:
        raise InputError(f"pue must be finite and >= 1, got {pue!r}")
