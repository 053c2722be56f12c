"""The surge law's constants from runs (Li et al. 2024): exact recovery, noise, its rivals, edges, refusals."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.rules import learning_rate as rates
from batchlab.rules.fit import SurgeFit, surge
from batchlab.rules.fit.surge_runs import Form

SIZES = 2.0 ** np.arange(3, 12)


def runs(noise_scale=100.0, peak=1e-3, s_min=50.0):
    steps = s_min * (1 + noise_scale / SIZES)
    return SIZES, steps, 2 * peak / (np.sqrt(noise_scale / SIZES) + np.sqrt(SIZES / noise_scale))


@given(st.floats(20, 1000), st.floats(1e-5, 1.0), st.sampled_from(["log", "reciprocal", "weighted"]))
def test_the_hyperbola_and_the_peak_come_back_exactly(noise_scale, peak, form: Form):
    """Sheet check 5: B_crit to 1e-8, ε_max exactly."""
    found = surge(*runs(noise_scale, peak), form=form)
    assert found.noise_scale.value == pytest.approx(noise_scale, rel=1e-6 if form == "log" else 1e-8)
    assert found.peak.value == pytest.approx(peak, rel=1e-6)
    assert found.learning_rate(noise_scale) == pytest.approx(peak, rel=1e-6)
    assert found.errors["surge"] < 1e-5 < min(found.errors["linear"], found.errors["root"])


def test_the_peak_is_within_ten_percent_of_noisy_rates():
    """200 tables, 10 % noise in the nine rates: the mean is off by 3.3 %, so 10 % is three of its standard errors."""
    errors = []
    for seed in range(200):
        sizes, steps, tuned = runs()
        noisy = tuned * np.exp(0.1 * np.random.default_rng(seed).standard_normal(len(sizes)))
        errors.append(surge(sizes, steps, noisy, form="reciprocal").peak.value / 1e-3 - 1)
    assert np.std(errors) == pytest.approx(0.1 / 3, rel=0.3)
    assert np.mean(np.abs(errors) < 0.1) >= 0.98


def test_the_peaks_interval_is_wide_enough():
    """60 tables, 10 % noise in rates and 5 % in steps, at 90 %: it holds the truth in at least that share."""
    inside = 0
    for seed in range(60):
        sizes, steps, tuned = runs()
        a, b = np.random.default_rng(seed).standard_normal((2, len(sizes)))
        found = surge(sizes, steps * np.exp(0.05 * a), tuned * np.exp(0.1 * b), coverage=0.9).peak
        inside += found.low <= 1e-3 <= found.high
    assert inside / 60 >= 0.9 - 4 * math.sqrt(0.09 / 60), inside / 60


@pytest.mark.parametrize(("alpha", "best"), [(1.0, "linear"), (0.5, "root")])
def test_runs_of_a_rival_are_told_by_their_errors(alpha, best):
    sizes, steps, _ = runs()
    found = surge(sizes, steps, 2e-3 / (1 + 100 / sizes) ** alpha)
    assert min(found.errors, key=found.errors.__getitem__) == best
    assert getattr(found, best).value == pytest.approx(2e-3, rel=1e-6)


def test_errors_are_those_of_a_fit_without_the_batch():
    sizes, steps, tuned = runs()
    noisy = tuned * np.exp(0.1 * np.random.default_rng(1).standard_normal(len(sizes)))
    found = surge(sizes, steps, noisy)
    for place in (0, 4, 8):
        rest = np.arange(len(sizes)) != place
        without = surge(sizes[rest], steps[rest], noisy[rest])
        law = without.learning_rate(sizes[place], beyond_peak="fall")
        assert found.surge_errors[place] == pytest.approx(math.log(noisy[place] / law), abs=1e-6)


def test_past_the_peak_the_rate_is_held():
    found = surge(*runs())
    assert found.learning_rate(1e6) == pytest.approx(1e-3, rel=1e-6)
    assert found.learning_rate(6400, beyond_peak="fall") == pytest.approx(
        rates.surge(1e-3, 100, 6400, noise_scale=100, beyond_peak="fall"), rel=1e-6
    )


def test_a_rate_at_the_edge_of_its_grid_counts_for_the_noise_scale_alone():
    sizes, steps, tuned = runs()
    spoilt = np.where(sizes == 8, 5e-3, tuned)
    found = surge(sizes, steps, spoilt, at_edge=sizes == 8)
    assert found.peak.value == pytest.approx(1e-3, rel=1e-6) and 8 not in found.batch_sizes
    assert found.note.startswith("the best rate lies at its grid's edge at 8: left out of ε_max")
    with pytest.raises(InputError, match="at least 3 batches with a best rate inside its grid, got 2"):
        surge(sizes, steps, tuned, at_edge=sizes > 16)


def test_a_run_that_did_not_reach_the_target_is_known_to_the_fit_in_logarithms_alone():
    sizes, steps, tuned = runs()
    longer = (np.append(sizes, 8.0), np.append(steps, math.inf), np.append(tuned, tuned[0]))
    assert surge(*longer).noise_scale.value == pytest.approx(100, rel=1e-6)
    with pytest.raises(InputError, match="steps must be finite and > 0, got inf"):
        surge(*longer, form="reciprocal")


def test_three_batches_keep_the_noise_scale_of_all():
    sizes, steps, tuned = (each[::4] for each in runs())
    assert "keep the B_noise of all" in surge(sizes, steps, tuned).note


def test_json_both_ways():
    found = surge(*runs())
    assert SurgeFit.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"batch_size": SIZES[:2], "steps": [9.0, 8.0], "learning_rate": [1, 1]},
            "at least 3 different batches, got 2",
        ),
        ({"batch_size": -SIZES}, "batch_size must be finite and > 0, got "),
        ({"learning_rate": np.zeros(9)}, "learning_rate must be finite and > 0, got "),
        ({"steps": SIZES[:3]}, "steps and batch_size must be of one length"),
        (
            {"steps": 1e4 / SIZES},
            "steps do not bound B_noise up to batch_size 2048.*the law is then the square-root",
        ),
        ({"steps": np.full(9, 50.0)}, "it is fitted as 0: add smaller batches"),
        ({"form": "linear"}, 'form must be "log", "reciprocal" or "weighted", got \'linear\''),
        ({"at_edge": [True]}, "at_edge and batch_size must be of one length, got 1 and 9"),
    ],
)
def test_bad_runs_are_refused(change, message):
    sizes, steps, tuned = runs()
    given_ = {"batch_size": sizes, "steps": steps, "learning_rate": tuned} | change
    with pytest.raises(InputError, match=message):
        surge(**given_)
