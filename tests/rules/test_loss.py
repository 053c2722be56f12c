"""The loss laws: the root of the implicit law, its limits and inverses, published numbers, units and refusals."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.rules import batch, loss
from batchlab.rules.law_loss import ChinchillaConstants, LawLoss, LossCurve, TrajectoryConstants
from batchlab.rules.token_batch import TokenBatch

SU = loss.published_constants("trajectory_loss")
NAMES = ("kaplan_loss", "trajectory_loss")


def drawn(rng):
    """Constants, N, S, B over the range that any fit may give."""
    constants = TrajectoryConstants(
        alpha_N=rng.uniform(0.03, 0.3),
        N_c=10 ** rng.uniform(6, 15),
        alpha_S=rng.uniform(0.3, 1.2),
        S_c=10 ** rng.uniform(1, 5),
        alpha_B=rng.uniform(0.1, 0.5),
        B_star=10 ** rng.uniform(4, 10),
    )
    return constants, 10 ** rng.uniform(4, 11), 10 ** rng.uniform(1, 6), 10 ** rng.uniform(3, 8)


def right_side(c, params, steps, batch_tokens, at):
    """(e) as it is printed."""
    slower = 1 + c.B_star / (batch_tokens * at ** (1 / c.alpha_B))
    return (c.N_c / params) ** c.alpha_N + (c.S_c / steps * slower) ** c.alpha_S


def test_the_root_solves_the_law_and_is_the_only_one():
    """Sheet check 1, over 1000 draws: the residual is below 1e-10 of the loss, and has one sign on either side."""
    rng = np.random.default_rng(77)
    for _ in range(1000):
        c, params, steps, size = drawn(rng)
        root = loss.kaplan(params=params, steps=steps, batch_tokens=size, constants=c).nats
        residual = root - right_side(c, params, steps, size, root)
        assert abs(residual) < 1e-10 * max(1.0, root)
        least = (c.N_c / params) ** c.alpha_N
        below = np.geomspace(1e-3, 1 - 1e-6, 20) * root
        above = root * np.geomspace(1 + 1e-6, 1e3, 20)
        assert root > least
        assert all(at < right_side(c, params, steps, size, at) for at in below)
        assert all(at > right_side(c, params, steps, size, at) for at in above)


def test_limits_in_batch_and_steps():
    """Sheet check 2: B = ∞ is (d) with S_min = S, S = ∞ is (a)."""
    rng = np.random.default_rng(2)
    for _ in range(200):
        c, params, steps, _ = drawn(rng)
        least = loss.least_loss(params=params, constants=c).nats
        unlimited = loss.kaplan(params=params, steps=steps, batch_tokens=1e300, constants=c).nats
        assert unlimited == pytest.approx(least + (c.S_c / steps) ** c.alpha_S, rel=1e-9)
        ended = loss.kaplan(params=params, steps=1e300, batch_tokens=1e5, constants=c).nats
        assert ended == pytest.approx((c.N_c / params) ** c.alpha_N, rel=1e-9)


@given(st.integers(0, 2**31), st.floats(1.01, 100.0))
def test_more_steps_more_batch_and_a_larger_model_never_raise_the_loss(seed, times):
    c, params, steps, size = drawn(np.random.default_rng(seed))
    at = {"params": params, "steps": steps, "batch_tokens": size}
    here = loss.kaplan(**at, constants=c).nats
    for name in ("steps", "batch_tokens", "params"):
        more = loss.kaplan(**{**at, name: at[name] * times}, constants=c).nats
        assert more <= here * (1 + 1e-13)
    assert loss.kaplan(**{**at, "steps": steps * times}, constants=c).nats < here


@pytest.mark.parametrize(
    ("batch_tokens", "wanted"),
    [
        (5e5, (5.1091, 3.6271, 3.2086)),
        (2e6, (5.0023, 3.5178, 3.1674)),
        (8e6, (4.9713, 3.4822, 3.1549)),
        (1e12, (4.9605, 3.4692, 3.1504)),
    ],
)
def test_the_sheets_numbers(batch_tokens, wanted):
    """Sheet check 3: N = 6e7 at S = 1e3, 1e4, 1e5."""
    curve = loss.trajectory(params=6e7, steps=[1e3, 1e4, 1e5], batch_tokens=batch_tokens, constants="trajectory_loss")
    assert curve.losses == pytest.approx(wanted, abs=5.1e-5)  # to the figures that are printed


def test_a_curve_is_its_points():
    steps = np.array([100_000, 10, 5_000])
    curve = loss.trajectory(params=1e8, steps=steps, batch_tokens=2**19, constants=SU)
    assert curve.steps == (100_000.0, 10.0, 5_000.0)
    single = [loss.kaplan(params=1e8, steps=s, batch_tokens=2**19, constants=SU).nats for s in curve.steps]
    assert list(curve.losses) == single


@given(st.integers(0, 2**31))
def test_steps_to_a_loss_invert_the_loss(seed):
    c, params, steps, size = drawn(np.random.default_rng(seed))
    reached = loss.kaplan(params=params, steps=steps, batch_tokens=size, constants=c).nats
    given = {"loss": reached, "params": params, "constants": c}
    excess = reached / loss.least_loss(params=params, constants=c).nats - 1
    if excess < 1e-6:  # the difference has lost its digits
        return
    again = loss.steps_to_loss(**given, batch_tokens=size)
    assert again == pytest.approx(steps, rel=1e-13 / excess / c.alpha_S + 1e-12)
    s_min, e_min, run = loss.least_steps(**given), loss.least_tokens(**given), loss.balanced_run(**given)
    if 1e-3 < size / run.batch.tokens < 1e3:  # elsewhere the differences lose their digits
        assert (again / s_min - 1) * (again * size / e_min - 1) == pytest.approx(1, rel=1e-9)  # (c)
    assert run.batch.tokens == pytest.approx(e_min / s_min, rel=1e-12)
    assert run.steps == pytest.approx(2 * s_min, rel=1e-12) and run.tokens == pytest.approx(2 * e_min, rel=1e-12)


def test_no_run_is_better_than_the_balanced_one_in_both_steps_and_tokens():
    given = {"loss": 3.3, "params": 6e7, "constants": "trajectory_loss"}
    run = loss.balanced_run(**given)
    for size in run.batch.tokens * np.geomspace(1e-2, 1e2, 9):
        steps = loss.steps_to_loss(**given, batch_tokens=size)
        product = (steps / run.steps) * (steps * size / run.tokens)
        assert product >= 1 - 1e-12  # S·E is least at B_crit


def test_critical_batch_is_that_of_the_batch_laws():
    for name, short in zip(NAMES, ("kaplan", "trajectory"), strict=True):
        ours, theirs = loss.critical_batch(loss=3.0, constants=name), batch.kaplan_cbs(loss=3.0, constants=short)
        assert ours.tokens == pytest.approx(theirs.tokens, rel=1e-13) and ours.law == theirs.law == f"{short}_cbs"
    halved = loss.critical_batch(loss=2.0, constants="kaplan_loss").tokens
    lower = loss.critical_batch(loss=2.0 * 0.87, constants="kaplan_loss").tokens
    assert lower / halved == pytest.approx(2, rel=0.04)  # Kaplan et al.: doubles for every 13 % decrease


def test_ten_percent_above_the_floor_is_where_compute_is_best_spent():
    """Kaplan et al., equation B.5: at a given compute 6·N·S·B_crit, L = (1 + α_N/α_S)·L(N) at the best N."""
    c = loss.published_constants("kaplan_loss")
    compute = 1e19

    def at(params):  # L with S = C/(6·N·B_crit(L)) for S_min: B.3
        low = high = (c.N_c / params) ** c.alpha_N
        high *= 1e3
        for _ in range(200):
            middle = math.sqrt(low * high)
            tokens = loss.critical_batch(loss=middle, constants=c).tokens
            right = (c.N_c / params) ** c.alpha_N + (6 * params * tokens * c.S_c / compute) ** c.alpha_S
            low, high = (low, middle) if middle > right else (middle, high)
        return low

    sizes = np.geomspace(1e6, 1e10, 4001)
    losses = [at(params) for params in sizes]
    best = int(np.argmin(losses))
    assert 0 < best < len(sizes) - 1
    floor = loss.least_loss(params=sizes[best], constants=c).nats
    assert losses[best] / floor - 1 == pytest.approx(0.077 / 0.76, rel=0.02)


def test_diloco_is_near_the_published_losses():
    """35M, 550M and 2.4B, data-parallel and M = 1, 2, 4, 8; within the residual of 0.012 that the source states."""
    table = {
        35e6: (3.485, 3.482, 3.508, 3.554, 3.621),
        90e6: (3.167, 3.162, 3.182, 3.213, 3.265),
        180e6: (2.950, 2.943, 2.957, 2.981, 3.019),
        335e6: (2.784, 2.777, 2.788, 2.808, 2.841),
        550e6: (2.653, 2.645, 2.657, 2.673, 2.698),
        1.3e9: (2.460, 2.451, 2.464, 2.472, 2.493),
        2.4e9: (2.326, 2.317, 2.323, 2.332, 2.351),
    }
    for fit in ("joint", "independent"):
        missed = []
        for params, row in table.items():
            found = [loss.diloco(params=params)]
            found += [loss.diloco(params=params, algorithm="diloco", replicas=m, fit=fit) for m in (1, 2, 4, 8)]
            assert all(each.outside == "" and each.law == "diloco_loss" for each in found)
            missed += [abs(math.log(each.nats / real)) for each, real in zip(found, row, strict=True)]
        assert np.mean(missed) < 0.012


def test_diloco_is_too_low_beyond_its_range_by_what_it_says():
    measured = {4e9: (2.219, 2.220, 2.230), 1e10: (2.086, 2.086, 2.096)}
    over = {4e9: (0.007, 0.019), 1e10: (0.035, 0.049)}
    for params, row in measured.items():
        for replicas, real in zip((1, 2, 4), row, strict=True):
            found = loss.diloco(params=params, algorithm="diloco", replicas=replicas)
            assert "beyond 3.5e+07 to 2.4e+09" in found.outside
            assert over[params][0] < real / found.nats - 1 < over[params][1]


def test_diloco_parametric_is_its_form_in_any_unit():
    constants = {"A": 40.0, "alpha": -0.16, "beta": 0.001, "C": 1.0}
    plain = loss.diloco_parametric(params=1e9, replicas=2, **constants)
    assert plain.nats == pytest.approx(40.0 * 1e9 ** (-0.16 + 0.002) + 1.0, rel=1e-12)
    at_unit = loss.diloco_parametric(params=3e8, replicas=4, params_unit=3e8, **constants)
    assert at_unit.nats == pytest.approx(41.0, rel=1e-12)


def test_chinchilla_and_what_a_large_batch_costs():
    """Doubling the batch at the critical one is the same as two thirds of the tokens; a small batch costs nothing."""
    own = ChinchillaConstants(1.7, 400.0, 0.34, 410.0, 0.28)
    run = {"params": 1e9, "tokens": 2e10}
    base = loss.chinchilla(**run, constants=own)
    assert base.nats == pytest.approx(1.7 + 400 / 1e9**0.34 + 410 / 2e10**0.28, rel=1e-13)
    assert loss.chinchilla(**run, constants=(1.7, 400.0, 0.34, 410.0, 0.28)) == base
    crit = TokenBatch(1e6)
    tiny = loss.batch_adjusted(**run, batch_tokens=1e-3, critical_batch=crit, constants=own)
    assert tiny.nats == pytest.approx(base.nats, rel=1e-9)
    for times in (0.5, 1.0, 2.0):
        large = loss.batch_adjusted(**run, batch_tokens=times * 1e6, critical_batch=crit, constants=own)
        fewer = loss.chinchilla(params=1e9, tokens=2e10 / (1 + times), constants=own)
        assert large.nats == pytest.approx(fewer.nats, rel=1e-13)
    published = batch.power_lines_crit(least_tokens=2e10)
    said = loss.batch_adjusted(**run, batch_tokens=2**19, critical_batch=published)
    assert said.law == "chinchilla_loss" and said.outside == ""
    assert said.nats > loss.chinchilla(**run).nats


def test_beyond_what_a_law_was_fitted_over_it_says_so():
    run = {"steps": 1e5, "batch_tokens": 2**19}
    assert loss.kaplan(params=1e8, **run, constants="kaplan_loss").outside == ""
    assert "params of 7e+10" in loss.kaplan(params=7e10, **run, constants="kaplan_loss").outside
    early = loss.kaplan(params=1e8, steps=10, batch_tokens=2**19, constants="kaplan_loss")
    assert f"a loss of {early.nats:.3g} lies beyond 2 to 6" in early.outside
    curve = loss.trajectory(params=1e8, steps=[10, 1e5], batch_tokens=2**19, constants="kaplan_loss")
    assert "a loss of" in curve.outside and curve.law == "kaplan_loss"
    assert "params" in loss.least_loss(params=7e10, constants="kaplan_loss").outside
    assert "loss of 1.5" in loss.critical_batch(loss=1.5, constants="kaplan_loss").outside
    assert loss.kaplan(params=7e10, **run, constants=SU).outside == ""  # your own constants


def test_nouns_go_through_json_and_count_as_numbers():
    curve = loss.trajectory(params=1e8, steps=[1, 2], batch_tokens=2**19, constants="kaplan_loss")
    found = loss.kaplan(params=np.float32(1e8), steps=np.int64(7), batch_tokens=2**19, constants="kaplan_loss")
    own = TrajectoryConstants(*np.float32([0.076, 1e14, 0.67, 2600, 0.2, 1.7e8]))
    for noun in (curve, found, own):
        assert type(noun).from_json(noun.to_json()) == noun
    assert isinstance(curve, LossCurve) and isinstance(found, LawLoss) and float(found) == found.nats


RUN = {"params": 1e8, "steps": 1e4, "batch_tokens": 2e6}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss.kaplan(**RUN), "constants"),
        (lambda: loss.kaplan(1e8, 1e4, 2e6, "kaplan_loss"), "positional"),
    ],
)
def test_constants_have_no_default_and_numbers_have_names(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss.kaplan(**RUN, constants="kaplan"), 'constants must be "kaplan_loss", "trajectory_loss" or Traj'),
        (lambda: loss.kaplan(**RUN, constants=(1, 2, 3, 4, 5, 6)), "or TrajectoryConstants, got \\(1, 2"),
        (lambda: loss.kaplan(**RUN, constants=["kaplan_loss"]), "or TrajectoryConstants, got \\['kaplan_loss'\\]"),
        (lambda: loss.kaplan(**{**RUN, "steps": 0}, constants=SU), "steps must be finite and > 0, got 0"),
        (lambda: loss.kaplan(**{**RUN, "steps": math.inf}, constants=SU), "steps must be finite and > 0, got inf"),
        (lambda: loss.kaplan(**{**RUN, "params": math.nan}, constants=SU), "params must be finite and > 0, got nan"),
        (lambda: loss.kaplan(**{**RUN, "batch_tokens": "2M"}, constants=SU), "batch_tokens must be finite and > 0"),
        (
            lambda: loss.kaplan(**{**RUN, "batch_tokens": 512}, constants="kaplan_loss"),
            "at least one sequence of 1024 under kaplan_loss, got 512: are these sequences",
        ),
        (
            lambda: loss.kaplan(**{**RUN, "params": 60}, constants="trajectory_loss"),
            "params must be a plain count for trajectory_loss.*are these thousands, millions",
        ),
        (lambda: loss.trajectory(**{**RUN, "steps": []}, constants=SU), "a list of at least one number"),
        (lambda: loss.trajectory(**{**RUN, "steps": [[1, 2]]}, constants=SU), "shape \\(1, 2\\)"),
        (lambda: loss.trajectory(**{**RUN, "steps": ["a"]}, constants=SU), "steps must be a list of numbers"),
        (lambda: loss.trajectory(**{**RUN, "steps": [1, -1]}, constants=SU), "steps must be finite and > 0, got -1"),
        (
            lambda: loss.least_steps(loss=3.0, params=6e7, constants="trajectory_loss"),
            "loss must exceed 3.06368 nats a token, the least that 6e\\+07 parameters reach with any number of steps "
            "under trajectory_loss, got 3.0",
        ),
        (
            lambda: loss.steps_to_loss(loss=1.0, params=6e7, batch_tokens=1e6, constants=SU),
            "under your constants, got 1.0",
        ),
        (lambda: loss.balanced_run(loss=math.nan, params=6e7, constants=SU), "loss must be finite and > 0, got nan"),
        (lambda: loss.critical_batch(loss=0, constants=SU), "loss must be finite and > 0, got 0"),
        (lambda: TrajectoryConstants(0.076, 1.5e14, -0.67, 2600, 0.2, 1e8), "alpha_S must be finite and > 0"),
        (
            lambda: loss.critical_batch(loss=1e-3, constants=TrajectoryConstants(1, 1, 1, 1, 1e-3, 1)),
            "a critical batch of e\\^6908, beyond what a float holds",
        ),
        (
            lambda: loss.kaplan(**{**RUN, "steps": 1.0}, constants=TrajectoryConstants(1, 1, 500, 1e9, 1, 1)),
            "a loss of e\\^.*, beyond what a float holds",
        ),
        (lambda: loss.chinchilla(params=7.0, tokens=1e9), "params must be a plain count for chinchilla_loss"),
        (lambda: loss.chinchilla(params=7e9, tokens=1.4), "tokens must be a plain count for chinchilla_loss"),
        (lambda: loss.chinchilla(params=1e9, tokens=1e9, constants="hoffmann"), "or \\(E, A, α, B, β\\)"),
        (
            lambda: loss.batch_adjusted(params=1e9, tokens=2e10, batch_tokens=1e6, critical_batch=1e6),
            "critical_batch must be a TokenBatch",
        ),
        (
            lambda: loss.batch_adjusted(
                params=1e9, tokens=2e10, batch_tokens=1e6, critical_batch=batch.data_cbs(tokens=2e10)
            ),
            "twice the least tokens .* got that of data_cbs: the batch that costs 20 % more",
        ),
        (
            lambda: loss.batch_adjusted(
                params=1e9, tokens=2e10, batch_tokens=1e6, critical_batch=TokenBatch(1e6, "your runs, fixed data")
            ),
            "twice the least tokens .* got that of your runs, fixed data$",
        ),
        (
            lambda: loss.batch_adjusted(params=1e9, tokens=1e6, batch_tokens=2e6, critical_batch=TokenBatch(1e6)),
            "tokens must be at least one batch of 2e\\+06, got 1e\\+06",
        ),
        (lambda: loss.diloco(params=1e9, replicas=2), 'replicas is for algorithm="diloco"'),
        (
            lambda: loss.diloco_parametric(params=1e9, replicas=1, A=1.0, alpha=math.nan, beta=0.0, C=1.0),
            "alpha must be finite, got nan",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_every_published_law_is_offered():
    for name, run in itertools.product(NAMES, ({"params": 1e7}, {"params": 1e9})):
        assert loss.kaplan(**run, steps=1e4, batch_tokens=1e6, constants=name).law == name
