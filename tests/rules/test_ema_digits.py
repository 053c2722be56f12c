"""The rule in training, on digits: averages, a teacher that is an average, and Adam (sheet 53, checks 3 to 5).

Five seeds each, the sheet's margins; a failure prints every seed's figure.
"""

import numpy as np
import pytest

from batchlab.rules import ema
from tests.rules.digits_net import Adam, Sgd, distance, initial, self_taught, supervised

SEEDS, BATCH = range(5), 8
RATE, DECAY = 0.02, 0.998
BASE = ema.Averaged(RATE, DECAY)


@pytest.fixture(scope="module")
def averaged_at_the_base():
    return [supervised(seed, BATCH, Sgd(RATE), 24_576, [DECAY]) for seed in SEEDS]


@pytest.mark.parametrize("kappa", [4, 16])
def test_the_average_ends_where_it_did(kappa, averaged_at_the_base):
    """Distance to the base run's average, over that one's travel, and the largest gap of test losses along training."""
    rule = ema.with_optimizer(BASE, kappa, optimizer="sgd")
    figures = []
    for seed, (curves, (mean,)) in zip(SEEDS, averaged_at_the_base, strict=True):
        travel = distance(mean, initial(seed))
        found, means = supervised(seed, BATCH * kappa, Sgd(rule.learning_rate), 24_576, [rule.decay, DECAY])
        gaps = np.abs(found - curves[0]).max(axis=1)
        figures.append([*(distance(each, mean) / travel for each in means), *gaps])
    figures = np.array(figures)
    by_rule, unscaled, gap_by_rule, gap_unscaled = figures.T
    assert by_rule.max() < 0.06 and unscaled.min() > 0.25, figures
    assert gap_by_rule.max() < 0.02 and gap_unscaled.min() > 0.5, figures


@pytest.mark.parametrize("kappa", [4, 16])
def test_it_ends_within_the_spread_of_seeds(kappa, averaged_at_the_base):
    """The last test loss of each run's average, against the spread of the base run's over the five seeds."""
    rule = ema.with_optimizer(BASE, kappa, optimizer="sgd")
    base = np.array([curves[0][-1] for curves, _ in averaged_at_the_base])
    runs = [supervised(seed, BATCH * kappa, Sgd(rule.learning_rate), 24_576, [rule.decay, DECAY])[0] for seed in SEEDS]
    by_rule, unscaled = np.array([found[:, -1] for found in runs]).T
    spread = base.max() - base.min()
    figures = np.stack([base, by_rule, unscaled])
    assert (np.abs(by_rule - base) < spread).all(), figures
    assert (np.abs(unscaled - base) > spread).all(), figures


def test_a_teacher_that_is_an_average_teaches_the_same():
    """κ = 8: the largest relative deviation from the base run's test losses, of student and teacher."""
    rule = ema.with_optimizer(BASE, 8, optimizer="sgd")
    figures = []
    for seed in SEEDS:
        base = self_taught(seed, BATCH, RATE, DECAY, 32_768)
        runs = [self_taught(seed, 8 * BATCH, rule.learning_rate, rho, 32_768) for rho in (rule.decay, DECAY)]
        figures.append([np.abs(run / base - 1).max(axis=1) for run in runs])
    figures = np.array(figures)
    assert figures[:, 0].max() < 0.05 and figures[:, 1].min() > 0.3, figures


@pytest.mark.slow
@pytest.mark.parametrize(("kappa", "rate"), [(4, 1e-3), (4, 5e-4), (8, 1e-3)])
def test_adam_with_all_four_rules_is_nearer_than_with_one_or_none(kappa, rate):
    """Mean distance of test-loss curves in examples: all four rules, √κ·η alone, nothing changed.

    The sheet's medians: 0.041, 0.054, 0.243; 0.080, 0.089, 0.399; 0.080, 0.101, 0.479. κη alone is not compared: at
    κ = 8 it is nearer than √κ·η here.
    """
    betas, eps = (0.9, 0.999), 1e-8
    rule = ema.with_optimizer(ema.Averaged(rate, DECAY, betas=betas, eps=eps), kappa, optimizer="adam")
    settings = [(rule.learning_rate, rule.betas, rule.eps), (rule.learning_rate, betas, eps), (rate, betas, eps)]
    figures = []
    for seed in SEEDS:
        base = supervised(seed, BATCH, Adam(rate, betas, eps), 24_576)[0]
        curves = [supervised(seed, BATCH * kappa, Adam(*each), 24_576)[0] for each in settings]
        figures.append([np.abs(curve - base).mean() for curve in curves])
    figures = np.array(figures)
    every, one, none = figures.T
    assert (every < one).all() and (one < none / 2).all(), figures
    medians = {(4, 1e-3): (0.041, 0.054, 0.243), (4, 5e-4): (0.080, 0.089, 0.399), (8, 1e-3): (0.080, 0.101, 0.479)}
    assert np.median(figures, axis=0) == pytest.approx(medians[kappa, rate], rel=0.25), figures
