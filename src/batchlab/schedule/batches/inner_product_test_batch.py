"""The batch that the inner-product test asks for (Bollapragada, Byrd and Nocedal 2018; Lau, Liu and Kolar 2024).

Of B examples with gradients g_i and mean ḡ, over all parameters together:

    inner product:  Var(<g_i, ḡ>)/(θ²|ḡ|⁴)                                the step is downhill with high probability
    orthogonality:  ΣVar(g_i - (<g_i, ḡ>/|ḡ|²)ḡ)/(ν²|ḡ|²)                 the step's part across ḡ is bounded
    augmented:      the larger of the two

The code released with AdAdaGrad sums both tensor by tensor, which leaves out what tensors have in common; here they are
of the whole gradient. The batch grows to what is asked for and never shrinks.
"""

from __future__ import annotations

from typing import Any

from batchlab.core.checks import check_count, check_inside, check_positive
from batchlab.measure.noise.batch_tests import Moments
from batchlab.measure.noise.coordinate_test import CoordinateMoments
from batchlab.schedule.batches.norm_test_batch import BatchTestController, asked_for


class InnerProductTestBatch(BatchTestController):
    """The batch that the inner-product test asks for, or with `nu` its augmented form.

    batch_size, maximum and the other limits: as in `NormTestBatch`, and what is said there holds here.
    theta: θ in (0, 1), 0.1 in the released code, 0.5 in its authors' runs.
    nu: ν > 0, with which the orthogonality test must pass too: 1 in its authors' runs; None for the plain test.

    The plain test is blind to noise orthogonal to ḡ, and asks for much less than the norm test at θ = η: in d
    dimensions of like noise about 1/d of it. With a rate near the largest stable one take the augmented form.

    >>> from batchlab.schedule.batches.controller import StepFacts
    >>> facts = StepFacts(16, 16, batch_test=Moments(16, 1.0, 60.0, 10.0, 50.0))
    >>> InnerProductTestBatch(16, theta=0.5, maximum=512).next_batch(1, facts)
    40
    >>> InnerProductTestBatch(16, theta=0.5, nu=1.0, maximum=512).next_batch(1, facts)
    50
    """

    def __init__(
        self, batch_size: int, *, maximum: int, theta: float = 0.1, nu: float | None = None, **limits: Any
    ) -> None:
        super().__init__(batch_size, maximum=maximum, **limits)
        check_inside(theta=theta)
        check_count(2, batch_size=batch_size)
        if nu is not None:
            check_positive(nu=nu)
        self.theta, self.nu = theta, nu

    def proposed(self, moments: Moments | CoordinateMoments) -> float:
        """The plain or the augmented test's size; NaN if either is."""
        if moments.grad_sq == 0:  # and so every <g_i, ḡ>: what the spread asks for
            return asked_for(moments.trace, 0.0, self.theta)
        plain = asked_for(moments.along / moments.grad_sq, moments.grad_sq, self.theta)
        if self.nu is None:
            return plain
        across = asked_for(moments.across, moments.grad_sq, self.nu)
        return plain if plain != plain else max(across, plain) if across == across else across
