"""Drawing runs again: whole runs, within their groups, the same for a seed, and an interval that knows its failures."""

import math

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.rules.fit.bootstrap import bootstrap


def test_rows_of_a_run_are_drawn_together_and_groups_keep_their_size():
    runs, within, seen = ["a", "a", "b", "c", "c", "c"], [0, 0, 0, 1, 1, 1], []
    bootstrap(lambda rows: seen.append(sorted(rows)) or [0.0], runs, within=within, draws=50)
    for rows in seen:
        counts = np.bincount(rows, minlength=6)
        assert counts[0] == counts[1] and counts[0] + counts[2] == 2
        assert (counts[3:] == 1).all()
    assert len({tuple(rows) for rows in seen}) == 3


def test_it_is_the_same_for_a_seed_and_another_for_another():
    def drawn(seed):
        return bootstrap(lambda rows: [float(rows.sum())], list(range(20)), seed=seed).values

    assert (drawn(3) == drawn(3)).all() and (drawn(3) != drawn(4)).any()


def test_the_mean_of_normal_values_has_its_standard_error():
    """200 values: the interval at 90 % is 2·1.645 standard errors wide, known from 1000 draws to 8 %."""
    values = np.random.default_rng(0).standard_normal(200)
    drawn = bootstrap(lambda rows: [float(values[rows].mean())], list(range(200)), draws=1000)
    found = drawn.estimate(0, float(values.mean()), "mean", 0.9)
    assert found.high - found.low == pytest.approx(2 * 1.645 * values.std() / math.sqrt(200), rel=0.15)
    assert found.low < found.value < found.high


def test_ten_points_are_few():
    """A power law's exponent, 200 tables of ten points at 90 %: near 82 %; four standard errors are 0.11."""
    x, inside = np.log(np.geomspace(1, 100, 10)), 0
    for seed in range(200):
        y = 0.383 * x + 0.05 * np.random.default_rng(seed).standard_normal(10)

        def slope(rows, y=y):
            away = x[rows] - x[rows].mean()
            return [float(away @ y[rows] / (away @ away))]

        drawn = bootstrap(slope, list(range(10)), draws=100, seed=seed)
        found = drawn.estimate(0, slope(np.arange(10))[0], "slope", 0.9)
        inside += found.low <= 0.383 <= found.high
    assert 0.71 < inside / 200 < 0.9, inside / 200


def test_draws_that_fail_are_counted():
    def sometimes(share):
        generator = np.random.default_rng(0)

        def statistic(rows):
            if generator.uniform() < share:
                raise InputError("no law")
            return [1.0]

        return bootstrap(statistic, list(range(5)), draws=100).estimate(0, 1.0, "m", 0.9)

    assert (sometimes(0.05).low, sometimes(0.05).high) == (1.0, 1.0)
    lost = sometimes(0.5)
    assert (lost.low, lost.high) == (-math.inf, math.inf) and "of 100 drawn tables could not be fitted" in lost.method
    assert sometimes(1.0).high == math.inf


def test_bad_numbers_are_refused():
    with pytest.raises(InputError, match="draws must be an integer of at least 2, got 1"):
        bootstrap(lambda rows: [0.0], [1, 2], draws=1)
    with pytest.raises(InputError, match="coverage must lie in"):
        bootstrap(lambda rows: [0.0], [1, 2], coverage=90)
