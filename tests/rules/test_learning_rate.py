"""Learning-rate rules: composition, identity, limits, the peak of the surge law, the choice for an optimizer."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.rules import learning_rate as rules
from batchlab.rules.optimizer_family import kind

sizes = st.floats(0.1, 1e7)
rates = st.floats(1e-7, 10.0)
noises = st.floats(0.1, 1e7) | st.just(math.inf)
RULES = ["none", "linear", "sqrt", "power", "saturating", "saturating_sqrt", "surge"]


@pytest.mark.parametrize("rule", RULES)
@given(rate=rates, a=sizes, b=sizes, c=sizes, noise=noises)
def test_moving_twice_is_moving_once(rule, rate, a, b, c, noise):
    def move(value, start, end):
        return rules.rescale(value, start, end, rule=rule, noise_scale=noise, exponent=0.75)

    assert move(move(rate, a, b), b, c) == pytest.approx(move(rate, a, c), rel=1e-9)
    assert move(rate, a, a) == pytest.approx(rate, rel=1e-12)
    assert move(rate, a, b) > 0


@pytest.mark.parametrize("rule", RULES)
@given(rate=rates, a=sizes, b=sizes, c=sizes, noise=noises)
def test_never_falls_with_batch_size(rule, rate, a, b, c, noise):
    small, large = sorted((b, c))
    at = [rules.rescale(rate, a, size, rule=rule, noise_scale=noise, exponent=0.75) for size in (small, large)]
    assert at[0] <= at[1] * (1 + 1e-12)


@given(rates, sizes, sizes)
def test_limits_far_below_the_noise_scale(rate, a, b):
    far = max(a, b) * 1e9
    assert rules.saturating(rate, a, b, noise_scale=far) == pytest.approx(rules.linear(rate, a, b), rel=1e-8)
    assert rules.surge(rate, a, b, noise_scale=far) == pytest.approx(rules.sqrt(rate, a, b), rel=1e-8)
    assert rules.saturating(rate, a, b, noise_scale=math.inf) == pytest.approx(rules.linear(rate, a, b), rel=1e-12)
    assert rules.saturating(rate, a, b, noise_scale=math.inf, exponent=0.5) == pytest.approx(
        rules.sqrt(rate, a, b), rel=1e-12
    )


@given(rates, sizes, sizes)
def test_a_power_has_the_other_rules_as_cases(rate, a, b):
    assert rules.power(rate, a, b, exponent=1) == pytest.approx(rules.linear(rate, a, b), rel=1e-12)
    assert rules.power(rate, a, b, exponent=0.5) == pytest.approx(rules.sqrt(rate, a, b), rel=1e-12)
    assert rules.power(rate, a, b, exponent=0) == rate


def test_a_power_as_published():
    """Shuai et al. 2024: twice the batch at γ = 0.75."""
    assert rules.power(1.0, 256, 512, exponent=0.75) == pytest.approx(1.682, abs=5e-4)


@given(noise=st.floats(1.0, 1e6), k=st.floats(1.0, 1e3))
def test_surge_is_symmetric_about_its_peak(noise, k):
    """Sheet check 3: ε(k·B_n) = ε(B_n/k), and no size beats B_n."""
    up, down = (
        rules.surge(1e-3, noise, size, noise_scale=noise, beyond_peak="fall") for size in (noise * k, noise / k)
    )
    assert up == pytest.approx(down, rel=1e-9)
    assert up <= 1e-3 * (1 + 1e-12)


def test_surge_peaks_at_the_noise_scale():
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_b: -rules.surge(1e-3, 32, math.exp(log_b), noise_scale=500.0, beyond_peak="fall"),
        bracket=(math.log(50), math.log(600), math.log(5000)),
        tol=1e-12,
    )
    assert math.exp(found.x) == pytest.approx(500.0, rel=1e-6)


@given(noise=st.floats(1.0, 1e6), k=st.floats(1.0, 1e6), base=sizes)
def test_surge_holds_its_peak(noise, k, base):
    at_peak = rules.surge(1e-3, base, noise, noise_scale=noise)
    assert rules.surge(1e-3, base, noise * k, noise_scale=noise) == pytest.approx(at_peak, rel=1e-12)


def test_saturating_published_fit():
    """SVHN with SGD, ε = 0.27·B/(96 + B) (McCandlish et al. 2018)."""
    for batch in (8, 96, 1024):
        assert rules.saturating(0.27 * 32 / 128, 32, batch, noise_scale=96) == pytest.approx(
            0.27 * batch / (96 + batch)
        )


@pytest.mark.parametrize(
    ("optimizer", "noise_scale", "rule"),
    [
        ("sgd", 100.0, "saturating_sqrt"),
        ("sgd", None, "sqrt"),
        ("sgd", math.inf, "sqrt"),
        ("adamw", 100.0, "saturating_sqrt"),
        ("adam", math.inf, "sqrt"),
        ("rmsprop", None, "sqrt"),
        ("Lion", 100.0, "saturating_sqrt"),
        ("lamb", None, "sqrt"),
        ("adagrad", None, "none"),
        ("adagrad", 100.0, "none"),
    ],
)
def test_rule_for_an_optimizer(optimizer, noise_scale, rule):
    choice = rules.for_optimizer(optimizer, 1e-3, 32, 128, noise_scale=noise_scale)
    assert choice.rule == rule
    assert choice.learning_rate == rules.rescale(1e-3, 32, 128, rule=rule, noise_scale=noise_scale)
    assert choice.formula and ("arXiv" in choice.source or rule == "none")
    assert ("noise scale" in choice.holds_where) and choice.why.startswith(kind(optimizer).why)


def test_sgd_without_a_noise_scale_says_why_it_is_not_linear():
    choice = rules.for_optimizer("sgd", 0.1, 256, 1024)
    assert choice.learning_rate == pytest.approx(0.2) and "benchmarks/rule_regret.py" in choice.source
    assert "linear by Goyal" in choice.why and "neither is known here" in choice.why
    assert rules.for_optimizer("adamw", 0.1, 256, 1024).why == kind("adamw").why


def test_the_reason_says_what_the_rule_assumes():
    far, within = (rules.for_optimizer("adamw", 1e-3, 32, 128, noise_scale=noise) for noise in (None, 100.0))
    assert far.holds_where.startswith("for batches far below the noise scale")
    assert within.holds_where.startswith("while the noise scale is about the one given")
    assert "Malladi et al. 2022" in far.why


def test_errors_name_what_is_wrong():
    with pytest.raises(InputError, match=r"batch_size must be finite and > 0, got nan"):
        rules.sqrt(1e-3, 32, math.nan)
    with pytest.raises(InputError, match=r"learning_rate must be finite and > 0, got 0"):
        rules.rescale(0, 32, 64, rule="none")
    with pytest.raises(InputError, match=r"noise_scale must be > 0, got nan"):
        rules.surge(1e-3, 32, 64, noise_scale=math.nan)
    with pytest.raises(InputError, match=r"noise_scale must be > 0, got -1"):
        rules.saturating(1e-3, 32, 64, noise_scale=-1)
    with pytest.raises(InputError, match=r"the rule 'surge' needs noise_scale, got None"):
        rules.rescale(1e-3, 32, 64, rule="surge")
    with pytest.raises(InputError, match=r"rule must be one of \['linear', 'none', .*got 'cubic'"):
        rules.rescale(1e-3, 32, 64, rule="cubic")
    with pytest.raises(InputError, match=r"the rule 'power' needs its exponent"):
        rules.rescale(1e-3, 32, 64, rule="power")
    with pytest.raises(InputError, match=r"exponent is too large for 64/32, got 1e\+300"):
        rules.power(1e-3, 32, 64, exponent=1e300)
    with pytest.raises(InputError, match=r"exponent must be finite and >= 0, got nan"):
        rules.power(1e-3, 32, 64, exponent=math.nan)
    with pytest.raises(InputError, match=r"optimizer must be one of .*'yogi'\], got 'adamm': no learning-rate rule"):
        rules.for_optimizer("adamm", 1e-3, 32, 64)
    with pytest.raises(InputError, match=r"noise_scale must be > 0, got nan"):
        rules.for_optimizer("adagrad", 1e-3, 32, 64, noise_scale=math.nan)
    with pytest.raises(InputError, match='beyond_peak must be "hold" or "fall", got'):
        rules.surge(1e-3, 32, 64, noise_scale=10, beyond_peak="rise")


@pytest.mark.parametrize("bad", [None, "x", [1.0, 2.0]])
def test_a_noise_scale_that_is_no_number_is_refused(bad):
    with pytest.raises(InputError, match="noise_scale must be > 0, got "):
        rules.surge(0.1, 1, 2, noise_scale=bad)
    with pytest.raises(InputError, match="noise_scale must be > 0, got "):
        rules.saturating(0.1, 1, 2, noise_scale=bad)
    if bad is not None:
        with pytest.raises(InputError, match="noise_scale must be > 0, got "):
            rules.for_optimizer("adam", 0.1, 1, 2, noise_scale=bad)


@pytest.mark.filterwarnings("error")
def test_powers_beyond_floats_are_refused():
    one, ten = np.int64(1), np.int64(10)
    for noise in (5.0, math.inf):
        for old, new in ((1, 10), (10, 1)):
            with pytest.raises(InputError, match=f"exponent is too large for {new}/{old}, got 100000.0"):
                rules.saturating(0.1, old, new, noise_scale=noise, exponent=1e5)
    with pytest.raises(InputError, match="exponent is too large for .*10"):
        rules.power(one, ten, one, exponent=np.float64(1e5))
    with pytest.raises(InputError, match="exponent is too large for .*10"):
        rules.power(one, one, ten, exponent=np.float64(1e5))
    assert rules.power(one, one, ten, exponent=np.float64(2)) == 100
