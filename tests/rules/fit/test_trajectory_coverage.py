"""The intervals hold the truth as often as they say, and are no wider than the estimates scatter; fixed samples."""

import math
from dataclasses import fields

import numpy as np
import pytest

from batchlab.rules import loss
from batchlab.rules.fit import trajectory
from batchlab.rules.law_loss import TrajectoryConstants
from tests.rules.fit.trajectory_studies import BATCHES, SIZES, STEPS, TRUE, study

NAMES = [field.name for field in fields(TrajectoryConstants)]
STUDIES, COVERAGE, NORMAL = 100, 0.9, 1.645
AT = ({"params": 1e9, "steps": 1e4, "batch_tokens": 5e5}, {"params": 1e9, "steps": 1e5, "batch_tokens": 2e6})


def simulated(seed, studies, *, joint=True, **given):
    """Of each constant, B_crit at a loss of 3 and two losses of a model of 1e9: share held, width over scatter."""
    truth = [getattr(TRUE, name) for name in NAMES]
    truth += [loss.critical_batch(loss=3.0, constants=TRUE).tokens]
    truth += [loss.kaplan(**at, constants=TRUE).nats for at in AT]
    rows = []
    for number in range(studies):
        law = trajectory(study(seed=[seed, number], **given), joint=joint, coverage=COVERAGE, seed=number)
        said = [getattr(law, name) for name in NAMES]
        said += [law.critical_batch_tokens(loss=3.0), *(law.loss(**at) for at in AT)]
        rows.append(
            [(each.low <= true <= each.high, each.value, each.low, each.high) for each, true in zip(said, truth)]
        )
    held, value, low, high = np.moveaxis(np.array(rows), 2, 0)
    width = np.median(np.log(high / low), axis=0) / (2 * NORMAL * np.log(value).std(axis=0, ddof=1))
    return held.mean(axis=0), width


def check(held, width, studies, widest):
    """Held too seldom by four standard errors fails, on average by three of nine correlated ones taken as one."""
    error = math.sqrt(COVERAGE * (1 - COVERAGE) / studies)
    assert held.min() > COVERAGE - 4 * error
    assert held.mean() > COVERAGE - 2 * error
    assert (width > 0.8).all() and (width < widest).all()


@pytest.mark.slow
def test_sixteen_runs_that_each_err_as_a_whole():
    """Four sizes, four batches: 0.5 % of a run, which no number of its checkpoints averages away."""
    few = {"sizes": SIZES[:4], "batches": BATCHES[::2], "steps": tuple(np.geomspace(300, 3e5, 40).tolist())}
    held, width = simulated(1, STUDIES, noise=0.002, of_run=0.005, **few)
    check(held, width, STUDIES, 1.9)


@pytest.mark.slow
def test_the_sheets_study_with_noise_at_each_point():
    held, width = simulated(2, STUDIES, noise=0.005, steps=STEPS[::2])
    check(held, width, STUDIES, 1.6)


@pytest.mark.slow
def test_the_sheets_study_with_whole_runs_off():
    held, width = simulated(3, 200, noise=0.002, of_run=0.005)
    check(held, width, 200, 1.6)


@pytest.mark.slow
def test_the_stages_alone():
    """Five final losses leave three degrees of freedom: wide, and held more often than said."""
    held, width = simulated(4, 40, noise=0.005, batches=BATCHES[::2], steps=STEPS[::2], joint=False)
    error = math.sqrt(COVERAGE * (1 - COVERAGE) / 40)
    assert held.min() > COVERAGE - 4 * error and (width > 0.8).all()
