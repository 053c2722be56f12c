"""y = a·x^b through a user's own points, by least squares on logarithms, with Student's intervals.

The law is kept at its middle, y = middle·(x/x_middle)^exponent with x_middle the geometric mean of x: there the two
constants do not depend on each other, and a law in millions is the law in plain counts with another x_middle. `a`,
its value at x = 1, belongs to the unit of x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_inside, check_positive
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.curves.log_line import LogLine

Array = NDArray[np.float64]
Values = Sequence[float] | Array
FEWEST = 3
WIDEST = 1.0
_SAME = 1e-9


@dataclass(frozen=True)
class PowerLaw(JsonNoun):
    """y = middle·(x/x_middle)^exponent, in the units of the points it was fitted to.

    deviation: the standard deviation of ln y about the law. x, y: the points. residuals: ln(measured/fitted) at each.
    held_out: ln(measured/predicted) at each, by the law fitted without the points of that x. note: what the reader
    must know; "" for nothing.
    """

    exponent: Estimate
    middle: Estimate
    x_middle: float
    deviation: float
    x: tuple[float, ...]
    y: tuple[float, ...]
    residuals: tuple[float, ...]
    held_out: tuple[float, ...]
    x_name: str = "x"
    y_name: str = "y"
    note: str = ""

    @property
    def a(self) -> Estimate:
        """y at x = 1: the law's prefactor, whose interval is wide where x = 1 is far from the points."""
        return self.at(1.0)

    @property
    def leave_one_out(self) -> float:
        """The mean of |ln(measured/predicted)| over the points, each predicted by the others; NaN if none could be."""
        known = [abs(error) for error in self.held_out if not math.isnan(error)]
        return float(np.mean(known)) if known else math.nan

    def value(self, x: float) -> float:
        """y on the law."""
        check_positive(**{self.x_name: x})
        return _exp(math.log(self.middle.value) + self.exponent.value * math.log(x / self.x_middle))

    def at(self, x: float, *, new_point: bool = False) -> Estimate:
        """y at x with its interval. new_point: of one more measured point, with its own scatter, and not of the law."""
        check_positive(**{self.x_name: x})
        away, value = math.log(x / self.x_middle), self.value(x)
        own = self._student() * self.deviation if new_point else 0.0
        low, high = (_away(self.middle, self.exponent, away, side, own) for side in (-1, 1))
        method = self.exponent.method + (", of one more point" if new_point else "")
        centre = math.log(self.middle.value) + self.exponent.value * away
        return Estimate(value, _exp(centre - low), _exp(centre + high), method, self.exponent.coverage)

    def outside(self, x: float) -> str:
        """How x lie beyond the points, in words; "" where it does not: beyond them the law extrapolates."""
        check_positive(**{self.x_name: x})
        low, high = min(self.x), max(self.x)
        if low * (1 - _SAME) <= x <= high * (1 + _SAME):
            return ""
        return f"{self.x_name} of {x:.3g} lie beyond {low:.3g} to {high:.3g}, which the law was fitted over"

    def _student(self) -> float:
        from scipy.special import stdtrit

        return float(stdtrit(max(1, len(self.x) - 2), 0.5 + self.exponent.coverage / 2))


def power_law(
    x: Values,
    y: Values,
    *,
    x_name: str = "x",
    y_name: str = "y",
    coverage: float = 0.95,
    widest: float = WIDEST,
) -> PowerLaw:
    """y = a·x^b through at least three different x; several points of one x are welcome.

    x, y: one a point, finite and > 0. x_name, y_name: what they count, with the unit, for messages and tables. widest:
    the widest interval of the exponent that is still worth a law, 1 by default: beyond it "grows with x" and "does
    not" can hardly be told apart, and the points are refused with the span of x that would do.

    The intervals take ln y as scattered alike, and independently, about the law. Not for checkpoints of one run, which
    are correlated, nor for points that curve on logarithmic axes: look at the residuals.

    >>> law = power_law([1e9, 1e10, 1e11], [2e5, 4e5, 8e5], x_name="tokens", y_name="batch_tokens")
    >>> round(law.exponent.value, 4), round(law.value(1e12)), law.outside(1e12)
    (0.301, 1600000, 'tokens of 1e+12 lie beyond 1e+09 to 1e+11, which the law was fitted over')
    """
    check_inside(coverage=coverage)
    check_positive(widest=widest)
    xs, ys = checked(x, y, x_name, y_name)
    different = _different(xs)
    if different < FEWEST:
        raise InputError(f"{x_name} must hold at least {FEWEST} different values for a power law, got {different}")
    line = LogLine.through(xs, ys)
    method = f"least squares on ln {y_name} over {len(xs)} points, Student's interval"
    exponent = line.exponent(method, coverage)
    _check_width(exponent, line, xs, x_name, y_name, widest)
    x_middle = math.exp(line.mean_x)
    middle = line.at(x_middle, method, coverage)
    held_out = leave_groups_out(np.log(xs), np.log(ys), np.round(np.log(xs) / _SAME))
    return PowerLaw(exponent, middle, x_middle, line.deviation, xs, ys, line.residuals, held_out, x_name, y_name)


def checked(x: Values, y: Values, x_name: str = "x", y_name: str = "y") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Both as plain floats of one length, finite and > 0."""
    xs, ys = plain(x, x_name), plain(y, y_name)
    for name, values in ((x_name, xs), (y_name, ys)):
        for value in values:
            check_positive(**{name: value})
    if len(xs) != len(ys):
        raise InputError(f"{x_name} and {y_name} must be of one length, got {len(xs)} and {len(ys)}")
    return tuple(map(float, xs)), tuple(map(float, ys))


def plain(values: Any, name: str) -> list[Any]:
    """The values as Python's own, so that a message shows them as they were meant."""
    if not hasattr(values, "__len__") or getattr(values, "ndim", 1) != 1 or isinstance(values, str):
        raise InputError(f"{name} must be a sequence of numbers, got {values!r:.80}")
    return list(values.tolist() if hasattr(values, "tolist") else values)


def leave_groups_out(log_x: Array, log_y: Array, group: Array | NDArray[np.intp]) -> tuple[float, ...]:
    """ln(measured/predicted) at each point, by the line without all points of its group; NaN where that is none."""
    errors = np.full(len(log_x), math.nan)
    for each in np.unique(group):
        left = group == each
        x, y = log_x[~left], log_y[~left]
        dx = x - x.mean() if len(x) else x
        if not dx @ dx > _SAME**2:
            continue
        slope = dx @ (y - y.mean()) / (dx @ dx)
        errors[left] = log_y[left] - y.mean() - slope * (log_x[left] - x.mean())
    return tuple(map(float, errors))


def _different(xs: Values) -> int:
    logs = np.sort(np.log(np.asarray(xs)))
    return 0 if len(logs) == 0 else 1 + int((np.diff(logs) > _SAME).sum())


def _check_width(exponent: Estimate, line: LogLine, xs: Values, x_name: str, y_name: str, widest: float) -> None:
    width, span = exponent.high - exponent.low, max(xs) / min(xs)
    if width <= widest:
        return
    wanted = _exp(math.log(span) * width / widest)
    raise InputError(
        f"{x_name} spans too little for a power law: over a factor of {span:.3g}, with {y_name} scattered by "
        f"{100 * (_exp(line.deviation) - 1):.2g} %, the exponent's {100 * exponent.coverage:g} % interval is "
        f"[{exponent.low:.3g}, {exponent.high:.3g}], wider than {widest:g}; span a factor of {wanted:.3g} or add points"
    )


def _away(middle: Estimate, exponent: Estimate, away: float, side: int, own: float) -> float:
    """Half the interval of ln y on one side: both constants' parts and a point's own, at right angles."""
    bound = middle.high if side > 0 else middle.low
    of_middle = abs(math.log(bound / middle.value)) if bound > 0 else math.inf
    end = exponent.high if side * away > 0 else exponent.low
    of_exponent = abs((end - exponent.value) * away) if away else 0.0
    return math.sqrt(of_middle**2 + of_exponent**2 + own**2)


def _exp(value: float) -> float:
    """e^value, infinite where a float cannot hold it."""
    return math.exp(value) if value < 709.0 else math.inf
