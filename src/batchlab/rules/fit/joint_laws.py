"""y = A·N^α·M^β by least squares on logarithms: one law over model sizes N and replicas M together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_inside, check_positive
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.rules.fit.power_laws import Values, checked

Array = NDArray[np.float64]
FEWEST = 4


@dataclass(frozen=True)
class JointLaw(JsonNoun):
    """y = A·N^α·M^β. A: y of one parameter and one replica, a prefactor in y's unit. Each with Student's interval.

    params, replicas, y: the points. residuals: ln(measured/fitted) at each. held_out: ln(measured/predicted) at each by
    the law fitted without all points of that N.
    """

    A: Estimate
    alpha: Estimate
    beta: Estimate
    params: tuple[float, ...]
    replicas: tuple[float, ...]
    y: tuple[float, ...]
    residuals: tuple[float, ...]
    held_out: tuple[float, ...]
    y_name: str = "y"

    @property
    def leave_one_out(self) -> float:
        """The mean of |ln(measured/predicted)| over the points, each predicted from the other sizes."""
        return float(np.mean(np.abs(self.held_out)))

    def value(self, *, params: float, replicas: float) -> float:
        """y on the law."""
        check_positive(params=params, replicas=replicas)
        return float(self.A.value * float(params) ** self.alpha.value * float(replicas) ** self.beta.value)


def joint_law(params: Values, replicas: Values, y: Values, *, y_name: str = "y", coverage: float = 0.95) -> JointLaw:
    """A, α and β from one (N, M, y) a point, all > 0: at least four points, with different N and M not moving together.

    The intervals take ln y as scattered alike and independently about the law (Student's, n - 3 degrees of freedom).

    >>> law = joint_law([1e8, 1e8, 1e9, 1e9], [1, 2, 1, 2], [10, 20, 40, 80])
    >>> round(law.alpha.value, 4), round(law.beta.value, 4)
    (0.6021, 1.0)
    """
    from scipy.special import stdtrit

    check_inside(coverage=coverage)
    sizes, ys = checked(params, y, "params", y_name)
    _, counts = checked(params, replicas, "params", "replicas")
    if len(ys) < FEWEST:
        raise InputError(f"{y_name} must hold at least {FEWEST} points for a joint law, got {len(ys)}")
    design, log_y = _design(np.array(sizes), np.array(counts)), np.log(np.array(ys))
    _check_rank(design, sizes, counts)
    constants, errors = _solve(design, log_y)
    free = len(ys) - 3
    inverse = np.linalg.inv(design.T @ design)
    half = float(stdtrit(free, 0.5 + coverage / 2)) * np.sqrt(float(errors @ errors) / free * np.diag(inverse))
    method = f"least squares on ln {y_name} over {len(ys)} points, Student's interval"
    ends = [(float(c), float(c - h), float(c + h)) for c, h in zip(constants, half, strict=True)]
    a = Estimate(_exp(ends[0][0]), _exp(ends[0][1]), _exp(ends[0][2]), method, coverage)
    alpha, beta = (Estimate(*each, method, coverage) for each in ends[1:])
    held_out = tuple(map(float, _held_out(design, log_y)))
    return JointLaw(a, alpha, beta, sizes, counts, ys, tuple(map(float, errors)), held_out, y_name)


def _design(params: Array, replicas: Array) -> Array:
    return np.stack([np.ones_like(params), np.log(params), np.log(replicas)], 1)


def _solve(design: Array, log_y: Array) -> tuple[Array, Array]:
    constants = np.asarray(np.linalg.lstsq(design, log_y, rcond=None)[0], dtype=np.float64)
    return constants, log_y - design @ constants


def _check_rank(design: Array, params: tuple[float, ...], replicas: tuple[float, ...]) -> None:
    for name, values in (("params", params), ("replicas", replicas)):
        if len(set(values)) < 2:
            raise InputError(f"{name} must hold at least two different values for a joint law, got only {values[0]:g}")
    if np.linalg.matrix_rank(design - [0, 1, 0] * design.mean(0), tol=1e-6) < 3:
        raise InputError("params and replicas must not move together: alpha and beta cannot be told apart")


def _held_out(design: Array, log_y: Array) -> Array:
    """NaN where the other sizes do not identify the law."""
    errors = np.full(len(log_y), math.nan)
    for size in np.unique(design[:, 1]):
        left = design[:, 1] == size
        if np.linalg.matrix_rank(design[~left], tol=1e-6) < 3:
            continue
        constants, _ = _solve(design[~left], log_y[~left])
        errors[left] = log_y[left] - design[left] @ constants
    return errors


def _exp(value: float) -> float:
    return math.exp(value) if value < 709.0 else math.inf
