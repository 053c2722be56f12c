"""The widths of curves, their interval over directions and profile, and what has none."""

import math

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.measure.surface.landscape import Landscape, landscape
from tests.measure.surface.small import LINE, ONES


def made(rows, x=(-1.0, -0.5, 0.0, 0.5, 1.0), norm="filter", origin=0.0):
    return Landscape(1, x, (), tuple(map(tuple, rows)), origin, 1, (1.0,) * len(rows), norm, "biasbn", 0)


def test_widths_of_curves_that_end_early_or_are_infinite():
    bowl, open_right, walled = (4, 1, 0, 1, 4), (4, 1, 0, 0.1, 0.2), (math.inf, 0.5, 0, 0.5, math.inf)
    found = made([bowl, open_right, walled])
    assert found.widths(1.0) == (1.0, math.inf, 1.5)
    assert made([(0.0, 1.0)], x=(0.5, 1.0)).widths(0.5) == (math.inf,)  # nothing is known of the left
    assert made([(3.0, 2.0, 3.0)], x=(-1.0, 0.25, 1.0), origin=1.0).widths(1.0) == (0.5 + 0.25,)


def test_an_interval_is_never_narrower_than_what_was_seen():
    x = tuple(k / 10 for k in range(-10, 11))
    rows = [tuple(c * a * a for a in x) for c in range(1, 9)]
    wide = made(rows, x=x).width(0.9)
    assert wide.defined and 0 < wide.low < wide.value < wide.high <= 2 and wide.coverage > 0.95
    censored = made(rows, x=x).width(4.5)  # reached by the last four, the narrowest of them between 0.7 and 0.8
    assert not censored.defined and censored.method.startswith("undefined: median of 8 directions, 4 of them below")
    assert (censored.low, censored.high) == (2 * 0.7, math.inf)
    none = made(rows, x=x).width(100.0)
    assert (none.low, none.high) == (2.0, math.inf) and not none.defined
    one = made(rows[:1], x=x).width(0.5)
    assert (one.low, one.high) == (0.0, math.inf) and one.method.endswith("one direction has no interval")
    given = made(rows, x=x, norm="given").width(0.9)
    assert given == Estimate(wide.value, 0.0, math.inf, given.method) and "given have no interval" in given.method
    walled = made([(math.inf, 0.1, 0.0, 0.1, math.inf)] * 8).width(1.0)
    assert (walled.low, walled.value, walled.high) == (1.0, 1.5, 2.0)
    coarse = made([(100.0 * c, 0.0, 100.0 * c) for c in range(1, 9)], x=(-1.0, 0.0, 1.0)).width(1.0)
    assert (coarse.low, coarse.high) == (0.0, 2.0)  # the crossing may be anywhere between the points


def test_the_interval_over_directions_covers_at_its_rate():
    """400 landscapes of 10 directions through one minimum, each curve a parabola: 97.9 % is stated."""
    rng, covered = np.random.default_rng(0), 0
    eigenvalues = 1.0 / np.arange(1, 21) ** 2
    curvature = lambda n: rng.standard_normal((n, 20)) ** 2 @ eigenvalues  # noqa: E731
    truth = float(np.median(2 / np.sqrt(curvature(200_000))))
    x = np.linspace(-8, 8, 161)
    for _ in range(400):
        found = made(0.5 * curvature(10)[:, None] * x**2, x=tuple(x)).width(0.5)
        covered += found.low <= truth <= found.high
    stated = found.coverage
    assert stated == pytest.approx(0.9785, abs=1e-4)
    assert abs(covered / 400 - stated) < 4 * math.sqrt(stated * (1 - stated) / 400)  # 0.029


def test_a_profile_has_the_median_and_the_whole_range():
    found = made([(4, 1, 0, 1, 4), (2, 2, 0, 2, 2), (math.inf, 3, 0, 3, 6)])
    assert found.profile()[0] == (-1.0, 4.0, 2.0, math.inf) and found.profile()[3] == (0.5, 2.0, 1.0, 3.0)


def test_widths_refuse_what_they_are_not_of():
    plane = landscape(LINE, lambda m, b: m(b).square().mean(), ONES, dimensions=2, points=3)
    with pytest.raises(InputError, match="of a landscape of 1 dimension, this one has 2"):
        plane.width(1.0)
    with pytest.raises(InputError, match="1 points are not evaluated yet: give the landscape as resume first"):
        made([(1, math.nan, 0, 1, 1)]).width(1.0)
    for level in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="level must be finite and > 0, in the loss's unit"):
            made([(1, 1, 0, 1, 1)]).width(level)
    with pytest.raises(InputError, match="level must be large enough to tell"):
        made([(1, 1, 1, 1, 1)], origin=1.0).width(1e-30)


def test_a_landscape_whose_rows_do_not_fit_is_refused():
    with pytest.raises(InputError, match="a landscape's losses must be 1 rows of 5, got 1 rows"):
        made([(1.0, 2.0)])
