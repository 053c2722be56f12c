"""Studies made of the law itself, with noise of two kinds; the sheet's: N of 1 to 60 million, B of 2^15 to 2^21."""

import math
from functools import cache

import numpy as np

from batchlab.rules import loss
from batchlab.rules.fit import LossRun

TRUE = loss.published_constants("trajectory_loss")
SIZES = (1e6, 3e6, 1e7, 3e7, 6e7)
BATCHES = tuple(2.0**k for k in range(15, 22))
STEPS = tuple(np.geomspace(300, 3e5, 60).tolist())


@cache
def exact(params, batch_tokens, steps=STEPS):
    """The law's losses, by the scalar solver of `rules.loss`."""
    return np.array(loss.trajectory(params=params, steps=steps, batch_tokens=batch_tokens, constants=TRUE).losses)


def floor(params):
    return (TRUE.N_c / params) ** TRUE.alpha_N


def study(noise=0.0, seed=0, *, of_run=0.0, sizes=SIZES, batches=BATCHES, steps=STEPS, ended=True):
    """A run for each size and batch, and for each size one that has its final loss alone, if `ended`.

    noise: deviation of ln L at each point, independent. of_run: of a whole run, its final loss too. The generator is
    asked in the order of the sheet's own study, for its nine seeds.
    """
    rng = np.random.default_rng(seed)
    runs = []
    for params in sizes:
        for batch_tokens in batches:
            errors = noise * rng.normal(size=len(steps)) + (of_run * rng.normal() if of_run else 0.0)
            losses = exact(params, batch_tokens, steps) * np.exp(errors)
            runs.append(LossRun(params, batch_tokens, steps, losses))
    for params in sizes if ended else ():
        error = math.hypot(noise, of_run) * rng.normal()
        runs.append(LossRun(params, batches[-1], final_loss=floor(params) * math.exp(error)))
    return runs


def off(found):
    """How far each constant is from the truth, relatively, in the order of the fields."""
    return np.array([getattr(found, name) / value - 1 for name, value in vars(TRUE).items()])


def curve_error(found, params=1e9, batches=BATCHES):
    """The mean relative error of the predicted curves of a larger model."""
    errors = []
    for batch_tokens in batches:
        said = loss.trajectory(params=params, steps=STEPS, batch_tokens=batch_tokens, constants=found)
        errors.append(np.abs(np.array(said.losses) / exact(params, batch_tokens) - 1).mean())
    return float(np.mean(errors))
