"""Against SciPy, hand values and the defining properties: coverage, agreement of test and interval, power."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from batchlab.core.errors import InputError
from batchlab.measure.energy.welch import (
    detectable_difference,
    hedges_g,
    holm,
    ratio_of_means,
    welch_anova,
    welch_t,
)

NUMBERS = st.lists(st.floats(0.1, 1e3), min_size=2, max_size=8).filter(lambda xs: np.ptp(xs) > 1e-3 * max(xs))


@given(x=NUMBERS, y=NUMBERS)
def test_t_is_scipys(x, y):
    ours, theirs = welch_t(x, y), stats.ttest_ind(x, y, equal_var=False)
    assert ours.statistic == pytest.approx(theirs.statistic, rel=1e-10, abs=1e-10)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-10)


@given(groups=st.lists(NUMBERS, min_size=2, max_size=5))
def test_anova_is_scipys(groups):
    ours, theirs = welch_anova(groups), stats.f_oneway(*groups, equal_var=False)
    assert ours.statistic == pytest.approx(theirs.statistic, rel=1e-10, abs=1e-12)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-10)


def test_anova_of_a_worked_case():
    """By hand: w = 3, 0.75, 3; x̄ = 46/9; λ = 1.1481...; F = 12.75/(1 + λ/4)."""
    groups = [[1.0, 2.0, 3.0], [4.0, 6.0, 8.0], [7.0, 8.0, 9.0]]
    w, means = np.array([3, 0.75, 3]), np.array([2.0, 6.0, 8.0])
    centre = (w * means).sum() / 6.75
    lam = ((1 - w / 6.75) ** 2 / 2).sum()
    f = (w * (means - centre) ** 2).sum() / 2 / (1 + 2 * lam / 8)
    assert welch_anova(groups).statistic == pytest.approx(f, rel=1e-12)
    assert welch_anova(groups).p == pytest.approx(stats.f.sf(f, 2, 8 / (3 * lam)), rel=1e-10)


def test_two_groups_make_the_analysis_of_variance_a_t_test():
    x, y = [1.0, 2.5, 3.0, 2.0], [4.0, 6.0, 9.0]
    assert welch_anova([x, y]).p == pytest.approx(welch_t(x, y).p, rel=1e-12)
    assert welch_anova([x, y]).statistic == pytest.approx(welch_t(x, y).statistic ** 2, rel=1e-12)


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_rejects_what_its_steps_reject(p):
    for alpha in (0.01, 0.05, 0.3):
        rejected, order = set(), sorted(range(len(p)), key=lambda i: p[i])
        for rank, i in enumerate(order):
            if (len(p) - rank) * p[i] > alpha:
                break
            rejected.add(i)
        assert {i for i, adjusted in enumerate(holm(p)) if adjusted <= alpha} == rejected


def test_holm_keeps_a_test_that_gave_nothing():
    adjusted = holm([0.01, math.nan, 0.04])
    assert adjusted[0] == pytest.approx(0.03) and math.isnan(adjusted[1]) and adjusted[2] == pytest.approx(0.08)


def test_hedges_g_has_no_bias():
    """Truth 1, 4 and 4 runs: Cohen's d would be 15 % too large. Its sd is about 0.85: four sigma of 20 000 is 0.024."""
    random = np.random.default_rng(0)
    found = [hedges_g(random.normal(1, 1, 4), random.normal(0, 1, 4)) for _ in range(20_000)]
    assert abs(np.mean(found) - 1) < 4 * np.std(found) / math.sqrt(20_000) < 0.05


@given(x=NUMBERS, y=NUMBERS)
@example(x=[1.0, 2.0], y=[14.0, 17.0])  # 1 is rejected, and both 0 and infinity are not
def test_the_interval_of_the_ratio_holds_one_where_the_test_does_not_reject_and_else_only_if_unbounded(x, y):
    ratio, p = ratio_of_means(x, y), welch_t(x, y).p
    if abs(p - 0.05) > 1e-6:
        holds, bounded = ratio.low <= 1 <= ratio.high, ratio.low > 0 and ratio.high < math.inf
        assert holds if p > 0.05 else not (holds and bounded)
    assert ratio.value == pytest.approx(np.mean(x) / np.mean(y)) and ratio.low <= ratio.value <= ratio.high


@given(x=NUMBERS, y=NUMBERS)
def test_the_inverse_ratio_has_the_inverse_interval(x, y):
    ratio, inverse = ratio_of_means(x, y), ratio_of_means(y, x)
    assert inverse.high == pytest.approx(1 / ratio.low if ratio.low else math.inf, rel=1e-6)
    assert inverse.low == pytest.approx(1 / ratio.high, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("sd_x", "sd_y", "runs"), [(3.0, 3.0, 5), (1.0, 10.0, 5), (10.0, 10.0, 3)])
def test_the_interval_covers_at_its_rate(sd_x, sd_y, runs):
    random, covered, trials = np.random.default_rng(0), 0, 1000
    for _ in range(trials):
        got = ratio_of_means(random.normal(90, sd_x, runs), random.normal(100, sd_y, runs))
        covered += got.low <= 0.9 <= got.high
    assert abs(covered / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


def test_the_detectable_difference_is_found_with_the_stated_power():
    random, trials = np.random.default_rng(0), 2000
    groups = [random.normal(100, 3, 5) for _ in range(400)]
    difference = detectable_difference(groups)
    found = 0
    for _ in range(trials):
        x, y = random.normal(100, 3, 5), random.normal(100 * (1 + difference), 3, 5)
        found += stats.ttest_ind(x, y).pvalue < 0.05
    assert abs(found / trials - 0.8) < 4 * math.sqrt(0.8 * 0.2 / trials) + 0.01  # 0.01: the spread is itself estimated
    assert detectable_difference(groups, comparisons=10) > 1.2 * difference


def test_without_spread_nothing_is_claimed():
    same, other = [0.1] * 3, [0.3, 0.3, 0.3]
    assert math.isnan(welch_t(same, other).p) and math.isnan(welch_anova([same, other]).p)
    assert math.isnan(hedges_g(same, other)) and math.isnan(detectable_difference([same, other]))
    ratio = ratio_of_means(same, other)
    assert ratio.value == pytest.approx(1 / 3) and (ratio.low, ratio.high) == (0.0, math.inf)
    assert not math.isnan(welch_t(same, [1.0, 2.0]).p)
    assert math.isnan(ratio_of_means([-1.0, -2.0], [1.0, 2.0]).value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: welch_t([1.0], [1.0, 2.0]), "a group must be at least 2 finite numbers, got .1.0."),
        (lambda: welch_t([1.0, math.nan], [1.0, 2.0]), "a group must be at least 2 finite numbers"),
        (lambda: welch_anova([[1.0, 2.0]]), "groups must be at least 2, got 1"),
        (lambda: ratio_of_means([1.0, 2.0], [1.0, 2.0], coverage=1.0), "coverage must lie in"),
        (lambda: detectable_difference([[1.0, 2.0]], power=1.0), "power must lie in"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
