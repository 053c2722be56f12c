"""Which of several configurations uses the least energy, and whether the runs can tell: interleaved repeats and tests.

The run is the unit: readings within one run are not independent. What is ranked are joules, not watts.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.core.random import derive_seed
from batchlab.measure.energy.energy import Energy
from batchlab.measure.energy.energy_meters import MachineMeter, Meter
from batchlab.measure.energy.energy_use import EnergyUse
from batchlab.measure.energy.welch import detectable_difference, hedges_g, holm, ratio_of_means, welch_anova, welch_t

Per = Literal["run", "step", "example", "progress"]
PERS = ("run", "step", "example", "progress")


@dataclass(frozen=True)
class TrainResult(JsonNoun):
    """What one run did: steps, examples and progress (in the user's unit) where known; whether it met its target."""

    steps: float | None = None
    examples: float | None = None
    progress: float | None = None
    reached: bool = True


@dataclass(frozen=True)
class EnergyRun(JsonNoun):
    """One run of a study. repeat: the round; place: its position within that round. joules: for one unit of `per`."""

    name: str
    repeat: int
    place: int
    seed: int
    joules: float
    use: EnergyUse
    result: TrainResult


@dataclass(frozen=True)
class EnergySummary(JsonNoun):
    """One configuration. joules: mean for one unit of `per`, with Student's interval, unknown where a run missed its
    target. watts: mean power with its interval. runs: how many; missed: how many of them missed their target.
    """

    name: str
    joules: Estimate
    watts: Estimate
    runs: int
    missed: int


@dataclass(frozen=True)
class EnergyPair(JsonNoun):
    """Two configurations. ratio: joules of `first` over those of `second`, its interval for this pair alone.

    p, adjusted_p: two-sided, Welch's t; adjusted for all pairs (Holm). hedges_g: the difference in units of spread.
    """

    first: str
    second: str
    ratio: Estimate
    p: float
    adjusted_p: float
    hedges_g: float


@dataclass(frozen=True)
class EnergyStudy(JsonNoun):
    """What all runs say together.

    per: what the joules are for. ranking: configurations by mean joules, the least first; those without a mean last.
    anova_p: whether any mean differs (Welch's analysis of variance). detectable: the smallest difference, as a share
    of the mean, that these repeats find with probability 0.8 at 0.05 after Bonferroni's correction for all pairs.
    watts_disagree: whether the least mean power and the least joules are of different configurations. p-values and
    `detectable` are NaN for fewer than 2 repeats. note: what the reader must know; "" for nothing.
    """

    per: str
    ranking: tuple[str, ...]
    summaries: tuple[EnergySummary, ...]
    pairs: tuple[EnergyPair, ...]
    anova_p: float
    detectable: float
    watts_disagree: bool
    runs: tuple[EnergyRun, ...]
    note: str = ""

    def pair(self, first: str, second: str) -> EnergyPair:
        """The comparison of two configurations, in the order in which they were given to the study."""
        for each in self.pairs:
            if (each.first, each.second) == (first, second):
                return each
        raise InputError(f"no pair {first!r}, {second!r}: pairs follow the order of the configurations")


def compare_energy(
    configs: Mapping[str, Any],
    train_fn: Callable[[Any, int], TrainResult | None],
    *,
    repeats: int = 5,
    per: Per = "run",
    idle_seconds: float = 0.0,
    cool_down_seconds: float = 0.0,
    coverage: float = 0.95,
    seed: int = 0,
    g_per_kwh: float | None = None,
    pue: float = 1.0,
    meter: Meter | None = None,
    interval: float | None = 0.5,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> EnergyStudy:
    """Trains every configuration `repeats` times and compares their joules.

    configs: by name. train_fn(config, seed): trains once; returns what it did, or None. For the energy to a result
    let it stop at a target and say in `reached` whether it met it; a configuration with a run that missed has no mean.
    per: what the joules are divided by: "run" (the default), "step", "example" or "progress" of the result. repeats:
    the default 5 finds a difference of 10 % where runs scatter by 3 %; fewer than 2 give no p-values. idle_seconds:
    each run's idle measurement; where it is given, joules are net of idle power. cool_down_seconds: before each run.

    Each round trains all configurations in a random order of its own, so that warming up and the day's other work do
    not fall on one of them. Each run has its own seed.

    Not for one run each, and not for the small print of an estimate: from a model of the hardware, configurations
    that take the same time get the same joules.
    """
    _check(configs, repeats, per, cool_down_seconds)
    used = MachineMeter() if meter is None else meter
    runs, shuffle = [], random.Random(derive_seed(seed, "order"))
    for repeat in range(repeats):
        names = list(configs)
        shuffle.shuffle(names)
        for place, name in enumerate(names):
            if cool_down_seconds:
                sleep(cool_down_seconds)
            own = derive_seed(seed, "run", repeat, name) % 2**32
            energy = Energy(
                used,
                idle_seconds=idle_seconds,
                interval=interval,
                g_per_kwh=g_per_kwh,
                pue=pue,
                clock=clock,
                sleep=sleep,
            )
            with energy:
                result = train_fn(configs[name], own) or TrainResult()
            if not isinstance(result, TrainResult):
                raise InputError(f"train_fn must return a TrainResult or None, got {type(result).__name__}")
            joules = _joules(energy.use, result, per, net=idle_seconds > 0)
            runs.append(EnergyRun(name, repeat, place, own, joules, energy.use, result))
    return summarise_energy(runs, list(configs), per=per, coverage=coverage)


def summarise_energy(
    runs: Sequence[EnergyRun], names: Sequence[str], *, per: Per = "run", coverage: float = 0.95
) -> EnergyStudy:
    """What runs measured elsewhere say, by the same tests; names: all configurations, in the order of the pairs."""
    of = {name: [run for run in runs if run.name == name] for name in names}
    if empty := [name for name in names if not of[name]]:
        raise InputError(f"names must be those of runs, got {empty[0]!r} without any")
    summaries = [_summary(name, of[name], coverage) for name in names]
    known = [each.name for each in summaries if each.joules.defined]
    tested = [name for name in known if len(of[name]) > 1]
    values = {name: [run.joules for run in of[name]] for name in tested}
    pairs = list(combinations(tested, 2))
    raw = [welch_t(values[a], values[b]).p for a, b in pairs]
    compared = tuple(
        EnergyPair(
            a, b, ratio_of_means(values[a], values[b], coverage=coverage), p, adjusted, hedges_g(values[a], values[b])
        )
        for (a, b), p, adjusted in zip(pairs, raw, holm(raw), strict=True)
    )
    groups = list(values.values())
    anova = welch_anova(groups).p if len(groups) > 1 else math.nan
    detectable = detectable_difference(groups, comparisons=len(pairs)) if len(groups) > 1 else math.nan
    by = {each.name: each for each in summaries}
    ranking = tuple(sorted(known, key=lambda name: by[name].joules.value)) + tuple(n for n in names if n not in known)
    least_power = min(known, key=lambda name: by[name].watts.value, default="")
    disagree = bool(known) and by[least_power].watts.value < by[ranking[0]].watts.value
    note = _note(summaries, runs, least_power if disagree else "", ranking[0])
    return EnergyStudy(per, ranking, tuple(summaries), compared, anova, detectable, disagree, tuple(runs), note)


def _check(configs: Mapping[str, Any], repeats: int, per: str, cool_down_seconds: float) -> None:
    if len(configs) < 2:
        raise InputError(f"configs must hold at least 2 configurations by name, got {len(configs)}")
    check_count(repeats=repeats)
    if per not in PERS:
        raise InputError(f"per must be one of {list(PERS)}, got {per!r}")
    if not 0 <= cool_down_seconds < math.inf:
        raise InputError(f"cool_down_seconds must be finite and >= 0, got {cool_down_seconds!r}")


def _joules(use: EnergyUse, result: TrainResult, per: Per, *, net: bool) -> float:
    """For one unit of `per`; NaN where the run missed its target."""
    joules = use.net_joules if net else use.joules
    assert joules is not None
    if not result.reached:
        return math.nan
    if per == "run":
        return joules
    given = {"step": "steps", "example": "examples", "progress": "progress"}[per]
    if getattr(result, given) is None:
        raise InputError(f'per="{per}" needs the {given} of each run in its TrainResult')
    rate = use.per(**{given: getattr(result, given)}, net=net)
    return getattr(rate, f"joules_per_{per}")  # type: ignore[no-any-return]


def _summary(name: str, runs: Sequence[EnergyRun], coverage: float) -> EnergySummary:
    missed = sum(not run.result.reached for run in runs)
    watts = _mean([run.use.mean_watts for run in runs], coverage, "mean power")
    joules = _mean([run.joules for run in runs], coverage, "mean")
    if missed:
        reason = f"undefined: {missed} of {len(runs)} runs missed the target"
        joules = Estimate(math.nan, 0.0, math.inf, reason, coverage)
    return EnergySummary(name, joules, watts, len(runs), missed)


def _mean(values: Sequence[float], coverage: float, what: str) -> Estimate:
    """The mean with Student's interval; one run bounds nothing."""
    from scipy.special import stdtrit

    n, mean = len(values), math.fsum(values) / len(values)
    method = f"{what} of {n} run{'s' if n > 1 else ''}"
    if not math.isfinite(mean):
        return Estimate(math.nan, -math.inf, math.inf, f"undefined: {method}, not all known", coverage)
    if n < 2:
        return Estimate(mean, -math.inf, math.inf, method, coverage)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    reach = float(stdtrit(n - 1, 0.5 + coverage / 2)) * error
    return Estimate(mean, mean - reach, mean + reach, method, coverage)


def _note(summaries: Sequence[EnergySummary], runs: Sequence[EnergyRun], least_power: str, least_joules: str) -> str:
    notes = [f"{each.name}: {each.missed} of {each.runs} runs missed the target" for each in summaries if each.missed]
    if any(each.runs < 2 for each in summaries):
        notes.append("fewer than 2 repeats: no p-values")
    if least_power:
        notes.append(f"{least_power} draws the least power but {least_joules} uses the least energy")
    sources = sorted({part.source for run in runs for part in run.use.components})
    if "estimated" in sources:
        whole = sources == ["estimated"]
        notes.append(f"{'all' if whole else 'part of the'} joules are estimated from the hardware, not measured")
    if few := sum(run.use.few_samples for run in runs):
        notes.append(f"{few} of {len(runs)} runs were read fewer than 20 times: too short for the interval")
    return "; ".join(notes + sorted({run.use.note for run in runs if run.use.note}))
