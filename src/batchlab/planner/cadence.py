"""How long a run may go on, and how often it stops to evaluate, to save, and to measure the noise scale."""

from __future__ import annotations

import math

from batchlab.core.checks import check_not_negative, check_positive

STEPS_MARGIN = 4
EVALUATIONS, LEAST_EVALUATIONS = 30, 10
EVALUATION_SHARE = 0.5
SAVES, LONGEST_UNSAVED_SECONDS = 5, 600.0
NOISE_SHARE, NOISE_MEASUREMENTS = 0.01, 30


def most_steps(predicted_steps: float) -> int:
    """Four times the prediction: B_crit is often wrong by 2, and twice that again is left for the seed's luck."""
    check_positive(predicted_steps=predicted_steps)
    return math.ceil(STEPS_MARGIN * predicted_steps)


def evaluate_every(predicted_steps: float, *, step_seconds: float, evaluation_seconds: float = 0.0) -> int:
    """Updates between evaluations: 30 up to the predicted end, fewer where evaluating would take over half the time.

    Never fewer than 10, so that the step at which the target was met is known to a tenth.

    >>> evaluate_every(300, step_seconds=0.01), evaluate_every(300, step_seconds=0.01, evaluation_seconds=0.15)
    (10, 15)
    """
    check_positive(predicted_steps=predicted_steps, step_seconds=step_seconds)
    check_not_negative(evaluation_seconds=evaluation_seconds)
    affordable = evaluation_seconds * (1 - EVALUATION_SHARE) / (EVALUATION_SHARE * step_seconds)
    wanted = max(predicted_steps / EVALUATIONS, min(affordable, predicted_steps / LEAST_EVALUATIONS))
    return max(1, math.floor(wanted))


def checkpoint_every(predicted_steps: float, *, step_seconds: float, evaluate_every: int) -> int:
    """Updates between checkpoints: a fifth of the predicted run or ten minutes, the lesser, after an evaluation.

    >>> checkpoint_every(300, step_seconds=0.01, evaluate_every=10)
    60
    """
    check_positive(predicted_steps=predicted_steps, step_seconds=step_seconds, evaluate_every=evaluate_every)
    wanted = min(predicted_steps / SAVES, LONGEST_UNSAVED_SECONDS / step_seconds)
    return max(1, math.floor(wanted / evaluate_every)) * evaluate_every


def noise_every(predicted_steps: float, *, step_seconds: float, noise_seconds: float) -> int:
    """Updates of which one has its noise scale measured: so many that it takes 1 % of the time, but 30 a run at least.

    noise_seconds: what measuring adds to an update.

    >>> [noise_every(steps, step_seconds=0.01, noise_seconds=1e-3) for steps in (60, 3000)]
    [2, 10]
    """
    check_positive(predicted_steps=predicted_steps, step_seconds=step_seconds)
    check_not_negative(noise_seconds=noise_seconds)
    wanted = math.ceil(noise_seconds / (NOISE_SHARE * step_seconds))
    return max(1, min(wanted, math.floor(predicted_steps / NOISE_MEASUREMENTS)))
