"""The fit of the loss-trajectory law: the sheet's round trips, its order, held-out prediction, and refusals."""

import math
from dataclasses import replace

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.rules import loss
from batchlab.rules.fit import LossRun, TrajectoryLaw, extrapolated_final_losses, fit_laws, trajectory
from batchlab.rules.fit.loss_runs import curves
from batchlab.rules.fit.trajectory_stages import size_line, step_line
from batchlab.rules.law_loss import TrajectoryConstants
from tests.rules.fit.trajectory_studies import BATCHES, SIZES, STEPS, TRUE, curve_error, exact, floor, off, study

SMALL = {"sizes": SIZES[:3], "batches": BATCHES[::3], "steps": STEPS[::3]}


def test_without_noise_all_six_come_back():
    """Sheet check 4: within 0.15 % by the stages alone; the joint fit gives them to rounding."""
    law = trajectory(study(), degree=None, draws=20)
    assert np.abs(off(law.stages)).max() < 1.5e-3
    assert np.abs(off(law.constants)).max() < 1e-9
    assert law.deviation < 1e-12 and law.leave_one_out < 1e-12 and law.note == ""


def test_cubic_smoothing_biases_the_critical_batch_and_a_sixth_degree_does_not():
    """The sheet measured 13 % for B_*; here, with stage 2 weighed and over all models, 9.7 %."""
    biased, fair = (trajectory(study(), degree=degree, joint=False, draws=2) for degree in (3, 6))
    assert off(biased.constants)[5] < -0.05
    assert np.abs(off(fair.constants)).max() < 4e-3


@pytest.fixture(scope="module")
def noisy():
    """The sheet's nine studies with 0.5 % noise."""
    return [trajectory(study(0.005, seed), draws=2) for seed in range(9)]


def test_with_noise_exponents_and_predictions_hold_and_prefactors_do_not(noisy):
    """Sheet check 4: exponents and S_c within 4 %; N_c off by 34 % median, 91 % worst; predictions close."""
    errors = np.abs([off(law.stages) for law in noisy])
    alpha_n, n_c, alpha_s, s_c, alpha_b, _ = errors.max(axis=0)
    assert max(alpha_n, alpha_s, s_c, alpha_b) < 0.04
    assert np.median(errors[:, 1]) == pytest.approx(0.34, abs=0.005) and n_c == pytest.approx(0.91, abs=0.005)
    for law in noisy:
        for at in (3.0, 3.5, 4.0):
            critical = loss.critical_batch(loss=at, constants=law.stages).tokens
            assert abs(critical / (TRUE.B_star / at ** (1 / TRUE.alpha_B)) - 1) < 0.12
        assert curve_error(law.stages) < 0.02


def test_the_joint_fit_predicts_several_times_better(noisy):
    """The sheet: 0.46 % median by the stages, 0.13 % by a joint fit, 0.3 % at worst."""
    stages, joint = (
        [curve_error(each) for each in column] for column in zip(*((f.stages, f.constants) for f in noisy))
    )
    assert np.median(joint) < 0.0013 and max(joint) < 0.003
    assert np.median(joint) < np.median(stages) / 3


def test_the_root_at_each_point_is_unbiased_where_the_right_side_at_the_measured_loss_is_not(noisy):
    """The sheet's own joint residual leaves B_* too low in all nine; at the root the errors have both signs."""
    ours = np.array([off(law.constants)[5] for law in noisy])
    theirs = np.array([off(_right_side_fit(study(0.005, seed), law)) for seed, law in enumerate(noisy)])[:, 5]
    assert (theirs < 0).all() and theirs.mean() < -0.04
    assert abs(ours.mean()) < 4 * ours.std(ddof=1) / 3 and abs(ours.mean()) < 0.03


def _right_side_fit(runs, law):
    """Least squares of ln(right side of (e) at the measured L) - ln L, as the sheet has it."""
    from scipy.optimize import least_squares

    rows = [(r.params, r.batch_tokens, s, y) for r in runs for s, y in zip(r.steps, r.losses, strict=True)]
    n, b, s, y = np.array(rows).T
    ended = np.array([(r.params, r.final_loss) for r in runs if r.final_loss]).T

    def errors(logs):
        c = TrajectoryConstants(*np.exp(logs))
        right = (c.N_c / n) ** c.alpha_N + (c.S_c / s * (1 + c.B_star / (b * y ** (1 / c.alpha_B)))) ** c.alpha_S
        return np.concatenate([np.log(right / y), c.alpha_N * np.log(c.N_c / ended[0]) - np.log(ended[1])])

    found = least_squares(errors, np.log(list(vars(law.stages).values())), x_scale=[0.01, 1, 0.01, 0.1, 0.01, 1])
    return TrajectoryConstants(*np.exp(found.x))


def test_without_the_critical_batch_the_steps_are_misread():
    """Sheet check 5: S for S_min shifts α_S and S_c by more than 10 %, and the curve of 1e9."""
    runs = study()
    kept, ones = curves(runs, degree=None, after_warmups=5.0), np.ones(len(runs))
    sizes = size_line(runs, ones)
    wrong = step_line(runs, kept, sizes, None, ones, 0.02)
    assert wrong.exponent / TRUE.alpha_S - 1 < -0.10
    assert math.exp(wrong.scale) / TRUE.S_c - 1 > 0.10
    found = replace(TRUE, alpha_S=wrong.exponent, S_c=math.exp(wrong.scale), B_star=1e-300)
    assert curve_error(found) > 0.04


def test_the_largest_model_is_predicted_by_the_others():
    law = trajectory(study(0.005, 3), draws=20)
    assert law.held_out_params == 6e7
    without = [run for run in study(0.005, 3) if run.params < 6e7]
    others = trajectory(without, draws=2).constants
    measured = [run for run in study(0.005, 3) if run.params == 6e7 and run.steps]
    errors = [
        np.abs(
            np.array(loss.trajectory(params=6e7, steps=STEPS, batch_tokens=r.batch_tokens, constants=others).losses)
            / np.array(r.losses)
            - 1
        )
        for r in measured
    ]
    assert law.leave_one_out == pytest.approx(np.mean(errors), rel=1e-6)
    assert 0.003 < law.leave_one_out < 0.006  # E|noise| of 0.5 % is 0.4 %


def test_final_losses_come_from_the_shape_where_nothing_flattened():
    """Of runs that end at most a tenth of the way: up to 3e4 updates, 5 to 25 % above L(N)."""
    steps = tuple(np.geomspace(300, 3e4, 40).tolist())
    runs = study(steps=steps, ended=False)
    assert min(runs[-1].losses) / floor(6e7) > 1.05
    ended = extrapolated_final_losses(runs)
    assert ended[: len(runs)] == runs
    for run in ended[len(runs) :]:
        assert run.final_loss == pytest.approx(floor(run.params), rel=1e-7) and not run.steps
    noisy = trajectory(study(0.005, 1, steps=steps, ended=False), extrapolate=True, draws=50)
    assert curve_error(noisy.constants) < 0.01
    assert noisy.alpha_N.low < TRUE.alpha_N < noisy.alpha_N.high


def test_a_final_loss_that_was_measured_is_kept():
    runs = [*study(ended=False), LossRun(1e6, 1e6, final_loss=4.2)]
    assert [run.final_loss for run in extrapolated_final_losses(runs) if run.params == 1e6 and run.final_loss] == [4.2]


def test_the_warm_up_is_dropped_by_its_rule():
    """Losses before five times the warm-up may be anything: they change nothing."""
    early = (10.0, 200.0, 500.0)
    runs = [
        replace(run, steps=early + run.steps, losses=(9e9, 20.0, 30.0) + run.losses, warmup_steps=100.0)
        if run.steps
        else run
        for run in study(steps=tuple(np.geomspace(501, 3e5, 40).tolist()))
    ]
    plain = study(steps=tuple(np.geomspace(501, 3e5, 40).tolist()))
    assert trajectory(runs, draws=5) == trajectory(plain, draws=5)
    with pytest.raises(InputError, match=r"runs\[0\] has 7 points after 1000 times its warm-up of 100 steps"):
        trajectory(runs, after_warmups=1000.0)


def test_order_and_units_of_runs_do_not_matter():
    """Tokens counted in thousands give B_* in thousands; shuffled runs give the same law."""
    runs = study(0.005, 5, **SMALL)
    law = trajectory(runs, draws=20)
    again = trajectory([runs[k] for k in np.random.default_rng(0).permutation(len(runs))], draws=20)
    assert list(vars(again.constants).values()) == pytest.approx(list(vars(law.constants).values()), rel=1e-9)
    thousands = trajectory([replace(run, batch_tokens=run.batch_tokens / 1000) for run in runs], draws=20)
    assert thousands.B_star.value == pytest.approx(law.B_star.value / 1000, rel=1e-7)
    assert thousands.alpha_B.low == pytest.approx(law.alpha_B.low, rel=1e-6)


def test_the_law_answers_and_goes_through_json():
    law = trajectory(study(0.005, 2), draws=40, coverage=0.9)
    assert TrajectoryLaw.from_json(law.to_json()) == law
    said = law.loss(params=1e9, steps=1e4, batch_tokens=5e5)
    assert said.value == loss.kaplan(params=1e9, steps=1e4, batch_tokens=5e5, constants=law.constants).nats
    assert said.low < said.value < said.high and said.coverage == 0.9
    assert "params of 1e+09 lie beyond 1e+06 to 6e+07" in said.method
    assert "lie beyond" not in law.loss(params=3e7, steps=1e4, batch_tokens=2**18).method
    critical = law.critical_batch(loss=3.5)
    assert critical.tokens == law.critical_batch_tokens(loss=3.5).value
    assert "losses of 2 lie beyond" in law.critical_batch(loss=2.0).outside
    curve = law.curve(params=3e7, steps=[1e3, 1e4], batch_tokens=2**18)
    assert curve.losses == pytest.approx(exact(3e7, 2.0**18, (1e3, 1e4)), rel=0.01) and curve.outside == ""
    assert sorted({level.params for level in law.levels}) == pytest.approx(SIZES)
    assert loss.batch_adjusted(params=1e9, tokens=2e10, batch_tokens=5e5, critical_batch=critical).law


def test_draws_are_a_function_of_the_seed():
    runs = study(0.005, 2, **SMALL)
    first, again, other = (trajectory(runs, draws=20, seed=seed) for seed in (0, 0, 1))
    assert first == again and first.constants == other.constants
    assert first.alpha_S.low != other.alpha_S.low


def test_too_few_runs_have_no_interval_and_say_so():
    """Three batch sizes of one model and two more final losses are the least: five runs for six constants."""
    first, second, third = SMALL["sizes"]
    runs = [*study(**{**SMALL, "sizes": (first,)}), LossRun(second, 1e6, final_loss=floor(second))]
    bare = trajectory([*runs, LossRun(third, 1e6, final_loss=floor(third))], degree=None, draws=20)
    assert np.abs(off(bare.constants)).max() < 1e-6
    assert all((each.low, each.high) == (0.0, math.inf) for each in (bare.alpha_N, bare.S_c, bare.B_star))
    assert bare.loss(params=1e9, steps=1e4, batch_tokens=1e6).high == math.inf
    assert "no intervals: 6 runs are too few for them" in bare.note
    assert "no model could be held out: stage" in bare.note
    assert bare.leave_one_out is None and bare.held_out_params is None
    assert TrajectoryLaw.from_json(bare.to_json()) == bare


def test_draws_that_cannot_be_fitted_leave_no_interval():
    """Nine curves drawn from nine seldom hold three batch sizes of a model."""
    law = trajectory(study(0.005, 2, **SMALL), joint=False, draws=100)
    assert "no intervals" in law.note and "of 100 drawn tables could not be fitted" in law.note
    assert (law.alpha_N.low, law.alpha_N.high) == (0.0, math.inf)


def _losses_rise_with_size(runs):
    return [replace(run, final_loss=9 - run.final_loss) if run.final_loss else run for run in runs]


def _below_the_floor(runs):
    return [replace(run, final_loss=1.05 * run.final_loss) if run.final_loss else run for run in runs]


def _one_rate_for_all_batches(runs):
    """Small batches learn too fast to be true, the more so the lower the loss: B_crit falls as the loss does."""
    out = []
    for run in runs:
        if run.steps:
            steps = np.array(run.steps)
            s_min = TRUE.S_c * (np.array(run.losses) - floor(run.params)) ** (-1 / TRUE.alpha_S)
            critical = 3e4 * np.array(run.losses) ** 0.5
            steps = s_min * (1 + critical / run.batch_tokens)
            run = replace(run, steps=steps)
        out.append(run)
    return out


def _fast_and_slow(runs):
    """The largest batch is measured late only, the smallest early only."""
    out = []
    for run in runs:
        if run.steps:
            kept = slice(0, 20) if run.batch_tokens == BATCHES[0] else slice(40, 60)
            run = replace(run, steps=run.steps[kept], losses=run.losses[kept])
        out.append(run)
    return out


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (lambda: study(ended=False), "stage 1 \\(model size\\) needs at least 3 different params with a final_loss"),
        (lambda: study(sizes=SIZES[:2]), "stage 1 \\(model size\\) needs at least 3 different params .* got 2"),
        (lambda: _losses_rise_with_size(study()), "stage 1 .*: the final losses must fall as models grow, got an expo"),
        (lambda: study(batches=BATCHES[:2]), "stage 2 \\(critical batch\\) needs at least 3 batch sizes of one model"),
        (lambda: [run for run in study() if run.final_loss], "stage 2 .* needs at least 3 batch sizes .* got 0"),
        (
            lambda: _fast_and_slow(study()),
            "stage 2 .* needs losses that all batch sizes of a model reach: with 6e\\+07 params one run ends at "
            "\\d.\\d+ and one begins at \\d.\\d+; train longer",
        ),
        (
            lambda: _one_rate_for_all_batches(study()),
            "stage 2 .*: the critical batch must grow as the loss falls \\(is each rate tuned\\?\\), got an expo",
        ),
        (
            lambda: study(batches=tuple(2.0**k for k in range(35, 40))),
            "stage 2 .* needs at least 3 different losses at which the batch sizes bracket the critical one, got 0",
        ),
        (
            lambda: _below_the_floor(study()),
            "stage 3 \\(updates\\): runs\\[\\d+\\], of .* params and .* batch_tokens, has a loss of .* below L\\(N\\)",
        ),
    ],
)
def test_the_stage_that_fails_is_named(runs, message):
    with pytest.raises(InputError, match=message):
        trajectory(runs())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trajectory([]), "stage 1 \\(model size\\) needs at least 3"),
        (lambda: trajectory(3), "runs must be a sequence of LossRun, got 3"),
        (lambda: trajectory([{"params": 1e6}]), "runs must be a sequence of LossRun"),
        (lambda: trajectory(study(), degree=1), "degree must be an integer of at least 2, or None, got 1"),
        (lambda: trajectory(study(), degree=2.5), "degree must be an integer of at least 2, or None, got 2.5"),
        (lambda: trajectory(study(), after_warmups=-1), "after_warmups must be >= 0, got -1"),
        (lambda: trajectory(study(), levels=0), "levels must be an integer of at least 3, got 0"),
        (lambda: trajectory(study(), margin=2), "margin must lie in \\(0, 1\\), got 2"),
        (lambda: trajectory(study(), draws=1), "draws must be an integer of at least 2, got 1"),
        (lambda: trajectory(study(), coverage=95), "coverage must lie in \\(0, 1\\), got 95"),
        (lambda: trajectory(study(), joint=False, extrapolate=True), "extrapolate=True needs joint=True"),
        (lambda: trajectory(study(steps=STEPS[:13])), "polynomial of degree 6 needs at least 14"),
        (lambda: extrapolated_final_losses(study(batches=BATCHES[:2])), "stage 1 .* over 3 batch sizes, got 2"),
        (lambda: LossRun(1e6, 1e5), "must have steps with their losses, or a final_loss, got neither"),
        (lambda: LossRun(1e6, 1e5, (1, 2), (3.0,)), "steps and losses must be of one length, got 2 and 1"),
        (lambda: LossRun(1e6, 1e5, (2, 1), (3.0, 4.0)), "steps must ascend"),
        (lambda: LossRun(1e6, 1e5, (1, 2), (3.0, math.nan)), "losses must be finite and > 0, got nan"),
        (lambda: LossRun(1e6, 1e5, (0, 2), (3.0, 4.0)), "steps must be finite and > 0, got 0"),
        (lambda: LossRun(1e6, 1e5, 5, 3.0), "steps must be a sequence of numbers, got 5"),
        (lambda: LossRun(math.inf, 1e5, final_loss=3.0), "params must be finite and > 0, got inf"),
        (lambda: LossRun(1e6, 1e5, final_loss=math.nan), "final_loss must be finite and > 0, got nan"),
        (lambda: LossRun(1e6, 1e5, final_loss=0.0), "final_loss must be finite and > 0, got 0.0"),
        (lambda: LossRun(1e6, 1e5, final_loss=3.0, warmup_steps=-1), "warmup_steps must be >= 0, got -1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_runs_take_numpy_and_go_through_json():
    run = LossRun(np.int64(10**6), np.float32(2**15), np.arange(1, 4), np.float32([5, 4, 3]), np.float64(2.5))
    assert run.steps == (1.0, 2.0, 3.0) and LossRun.from_json(run.to_json()) == run
    assert "power_law" in fit_laws()
