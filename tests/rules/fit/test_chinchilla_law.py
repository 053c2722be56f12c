"""L = E + A/N^α + B/D^β: known surfaces, precision against the best that the noise allows, intervals, refusals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.rules.fit import ChinchillaLaw, chinchilla, chinchilla_constants
from batchlab.rules.fit.huber import huber, least_huber, sum_of_powers

TRUE = (1.7, 400.0, 0.34, 410.0, 0.28)
EXPONENT = 0.28 / 0.62


def surface(sizes=8, lengths=10, batch=2.0**16):
    """Shuai et al.'s check: 8 N x 10 D, a batch far below B_crit = 300·D^0.47, so that D_eff = D/(1 + B/B_crit)."""
    n, d = np.meshgrid(np.geomspace(1e8, 3e9, sizes), np.geomspace(2e9, 3e11, lengths), indexing="ij")
    n, d = n.ravel(), d.ravel()
    e, a, alpha, b, beta = TRUE
    effective = d / (1 + batch / (300 * d**0.47))
    return n, d, e + a / n**alpha + b / effective**beta


def exponent(law):
    return law.beta / (law.alpha + law.beta)


def standard_error(n, d, noise):
    """Of β/(α + β) by least squares in ln L, which for normal noise is the least that any unbiased fit can have."""
    e, a, alpha, b, beta = TRUE
    parts = np.stack([np.full(len(n), e), a / n**alpha, b / d**beta])
    total = parts.sum(0)
    slopes = np.stack([parts[0], parts[1], -parts[1] * np.log(n), parts[2], -parts[2] * np.log(d)]) / total
    gradient = np.array([0, 0, -beta, 0, alpha]) / (alpha + beta) ** 2
    return noise * math.sqrt(gradient @ np.linalg.inv(slopes @ slopes.T) @ gradient)


def test_the_surface_without_noise_comes_back():
    n, d, _ = surface()
    e, a, alpha, b, beta = TRUE
    law = chinchilla_constants(n, d, e + a / n**alpha + b / d**beta)
    assert tuple(law) == pytest.approx(TRUE, rel=1e-6)
    assert exponent(chinchilla_constants(*surface())) == pytest.approx(EXPONENT, abs=0.01)


@pytest.mark.parametrize("noise", [0.002, 0.01])
def test_noise_moves_the_exponent_by_what_it_must(noise):
    """20 seeds: the root mean square error against the least standard error, 0.0065 and 0.032.

    A fit that stops early near its start is far below it: scipy's L-BFGS from the true constants, at its usual stopping
    rule, is at most some 0.0002 and 0.002 off. Huber's loss far from δ is near that of absolute errors, whose standard
    error is up to √(π/2) larger; a root mean square of 20 lies within a factor 0.5 to 1.5, three standard errors.
    """
    n, d, losses = surface()
    errors = []
    for seed in range(20):
        noisy = losses * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
        errors.append(exponent(chinchilla_constants(n, d, noisy)) - EXPONENT)
    least = standard_error(n, d, noise)
    assert least == pytest.approx(3.227 * noise, rel=1e-3)
    assert 0.5 * least < math.sqrt(np.mean(np.square(errors))) < 1.5 * math.sqrt(math.pi / 2) * least, errors


def test_nothing_nearby_has_less_huber_loss():
    n, d, losses = surface()
    noisy = losses * np.exp(0.01 * np.random.default_rng(0).standard_normal(80))
    law = chinchilla_constants(n, d, noisy)

    def objective(e, a, alpha, b, beta):
        return huber(np.log(e + a / n**alpha + b / d**beta) - np.log(noisy), 1e-3)

    best, rng = objective(*law), np.random.default_rng(1)
    for scale in (1e-5, 1e-3, 1e-1):
        for _ in range(200):
            assert objective(*(np.array(law) * np.exp(scale * rng.standard_normal(5)))) >= best * (1 - 1e-9)


def test_what_a_compute_is_best_spent_on():
    n, d, _ = surface(4, 4)
    e, a, alpha, b, beta = TRUE
    law = chinchilla(n, d, e + a / n**alpha + b / d**beta, draws=2)
    shape = law.best(compute=1e21)
    assert 6 * shape.params * shape.tokens == pytest.approx(1e21, rel=1e-12)
    least = law.loss(params=shape.params, tokens=shape.tokens)
    for factor in (0.9, 1.1):
        assert law.loss(params=factor * shape.params, tokens=shape.tokens / factor) > least
    assert law.best(compute=1e23).params / shape.params == pytest.approx(100**law.params_exponent.value, rel=1e-9)
    assert law.params_exponent.value + law.tokens_exponent.value == pytest.approx(1, abs=1e-12)


@settings(max_examples=8)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_units_of_n_and_d_change_the_prefactors_alone(n_unit, d_unit):
    n, d, losses = surface(3, 4)
    law = chinchilla_constants(n, d, losses)
    other = chinchilla_constants(n_unit * n, d_unit * d, losses)
    assert (other.E, other.alpha, other.beta) == pytest.approx((law.E, law.alpha, law.beta), rel=1e-5)
    assert pytest.approx(law.A * n_unit**law.alpha, rel=1e-4) == other.A


def test_errors_on_what_was_held_out_are_those_of_a_refit():
    n, d, losses = surface(3, 4)
    noisy = losses * np.exp(0.002 * np.random.default_rng(0).standard_normal(len(n)))
    law = chinchilla(n, d, noisy, runs=[f"{a:g}" for a in d], draws=2)
    rest = d != d[1]
    without = chinchilla_constants(n[rest], d[rest], noisy[rest])
    for place in np.flatnonzero(~rest):
        e, a, alpha, b, beta = without
        fitted = e + a / n[place] ** alpha + b / d[place] ** beta
        assert law.held_out[place] == pytest.approx(math.log(noisy[place] / fitted), abs=2e-6)
    assert law.leave_one_out == pytest.approx(np.mean(np.abs(law.held_out)))
    assert ChinchillaLaw.from_json(law.to_json()) == law


def test_a_run_far_off_hardly_counts():
    n, d, losses = surface()
    noisy = losses * np.exp(0.0005 * np.random.default_rng(0).standard_normal(80))
    spoilt = noisy.copy()
    spoilt[37] *= 1.5
    clean, law = chinchilla_constants(n, d, noisy), chinchilla_constants(n, d, spoilt)
    assert abs(exponent(law) - exponent(clean)) < standard_error(n, d, 0.0005)


@pytest.mark.slow
def test_the_bootstrap_covers_nearly_at_its_rate():
    """40 tables of 30 runs, 1 % noise, 60 draws, 90 %: the exponent's interval in 71 to 100 %, four standard errors."""
    n, d, _ = surface(5, 6)
    e, a, alpha, b, beta = TRUE
    losses, inside = e + a / n**alpha + b / d**beta, 0
    for seed in range(40):
        noisy = losses * np.exp(0.01 * np.random.default_rng(seed).standard_normal(30))
        found = chinchilla(n, d, noisy, draws=60, seed=seed, coverage=0.9).params_exponent
        inside += found.low <= EXPONENT <= found.high
    assert inside / 40 >= 0.71, inside / 40


def test_terms_that_cannot_be_told_are_noted():
    n, d, _ = surface(4, 5)
    law = chinchilla(n, d, 400 / n**0.34 + 410 / d**0.28, draws=2)
    assert law.note == "E cannot be told from 0: below 0.1 % of the least loss"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": [1e8] * 12}, "params must hold at least 3 different values, got 1"),
        ({"tokens": [1e9, 2e9] * 6}, "tokens must hold at least 3 different values, got 2"),
        ({"tokens": "params"}, "params and tokens must not move together, as at one number of tokens a parameter"),
        ({"loss": [math.nan] * 12}, "loss must be finite and > 0, got nan"),
        ({"loss": [3.0] * 11}, "params, tokens and loss must be of one length, got .12, 12, 11."),
        ({"params": [0.0] * 12}, "params must be finite and > 0, got 0.0"),
        ({"runs": ["a"]}, "runs and loss must be of one length, got 1 and 12"),
        ({"delta": 0.0}, "delta must be finite and > 0, got 0.0"),
        ({"draws": 1}, "draws must be an integer of at least 2, got 1"),
        ({"loss": "rising"}, "loss must fall with "),
        (
            {"loss": [3.0] * 12},
            "loss must fall with params: what falls is below 0.1 % of the least loss, so no exponen",
        ),
    ],
)
def test_runs_that_do_not_tell_the_law_are_refused(change, message):
    n, d, losses = surface(3, 4)
    if change.get("tokens") == "params":
        change = {"tokens": 20 * n}
        n = n * np.linspace(1, 1.0001, 12)
        change["tokens"] = 20 * n
    if change.get("loss") == "rising":
        change = {"loss": 2 + 1e-3 * (n / 1e8) ** 0.3 + 1e-3 * (d / 1e9) ** 0.3}
    given_ = {"params": n, "tokens": d, "loss": losses, "draws": 2} | change
    with pytest.raises(InputError, match=message):
        chinchilla(**given_)


def test_fewer_than_six_runs_are_refused():
    with pytest.raises(InputError, match="loss must hold at least 6 runs for five constants, got 5"):
        chinchilla([1e8, 2e8, 3e8, 4e8, 5e8], [1e9, 5e9, 2e9, 7e9, 3e9], [3.0, 2.9, 2.8, 2.7, 2.6])


def test_huber_is_square_near_and_straight_far():
    assert huber(np.array([0.5]), 1.0) == 0.125 and huber(np.array([3.0]), 1.0) == 2.5
    assert huber(np.array([1.0]), 1.0) == huber(np.array([-1.0]), 1.0) == 0.5


def test_a_sum_of_powers_has_the_slope_of_its_differences():
    rng = np.random.default_rng(0)
    model, at = sum_of_powers(rng.normal(size=(3, 5, 4)), rng.normal(size=5)), rng.normal(size=4)
    value, jacobian = model(at)
    for k in range(4):
        step = np.zeros(4)
        step[k] = 1e-6
        difference = (model(at + step)[0] - model(at - step)[0]) / 2e-6
        assert jacobian[:, k] == pytest.approx(difference, abs=1e-8)
    assert value.shape == (5,)


def test_a_narrow_valley_is_followed_to_its_end():
    """y = exp(c₀ + c₁x) with x from 20.0 to 20.1: c₀ and c₁ move together 400 times further than across."""
    x = np.linspace(20.0, 20.1, 9)
    model = sum_of_powers(np.stack([np.ones(9), x], 1)[None], 3.0 - 0.5 * x)
    (_, constants), *_ = least_huber(model, [np.array([0.0, 0.0])], 1e-3)
    assert constants == pytest.approx([3.0, -0.5], rel=1e-5)
