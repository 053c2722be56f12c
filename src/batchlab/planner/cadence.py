"""How long a run may go on, and how often it stops to evaluate and to save."""

from __future__ import annotations

import math

from batchlab.rules.checks import check_not_negative, check_positive

STEPS_MARGIN = 4
EVALUATIONS, LEAST_EVALUATIONS = 30, 10
EVALUATION_SHARE = 0.5
SAVES, LONGEST_UNSAVED_SECONDS = 5, 600.0


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
