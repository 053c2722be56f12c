"""The batch size, learning rate or timescale of least loss: the vertex of one parabola in its logarithm.

loss = c₀ + c₁u + c₂u², u = ln x, over all x within a factor of 16 of the best tried (Shuai et al. 2024, arXiv
2412.01505, fixed data; the parabola over the whole range is batchlab's). A parabola through the best three alone is as
unbiased and far less sure: over eight lengths of ten batch sizes the slope of its vertices was 7 to 10 times less sure.

The interval of the vertex -c₁/2c₂ is Fieller's (1954), a ratio's: where the bowl is flat beside the scatter it is
unbounded, and says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_inside, check_positive, holds
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.curves.fieller import fieller
from batchlab.rules.fit.power_laws import Values, plain

Array = NDArray[np.float64]
WITHIN = 16.0
FEWEST = 3
_SAME = 1e-9


@dataclass(frozen=True)
class Optimum(JsonNoun):
    """Where the loss is least, in the unit of `name`.

    at: x of least loss, NaN where it is not bracketed. least_loss: the parabola's there. curvature: 2c₂, how fast the
    loss rises: half of it times (ln x/x_opt)². x, losses: the values tried, ascending, and the mean loss of each.
    fitted: those of the parabola. residuals: measured minus fitted loss of each run that was fitted, by x.
    bracketed: whether the least mean loss has a higher one on both sides, the parabola a least and that lies among the
    values tried. note: why not, or what else the reader must know.
    """

    name: str
    at: Estimate
    least_loss: float
    curvature: float
    x: tuple[float, ...]
    losses: tuple[float, ...]
    fitted: tuple[float, ...]
    residuals: tuple[float, ...]
    bracketed: bool
    note: str = ""

    def excess(self, x: float) -> float:
        """The loss beyond the least that the parabola gives at x."""
        check_positive(**{self.name: x})
        return 0.5 * self.curvature * math.log(x / self.at.value) ** 2


def batch_optimum(
    batch_size: Values,
    loss: Values,
    *,
    within: float = WITHIN,
    coverage: float = 0.95,
    name: str = "batch_size",
) -> Optimum:
    """The batch size of least loss, from runs of one model on one number of tokens, the learning rate tuned at each.

    batch_size, loss: one a run; several runs of a size are welcome. The unit is yours, and the answer's: give it in
    `name`, as "batch_tokens". within: how far from the best the parabola reaches, as a factor. The interval is for
    losses that scatter alike and independently between runs; with no more runs than three there is none.

    Not with one learning rate for all sizes: the vertex is then the learning rate's. Not with losses at different
    points of a decay.

    >>> found = batch_optimum([64, 128, 256, 512], [2.583, 2.570, 2.563, 2.571])
    >>> round(found.at.value), found.bracketed
    (240, True)
    >>> batch_optimum([64, 128, 256], [2.583, 2.570, 2.563]).note
    'not bracketed: the least loss is at the largest batch_size tried, 256; try larger ones'
    """
    return optimum(batch_size, loss, name=name, within=within, coverage=coverage)


def learning_rate_optimum(
    learning_rate: Values, loss: Values, *, within: float = WITHIN, coverage: float = 0.95
) -> Optimum:
    """The learning rate of least loss, from runs of one batch size: a parabola in ln η.

    Leave diverged runs out; where the best is then the largest rate left, it is not bracketed. The loss rises faster
    above the best rate than below: a smaller `within`, as 4, keeps that bend out of the parabola.

    >>> round(learning_rate_optimum([1e-3, 2e-3, 4e-3], [2.5, 2.4, 2.5]).at.value, 6)
    0.002
    """
    return optimum(learning_rate, loss, name="learning_rate", within=within, coverage=coverage)


def timescale_optimum(tau: Values, loss: Values, *, within: float = WITHIN, coverage: float = 0.95) -> Optimum:
    """The timescale τ = B/(ηλD) of least loss, from runs that differ in weight decay alone: a parabola in ln τ.

    `rules.weight_decay.timescale` gives τ of a run; `timescale` fits the law over models and tokens.
    """
    return optimum(tau, loss, name="tau", within=within, coverage=coverage)


def check_bowl(within: float, coverage: float) -> None:
    """Refuses a reach of the parabola that is no factor > 1, and a coverage that is no share."""
    check_inside(coverage=coverage)
    if not holds(lambda within: 1 < within < math.inf, within):
        raise InputError(f"within must be finite and > 1, a factor, got {within!r}")


def optimum(x: Values, loss: Values, *, name: str = "x", within: float = WITHIN, coverage: float = 0.95) -> Optimum:
    """The x of least loss, whatever x is: what the three above do. name: what x is, with its unit."""
    check_bowl(within, coverage)
    xs, losses = _checked(x, loss, name)
    values = _different(xs)
    means = np.array([losses[_same(xs, value)].mean() for value in values])
    best = int(np.argmin(means))
    kept = np.abs(np.log(xs) - math.log(values[best])) <= math.log(within) + _SAME
    fitted = _different(xs[kept])
    if len(fitted) < FEWEST:
        raise InputError(
            f"{name} must hold at least {FEWEST} different values within a factor of {within:g} of the best, "
            f"{values[best]:.4g}, got {len(fitted)}"
        )
    u = np.log(xs[kept])
    bowl = _Bowl.through(u - u.mean(), losses[kept])
    at, why = _vertex(bowl, float(u.mean()), values, best, name, coverage)
    tried, mean_losses, used = (tuple(map(float, each)) for each in (values, means, fitted))
    least, residuals = bowl.least if not why else math.nan, tuple(map(float, bowl.residuals))
    return Optimum(name, at, least, 2 * bowl.c[2], tried, mean_losses, used, residuals, not why, why)


def vertex(u: Array, losses: Array, *, within: float = WITHIN) -> float:
    """The u of least loss, NaN where it is not bracketed: `optimum` without its interval, for many draws.

    u: ln x, one a run; several of a value are welcome.
    """
    values, which = np.unique(np.round(u / _SAME), return_inverse=True)
    if len(values) < FEWEST:
        return math.nan
    means = np.bincount(which, losses) / np.bincount(which)
    best = int(np.argmin(means))
    kept = np.abs(u - values[best] * _SAME) <= math.log(within) + 2 * _SAME
    if best in (0, len(means) - 1) or len(np.unique(which[kept])) < FEWEST:
        return math.nan
    middle = u[kept].mean()
    design = np.vander(u[kept] - middle, 3, increasing=True)
    _, c1, c2 = np.linalg.solve(design.T @ design, design.T @ losses[kept])
    found = middle - c1 / (2 * c2) if c2 > 0 else math.nan
    return float(found) if u.min() <= found <= u.max() else math.nan


@dataclass(frozen=True)
class _Bowl:
    """c: constants of the parabola. covariance: of c over the scatter's variance. free: degrees of freedom."""

    c: tuple[float, float, float]
    covariance: Array
    residuals: Array
    free: int

    @classmethod
    def through(cls, u: Array, losses: Array) -> _Bowl:
        design = np.vander(u, 3, increasing=True)
        q, r = np.linalg.qr(design)
        c = np.linalg.solve(r, q.T @ losses)
        inverse = np.linalg.inv(r)
        c0, c1, c2 = map(float, c)
        return cls((c0, c1, c2), inverse @ inverse.T, losses - design @ c, len(u) - 3)

    @property
    def least(self) -> float:
        return self.c[0] - self.c[1] ** 2 / (4 * self.c[2])

    def interval(self, coverage: float) -> tuple[float, float]:
        """Fieller's: all v whose slope c₁ + 2c₂v is not sure to differ from 0; unbounded where c₂ is not."""
        from scipy.special import stdtrit

        if self.free == 0:
            return -math.inf, math.inf
        scale = float(stdtrit(self.free, 0.5 + coverage / 2)) ** 2 * float(self.residuals @ self.residuals) / self.free
        (_, c1, c2), v = self.c, scale * self.covariance
        return fieller(-c1, 2 * c2, float(v[1, 1]), -2 * float(v[1, 2]), 4 * float(v[2, 2]))


def _vertex(bowl: _Bowl, middle: float, values: Array, best: int, name: str, coverage: float) -> tuple[Estimate, str]:
    """The vertex with its interval, and why it is not bracketed."""
    method = f"vertex of a parabola in ln {name} over {len(bowl.residuals)} runs, Fieller's interval"
    _, c1, c2 = bowl.c
    at = middle - c1 / (2 * c2) if c2 > 0 else math.nan
    if why := _why_not(at, values, best, name):
        return Estimate(math.nan, 0.0, math.inf, why, coverage), why
    low, high = (middle + end for end in bowl.interval(coverage))
    if bowl.free == 0:
        method = f"vertex of a parabola in ln {name} through three runs, which leave no scatter to judge it by"
    value = math.exp(at)
    return Estimate(value, min(_exp(low), value), max(_exp(high), value), method, coverage), ""


def _why_not(at: float, values: Array, best: int, name: str) -> str:
    for edge, end, side in ((0, "smallest", "smaller"), (len(values) - 1, "largest", "larger")):
        if best == edge:
            return f"not bracketed: the least loss is at the {end} {name} tried, {values[edge]:.4g}; try {side} ones"
    if math.isnan(at):
        return f"not bracketed: the loss has no least in {name}, its scatter hides the bowl"
    if not values[0] * (1 - _SAME) <= _exp(at) <= values[-1] * (1 + _SAME):
        return f"not bracketed: the parabola is least at {name} {_exp(at):.4g}, outside those tried"
    return ""


def _checked(x: Values, loss: Values, name: str) -> tuple[Array, Array]:
    x, loss = plain(x, name), plain(loss, "loss")
    if len(x) != len(loss):
        raise InputError(f"{name} and loss must be of one length, got {len(x)} and {len(loss)}")
    for value in x:
        check_positive(**{name: value})
    for value in loss:
        if not holds(math.isfinite, value):
            raise InputError(f"loss must be finite, got {value!r}: leave diverged runs out")
    return np.asarray([float(v) for v in x]), np.asarray([float(v) for v in loss])


def _different(xs: Array) -> Array:
    ordered = np.sort(xs)
    keep = np.ones(len(ordered), dtype=bool)
    keep[1:] = np.diff(np.log(ordered)) > _SAME
    return ordered[keep]


def _same(xs: Array, value: float) -> NDArray[np.bool_]:
    return np.abs(np.log(xs) - math.log(value)) <= _SAME


def _exp(value: float) -> float:
    return math.exp(value) if value < 709.0 else math.inf
