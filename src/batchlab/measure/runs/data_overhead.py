"""The growth of the critical batch size with model size or tokens, B* = d·x^β (Zhang et al. 2024, arXiv 2410.21676).

Each B*, the batch that costs 20 % more data, is one of `critical_batch`: `curves.data_overhead`, which rules share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from batchlab.core.checks import check_inside, check_positive
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.curves.data_overhead import CriticalBatch, critical_batch
from batchlab.curves.log_line import LogLine

__all__ = ["CriticalBatch", "Growth", "critical_batch", "fit_growth"]
FEWEST_SIZES = 3


@dataclass(frozen=True)
class Growth(JsonNoun):
    """B* = d·x^β. d: B* at x = 1, in the batch sizes' unit. beta: the exponent, a plain number.

    sizes, critical_batches: the points fitted. residuals: ln(measured/fitted) at each. unit: what x counts, as given.
    """

    d: Estimate
    beta: Estimate
    sizes: tuple[float, ...]
    critical_batches: tuple[float, ...]
    residuals: tuple[float, ...]
    unit: str = ""

    def predict(self, size: float) -> Estimate:
        """B* at x = `size`, in the unit of the fit. The interval is for one more B* measured as those of the fit were.

        It holds the scatter about the law as well as the law's own uncertainty, and widens away from the points.
        """
        check_positive(size=size)
        line = LogLine.through(self.sizes, self.critical_batches)
        method = f"power law over {line.count} points, Student's interval of one more B*"
        return line.at(size, method, self.beta.coverage, new_point=True)


def fit_growth(
    sizes: Sequence[float], critical_batches: Sequence[float], *, unit: str = "", coverage: float = 0.95
) -> Growth:
    """B* = d·x^β by least squares on ln B* = ln d + β·ln x, with Student's intervals (n - 2 degrees of freedom).

    sizes: x, the model size or the tokens of each B*, in whatever unit; d holds for that unit alone, β for any.
    unit: its name, kept with the law, as "million tokens": the source's d = 22.91 is for millions, with billions it
    would be 589. critical_batches: B* at each x, one a run of `critical_batch`, all in one unit.

    The intervals take ln B* as scattered alike about the law. A third parameter, c + d·x^β, is not fitted: the source
    found c = 0. Not for x that span less than the law is asked to: an exponent from a factor of 2 says little.

    >>> law = fit_growth([1, 10, 100], [50, 500, 5000], unit="million parameters")
    >>> round(law.d.value, 6), round(law.beta.value, 6), round(law.predict(1000).value, 6)
    (50.0, 1.0, 50000.0)
    """
    check_inside(coverage=coverage)
    if len(sizes) != len(critical_batches):
        raise InputError(
            f"sizes and critical_batches must be of one length, got {len(sizes)} and {len(critical_batches)}"
        )
    for name, values in (("sizes", sizes), ("critical_batches", critical_batches)):
        for value in values:
            if not 0 < value < math.inf:
                raise InputError(f"{name} must be finite and > 0, got {value!r}")
    if len(set(map(float, sizes))) < FEWEST_SIZES:
        raise InputError(f"sizes must hold at least {FEWEST_SIZES} different values, got {len(set(sizes))}")
    xs, ys = tuple(map(float, sizes)), tuple(map(float, critical_batches))
    line, method = LogLine.through(xs, ys), f"least squares on ln B* over {len(xs)} points, Student's interval"
    exponent, one = line.exponent(method, coverage), line.at(1.0, method, coverage)
    return Growth(one, exponent, xs, ys, line.residuals, unit)
