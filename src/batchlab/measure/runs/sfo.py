"""Gradient evaluations to a target against batch size, and their least (Sato and Iiduka 2023, arXiv 2201.11989).

For an adaptive optimizer with constant learning rate, N steps at batch b bring a convergence measure to ε² where
A/N + B/b + C = ε². With u = (ε² - C)/A and v = B/A,

  1/N = u - v/b,    N(b) = b/(ub - v),    S(b) = N·b = b²/(ub - v)    for b > v/u.

S, the stochastic first-order oracle (SFO) complexity, is convex, least at b* = 2v/u, where S = 4v/u² and N = 2/u:
twice the steps of an infinite batch. A straight line in 1/b is all that is to be fitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from batchlab.core.checks import check_inside, check_positive
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.core.random import derive_seed
from batchlab.curves.run_sets import Array, RunSets, by_size

FEWEST_SIZES = 3
_DRAWS = 1000
_ROUNDS = 4
_ROUNDING = 1e-9

Status = Literal["found", "no critical batch in range", "variance-free"]
_NONE: Status = "no critical batch in range"


@dataclass(frozen=True)
class SfoComplexity(JsonNoun):
    """S(b) = N(b)·b as fitted, and its least value. b in examples, N in updates, S in gradient evaluations of examples.

    status: "found"; "no critical batch in range" where S has no minimum between the sizes tried, and then the numbers
    at the minimum are NaN with the band that the data allow; "variance-free" where N does not depend on b: b* = 0.
    critical_batch: b* = 2v/u. min_sfo: S(b*) = 4v/u². steps_at_critical: N(b*) = 2/u. feasible_above: v/u, at or below
    which no run reaches the target. u: per update. v: examples per update.
    measured: the size tried with the least mean N·b. batch_sizes, sfo, fitted: each size's measured N·b, with the
    interval of its mean, and the fitted one with its band. censored: runs that did not reach the target.
    """

    status: Status
    critical_batch: Estimate
    min_sfo: Estimate
    steps_at_critical: Estimate
    feasible_above: Estimate
    u: Estimate
    v: Estimate
    measured: float
    batch_sizes: tuple[float, ...]
    sfo: tuple[Estimate, ...]
    fitted: tuple[Estimate, ...]
    censored: int = 0
    note: str = ""

    def steps(self, batch_size: float) -> float:
        """N(b) = b/(ub - v); infinite for b <= v/u, where the target is out of reach."""
        check_positive(batch_size=batch_size)
        slack = self.u.value * batch_size - self.v.value
        return batch_size / slack if slack > 0 else math.inf

    def evaluations(self, batch_size: float) -> float:
        """S(b) = N(b)·b: gradient evaluations of examples to the target."""
        return self.steps(batch_size) * batch_size

    def predict(self, measured: AdaptiveSetting, other: AdaptiveSetting) -> Estimate:
        """b* under `other`, from this one under `measured`: by the ratio of the two settings' `noise_factor`.

        It is the theory's: gradient variance, ε and data are taken as the same, and the interval is this one's, scaled.
        """
        ratio = other.noise_factor / measured.noise_factor
        known = self.critical_batch
        method = f"{known.method}; times {ratio:.4g} for the other setting"
        return Estimate(ratio * known.value, ratio * known.low, ratio * known.high, method, known.coverage)


@dataclass(frozen=True)
class AdaptiveSetting(JsonNoun):
    """What b* depends on beside the task. learning_rate: α. beta1: β₁. gamma: γ, the constant of the first moment's
    bias correction: β₁ for Adam, 0 for a form without it. h: a lower bound of the preconditioner's diagonal, in the
    optimizer's own scale; the theory does not give it, and 1 for both settings leaves it out.

    >>> round(AdaptiveSetting(1e-3, 0.5, gamma=0.5).noise_factor, 6)
    0.008
    """

    learning_rate: float
    beta1: float
    gamma: float = 0.0
    h: float = 1.0

    def __post_init__(self) -> None:
        check_positive(learning_rate=self.learning_rate, h=self.h)
        for name in ("beta1", "gamma"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must lie in [0, 1), got {getattr(self, name)!r}")

    @property
    def noise_factor(self) -> float:
        """α/((1 - β₁)(1 - γ)²h), to which b* is proportional."""
        return self.learning_rate / ((1 - self.beta1) * (1 - self.gamma) ** 2 * self.h)


def sfo_complexity(
    batch_sizes: Sequence[float],
    steps: Sequence[float | None],
    *,
    coverage: float = 0.9,
    check_interval: float | None = None,
    step_cap: float | None = None,
    seed: int = 0,
) -> SfoComplexity:
    """Fits 1/N = u - v/b to (batch size, steps to target) pairs, one a run, and finds the batch with the least N·b.

    batch_sizes: examples an update; several runs a size are repeats, whose ln steps are averaged. For a GAN b counts
    the real examples of a step once: generated ones and several critic steps multiply S, but leave b* where it is.
    steps: updates to the target; None for a run that did not reach it, treated as in `fit_tradeoff` and reported.
    check_interval: q, the updates between two looks at the target. The steps then lie up to q below the count given:
    q/2 is taken off, and the bands are widened by q. None for exact steps. step_cap: the most updates a run had; a
    count at it or above is refused, for it must be a run that did not reach the target.
    coverage: of the bands; 0.9, the 5 to 95 % band. seed: of the bootstrap.

    Weighted least squares, an error of N being a share of N. The bands are a parametric bootstrap: the scatter of a run
    is the larger of what repeats show and what the line leaves over, each with its uncertainty (χ²). The constants and
    so b* hold for one target and one learning rate at all sizes: not for rates tuned at each size, where
    `fit_tradeoff` has its law. N·b with a minimum at an end of the grid is no minimum: then there is no number.

    Raises `InputError` for fewer than 3 sizes that reached the target, and for bad numbers.

    >>> sizes = [16, 32, 64, 128, 256]
    >>> found = sfo_complexity(sizes, [b / (0.01 * b - 0.15) for b in sizes])
    >>> found.status, round(found.critical_batch.value, 6), found.measured
    ('found', 30.0, 32.0)
    """
    check_inside(coverage=coverage)
    runs = by_size(batch_sizes, _midpoints(steps, check_interval, step_cap))
    if len(runs.sizes) < FEWEST_SIZES:
        raise InputError(
            f"batch_sizes must hold at least {FEWEST_SIZES} different sizes that reached the target, "
            f"got {len(runs.sizes)}"
        )
    line = _Line(runs.sizes, runs.counts)
    u, v = (float(each) for each in line.fit(np.exp(runs.log_steps)))
    scatter = _scatter(runs, line.residuals(u, v, runs))
    random = np.random.default_rng(derive_seed(seed, "sfo"))
    draws = line.draws(line.steps(u, v, runs), scatter, check_interval or 0.0, random)
    sfo = [_of_mean(runs, at, scatter, coverage, check_interval or 0.0) for at in range(len(runs.sizes))]
    return _result(runs, u, v, draws, tuple(sfo), coverage)


def joint_critical_batch(discriminator: SfoComplexity, generator: SfoComplexity) -> Estimate:
    """max(b*_D, b*_G): one batch size for a two-time-scale pair, below neither player's own. A convention of batchlab.

    The theory gives each player its own line, fitted to steps to that player's own goal. One score that ends the
    training of both gives one fit, and needs no joining. NaN where either has no critical batch in range. The
    coverage stated holds whether or not the two fits share runs: both intervals must hold.
    """
    pair = (discriminator.critical_batch, generator.critical_batch)
    coverage = sum(each.coverage for each in pair) - 1
    if not coverage > 0:
        raise InputError(f"the coverages must sum to more than 1, got {pair[0].coverage!r} and {pair[1].coverage!r}")
    low, high = max(each.low for each in pair), max(each.high for each in pair)
    if not all(each.defined for each in pair):
        return Estimate(math.nan, low, high, "undefined: a player has no critical batch in range", coverage)
    return Estimate(max(each.value for each in pair), low, high, "larger of the two players'", coverage)


def _midpoints(steps: Sequence[float | None], interval: float | None, cap: float | None) -> list[float | None]:
    """The counts less half the check interval; refuses what hides a run that did not reach the target."""
    for name, value in (("check_interval", interval), ("step_cap", cap)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} must be finite and > 0, or None, got {value!r}")
    for count in steps:
        if count is None:
            continue
        if not 0 < count < math.inf or count >= (math.inf if cap is None else cap):
            limit = "" if cap is None else f" and below step_cap, {cap:g}"
            raise InputError(f"steps must be finite, > 0{limit}; None where the target was not reached, got {count!r}")
        if interval is not None and count < interval:
            raise InputError(f"steps must be at least check_interval, {interval:g}, got {count!r}")
    return [None if count is None else count - (interval or 0.0) / 2 for count in steps]


class _Line:
    """y = u - v·x, y = 1/N, x = 1/b, by weighted least squares on rows of N."""

    def __init__(self, sizes: Array, counts: Array) -> None:
        self.sizes, self.counts, self.x = sizes, counts, 1 / sizes

    def fit(self, steps: Array) -> tuple[Array, Array]:
        """u and v, a pair for each row. Weights n·N², N first as measured, then as fitted where the line allows."""
        y, weights = 1 / steps, self.counts * steps**2
        u, v = self._solve(y, weights)
        for _ in range(_ROUNDS):
            fitted = u[..., None] - v[..., None] * self.x
            usable = (fitted > 0).all(axis=-1, keepdims=True)
            u, v = self._solve(y, np.where(usable, self.counts / np.where(usable, fitted, 1.0) ** 2, weights))
        return u, v

    def _solve(self, y: Array, weights: Array) -> tuple[Array, Array]:
        total = weights.sum(axis=-1, keepdims=True)
        mean_x, mean_y = (weights * self.x).sum(-1, keepdims=True) / total, (weights * y).sum(-1, keepdims=True) / total
        dx = self.x - mean_x
        slope = (weights * dx * (y - mean_y)).sum(axis=-1) / (weights * dx**2).sum(axis=-1)
        u: Array = mean_y[..., 0] - slope * mean_x[..., 0]
        return u, -slope

    def steps(self, u: float, v: float, runs: RunSets) -> Array:
        """N on the line; as measured where the line does not allow the size."""
        y = u - v * self.x
        return np.where(y > 0, 1 / np.where(y > 0, y, 1.0), np.exp(runs.log_steps))

    def residuals(self, u: float, v: float, runs: RunSets) -> Array:
        """ln(measured/fitted) of each size's mean."""
        return runs.log_steps - np.log(self.steps(u, v, runs))

    def draws(
        self, steps: Array, scatter: tuple[float, int], interval: float, random: np.random.Generator
    ) -> tuple[Array, Array]:
        """u and v of lines fitted to simulated means, a row for each way the check interval may have erred.

        Half an interval too many or too few: at all sizes alike, or one way at small sizes and the other at large.
        Where steps hardly differ between sizes the same check ends them all, so the errors do not average out.
        """
        (variance, free), shape = scatter, (_DRAWS, len(self.x))
        deviation = np.sqrt(variance * free / random.chisquare(free, size=(_DRAWS, 1)))
        noise = np.exp(deviation * random.standard_normal(shape) / np.sqrt(self.counts))
        tilt = np.where(self.x > np.median(self.x), 1.0, -1.0)
        level = np.ones_like(tilt)
        ways = np.stack([level, -level, tilt, -tilt]) if interval else np.zeros((1, len(tilt)))
        return self.fit(np.abs((steps + interval / 2 * ways)[:, None] * noise))


def _scatter(runs: RunSets, residuals: Array) -> tuple[float, int]:
    """The variance of a run's ln N, the larger of two estimates, and its degrees of freedom: about the line, and among
    repeats. Sizes that miss the line by more than their repeats say have an error in common, and it counts."""
    free = len(residuals) - 2
    about = (float((runs.counts * residuals**2).sum()) / free, free)
    within = (runs.square_sum / runs.free, runs.free) if runs.free else (0.0, 0)
    return max(about, within)


def _status(runs: RunSets, u: float, v: float) -> tuple[Status, str]:
    """Whether S has a minimum between the sizes tried, and why not. A size that no run can use bounds it below."""
    sizes, total = runs.sizes, runs.log_steps + np.log(runs.sizes)
    best, b_star = int(np.argmin(total)), 2 * v / u if u > 0 else math.inf
    if u > 0 and abs(v) / sizes[0] <= _ROUNDING * u:
        return "variance-free", "the steps do not depend on the batch size: the smallest batch is best"
    if np.ptp(total) <= _ROUNDING:
        return _NONE, f"N·b is level from batch size {sizes[0]:g} to {sizes[-1]:g}: add larger ones"
    if u <= 0 or best == len(sizes) - 1 or b_star >= sizes[-1]:
        return _NONE, f"N·b is still falling, or level, at batch size {sizes[-1]:g}: add larger ones"
    lost_below = any(size < sizes[0] for size in runs.left_out)
    if v <= 0 or b_star <= max([size for size in runs.left_out if size < sizes[0]], default=sizes[0]):
        return _NONE, f"N·b rises from batch size {sizes[0]:g} on: add smaller ones"
    if best == 0 and not lost_below:
        return _NONE, f"N·b is least at the smallest size tried, {sizes[0]:g}: add smaller ones"
    return "found", ""


def _result(
    runs: RunSets, u: float, v: float, draws: tuple[Array, Array], sfo: tuple[Estimate, ...], coverage: float
) -> SfoComplexity:
    sizes, method = runs.sizes, f"1/N linear in 1/b over {len(runs.sizes)} sizes, parametric bootstrap"
    status, note = _status(runs, u, v)
    v = 0.0 if status == "variance-free" else v

    def estimate(value: float, samples: Array, defined: bool = True) -> Estimate:
        ends = np.quantile(samples, (0.5 - coverage / 2, 0.5 + coverage / 2), axis=-1, method="inverted_cdf")
        low, high = float(ends[0].min()), float(ends[1].max())
        if not defined:
            return Estimate(math.nan, low, high, f"undefined: {status}; {method}", coverage)
        return Estimate(value, min(low, value), max(high, value), method, coverage)

    here, drawn = _minimum(np.array(u), np.array(v)), _minimum(*draws)
    least = [estimate(float(value), each, status != _NONE) for value, each in zip(here[:3], drawn[:3], strict=True)]
    fitted, curves = _evaluations(np.array(u), np.array(v), sizes), np.moveaxis(_evaluations(*draws, sizes), -1, 0)
    measured = runs.log_steps + np.log(sizes)
    return SfoComplexity(
        status=status,
        critical_batch=least[0],
        min_sfo=least[1],
        steps_at_critical=least[2],
        feasible_above=estimate(float(here[3]), drawn[3], u > 0),
        u=estimate(u, draws[0]),
        v=estimate(v, draws[1]),
        measured=float(sizes[np.argmin(measured)]),
        batch_sizes=tuple(map(float, sizes)),
        sfo=sfo,
        fitted=tuple(estimate(float(value), curve) for value, curve in zip(fitted, curves, strict=True)),
        censored=runs.censored,
        note="; ".join([*runs.notes, *([note] if note else [])]),
    )


def _minimum(u: Array, v: Array) -> tuple[Array, Array, Array, Array]:
    """b* = 2v/u, S(b*) = 4v/u², N(b*) = 2/u and v/u. Infinite for u <= 0: S falls for ever; 0 for v < 0: it rises."""
    bounded = u > 0
    inverse = np.where(bounded, 1 / np.where(bounded, u, 1.0), math.inf)
    ratio = np.where(bounded, np.maximum(v, 0.0) * np.where(bounded, inverse, 1.0), math.inf)
    return 2 * ratio, 4 * ratio * np.where(bounded, inverse, 1.0), 2 * inverse, ratio


def _evaluations(u: Array, v: Array, sizes: Array) -> Array:
    """S at each size, one row a line; infinite where the line does not allow it."""
    slack = u[..., None] * sizes - v[..., None]
    return np.where(slack > 0, sizes**2 / np.where(slack > 0, slack, 1.0), math.inf)


def _of_mean(runs: RunSets, at: int, scatter: tuple[float, int], coverage: float, interval: float) -> Estimate:
    """A size's mean N·b with Student's interval, and half a check interval beyond it on either side."""
    from scipy.special import stdtrit

    size, log_value, count = (float(column[at]) for column in (runs.sizes, runs.log_steps, runs.counts))
    half = float(stdtrit(scatter[1], 0.5 + coverage / 2)) * math.sqrt(scatter[0] / count)
    low, value, high = (size * math.exp(min(log_value + d, 690.0)) for d in (-half, 0.0, half))
    beyond = size * interval / 2
    method = f"geometric mean of {count:g} runs, scatter pooled over sizes"
    return Estimate(value, max(low - beyond, 0.0), high + beyond, method, coverage)
