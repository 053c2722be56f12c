"""The parts of the trajectory fit: crossings, B_crit at a loss, the solver, its slopes, one-step refits, the table."""

import math

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.curves.tradeoff_fit import fit_tradeoff
from batchlab.rules import loss
from batchlab.rules.fit import LossRun, RunTable, loss_runs_of, trajectory
from batchlab.rules.fit import trajectory_table as by_table
from batchlab.rules.fit.loss_runs import crossings, curves
from batchlab.rules.fit.trajectory_joint import OneStep, constants_of, least_squares, log_losses, points_of, start_at
from batchlab.rules.fit.trajectory_stages import Line, batch_line, levels_of, size_line, step_line
from batchlab.rules.law_loss import TrajectoryConstants
from tests.rules.fit.trajectory_studies import BATCHES, SIZES, STEPS, TRUE, exact, floor, study

SMALL = {"sizes": SIZES[:4], "batches": BATCHES[::2], "steps": STEPS[::3]}
WARM = {"degree": 6, "after_warmups": 5.0}


def lines(runs, kept, weights):
    sizes = size_line(runs, weights)
    batches = batch_line(levels_of(kept, sizes, weights, 12, 0.02))
    return sizes, batches, step_line(runs, kept, sizes, batches, weights, 0.02)


def fitted(runs):
    kept = curves(runs, **WARM)
    points = points_of(runs, kept)
    start = start_at(*lines(runs, kept, np.ones(len(runs))), points.centre)
    return least_squares(start, points), points


@pytest.mark.parametrize("degree", [None, 6])
def test_crossings_are_the_steps_to_a_loss(degree):
    run = LossRun(1e7, 2.0**18, STEPS, exact(1e7, 2.0**18))
    (curve,) = curves([run], degree=degree, after_warmups=5.0)
    levels = np.array([7.0, 6.0, 5.0, 4.0, 3.6, 1.1 * floor(1e7)])
    found = np.exp(crossings(curve, floor(1e7), levels))
    wanted = [loss.steps_to_loss(loss=at, params=1e7, batch_tokens=2.0**18, constants=TRUE) for at in levels]
    assert found == pytest.approx(wanted, rel=1e-2 if degree else 1e-4)
    assert np.isnan(crossings(curve, floor(1e7), np.array([30.0, 1.0001 * floor(1e7)]))).all()


def test_a_curve_that_rises_again_is_passed_once():
    steps = np.arange(1.0, 21.0)
    losses = 2 + 10 / steps
    losses[10:13] += 3.0
    (curve,) = curves([LossRun(1e6, 1e5, steps, losses)], degree=None, after_warmups=5.0)
    assert (np.diff(curve.fine) <= 0).all()
    assert np.exp(crossings(curve, 2.0, np.array([4.0])))[0] == pytest.approx(5.0, rel=1e-5)  # the fine grid


def test_the_critical_batch_at_a_loss_is_that_of_the_tradeoff_fit():
    """Stage 2's grid against `curves.tradeoff_fit`, on crossings with 2 % noise of 40 losses."""
    runs = [run for run in study(0.02, 4, sizes=(1e7,)) if run.steps]
    kept, ones = curves(runs, **WARM), np.ones(len(runs))
    levels = levels_of(kept, Line(TRUE.alpha_N, math.log(TRUE.N_c)), ones, 40, 0.02)
    assert len(levels) == 40
    for level in levels:
        at = np.array([math.exp(level.log_loss)])
        steps = [float(np.exp(crossings(curve, floor(1e7), at))[0]) for curve in kept]
        reference = fit_tradeoff([run.batch_tokens for run in runs], steps).b_crit.value
        assert math.exp(level.log_critical) == pytest.approx(reference, rel=1e-6)


def test_weights_are_copies():
    """A run that weighs two counts as two, in every stage."""
    runs = study(0.005, 8, **SMALL)
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 4, len(runs))
    twice = [run for run, count in zip(runs, weights, strict=True) for _ in range(count)]
    weighed = lines(runs, curves(runs, **WARM), weights.astype(float))
    copied = lines(twice, curves(twice, **WARM), np.ones(len(twice)))
    for one, other in zip(weighed, copied, strict=True):
        assert one == pytest.approx(other, rel=1e-9)


def test_the_vector_solver_is_the_scalar_one():
    """Over 200 draws of constants far and near, in ln L to 1e-12."""
    rng = np.random.default_rng(5)
    runs = study(**SMALL)
    points = points_of(runs, curves(runs, **WARM))
    for _ in range(200):
        q = np.array(
            [
                rng.uniform(-1, 3),
                rng.uniform(0.02, 0.3),
                rng.uniform(-6, 2),
                rng.uniform(0.2, 1.5),
                rng.uniform(8, 18),
                rng.uniform(1, 9),
            ]
        )
        constants = constants_of(q, points.centre)
        found, _ = log_losses(q, points)
        for row in rng.choice(len(found), 20, replace=False):
            run = runs[points.run[row]]
            if np.isinf(points.log_steps[row]):
                wanted = loss.least_loss(params=run.params, constants=constants)
            else:
                at = {"steps": math.exp(points.log_steps[row]), "batch_tokens": run.batch_tokens}
                wanted = loss.kaplan(params=run.params, **at, constants=constants)
            assert found[row] == pytest.approx(math.log(wanted.nats), abs=1e-12)


def test_slopes_are_differences():
    runs = study(0.005, 1, **SMALL)
    q, points = fitted(runs)
    _, slopes = log_losses(q, points)
    for column in range(6):
        step = np.zeros(6)
        step[column] = 1e-5
        differences = (log_losses(q + step, points)[0] - log_losses(q - step, points)[0]) / 2e-5
        assert slopes[:, column] == pytest.approx(differences, rel=1e-6, abs=1e-9)


def test_the_joint_fit_is_where_no_constant_can_lower_the_error():
    runs = study(0.005, 2, **SMALL)
    q, points = fitted(runs)
    fit, slopes = log_losses(q, points)
    errors = points.log_losses - fit
    assert np.abs(slopes.T @ errors).max() < 1e-7 * math.sqrt(len(errors)) * errors.std()


def test_one_step_is_near_a_fit_anew():
    """The constants of runs drawn again: one step from all runs' fit against least squares, to 5 % of their spread."""
    runs = study(0.002, 3, of_run=0.005, **SMALL)
    q, points = fitted(runs)
    one_step, rng = OneStep(q, points, len(runs)), np.random.default_rng(1)
    near, anew = [], []
    for _ in range(30):
        rows = rng.integers(len(runs), size=len(runs))
        weights = np.bincount(rows, minlength=len(runs)).astype(float)
        near.append(one_step(weights))
        copies = np.repeat(np.arange(len(points.run)), weights[points.run].astype(int))
        drawn = points._replace(
            **{name: getattr(points, name)[copies] for name in ("floor", "log_batch", "log_steps", "log_losses", "run")}
        )
        anew.append(least_squares(q, drawn))
    spread = np.std(anew, axis=0)
    assert (np.abs(np.array(near) - np.array(anew)).mean(axis=0) < 0.05 * spread).all()
    assert np.std(near, axis=0) == pytest.approx(spread, rel=0.1)


def test_constants_beyond_a_float_are_none():
    for q in ([1, 1e-4, 0, 1, 10, 4], [1, -0.1, 0, 1, 10, 4], [1, 0.1, math.nan, 1, 10, 4]):
        assert constants_of(np.array(q, dtype=float), (14.0, 9.0, 1.5)) is None
    assert isinstance(constants_of(np.array([1, 0.1, 0, 1, 10, 4.0]), (14.0, 9.0, 1.5)), TrajectoryConstants)


def table_of(runs):
    rows = [(r.params, r.batch_tokens, s, y, str(k)) for k, r in enumerate(runs) for s, y in zip(r.steps, r.losses)]
    columns = dict(zip(("params", "batch_tokens", "steps", "loss", "run"), zip(*rows, strict=True), strict=True))
    order = np.random.default_rng(0).permutation(len(rows))
    return RunTable.of({name: [column[row] for row in order] for name, column in columns.items()})


def test_a_table_of_checkpoints_is_fitted_as_its_runs():
    runs = study(0.005, 6, ended=False, **SMALL)
    read = loss_runs_of(table_of(runs), warmup_steps=3.0)
    key = lambda run: (run.params, run.batch_tokens)  # noqa: E731
    assert [(key(r), r.losses, r.warmup_steps) for r in sorted(read, key=key)] == [
        (key(r), pytest.approx(r.losses), 3.0) for r in sorted(runs, key=key)
    ]
    found = by_table.trajectory(table_of(runs), draws=50)
    own = trajectory(runs, extrapolate=True, draws=50)
    assert found.constants["alpha_S"].value == pytest.approx(own.alpha_S.value, rel=1e-6)
    assert found.leave_one_out["loss"] == pytest.approx(own.leave_one_out, rel=1e-4)
    assert "alpha_N" in found.table() and "B in tokens" in found.table()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": [1e6, 2e6]}, "run 'a' must have one params, got \\[1000000.0, 2000000.0\\]"),
        ({"batch_tokens": [2048.0, 4096.0]}, "run 'a' must have one batch_tokens"),
        ({"steps": [10, 10]}, "run 'a' must have one row a step"),
    ],
)
def test_a_table_whose_runs_are_mixed_is_refused(change, message):
    rows = {"params": [1e6, 1e6], "batch_tokens": [2048.0, 2048.0], "steps": [10, 20], "loss": [5.0, 4.0]}
    with pytest.raises(InputError, match=message):
        loss_runs_of(RunTable.of({**rows, **change, "run": ["a", "a"]}))
