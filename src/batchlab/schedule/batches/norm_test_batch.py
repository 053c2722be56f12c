"""The batch that the norm test asks for, in any training loop (Byrd et al. 2012; Lau, Liu and Kolar 2024).

Of B examples with gradients g_i and mean ḡ the test asks for ΣVar(g_i)/(η²|ḡ|²), which is when the mean gradient's
expected error is at most η of its norm. The batch grows to that and never shrinks. |ḡ|² has the noise of B examples in
it, so that one test asks for no more than about B/η²; that is gradual for η near 1, and 100 times at η = 0.1.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from torch import nn

from batchlab.core.checks import check_count, check_inside
from batchlab.core.errors import InputError
from batchlab.measure.noise.batch_tests import Moments
from batchlab.measure.noise.coordinate_test import CoordinateMoments
from batchlab.schedule.batches.controller import ANY_SIZE, BatchController, StepFacts


class BatchTestController(BatchController):
    """Grows the batch to what a test of its gradients asks for, at most to `maximum`; it never shrinks.

    A subclass gives `proposed`. Where the mean gradient is 0 and the spread is not, the test asks for any size: the
    maximum. Where both are 0, or a gradient was not finite, nothing changes.
    """

    needs = frozenset({"batch_test"})

    def __init__(self, batch_size: int, *, maximum: int, growth: float = math.inf, **limits: Any) -> None:
        super().__init__(batch_size, maximum=maximum, growth=growth, **limits)

    @abstractmethod
    def proposed(self, moments: Moments | CoordinateMoments) -> float:
        """The examples that the test asks for; infinite, 0 and NaN as in `batch_tests.BatchTest`."""

    def wanted(self, step: int, facts: StepFacts) -> float | None:
        """What the test asks for where that is more than the present size."""
        if facts.batch_test is None:
            return None
        proposed = self.proposed(facts.batch_test)
        if not proposed > self.batch_size:
            return None
        return float(math.ceil(min(proposed, ANY_SIZE)))

    @property
    def due(self) -> bool:
        """Whether to measure for the next call: not once the batch has come to its maximum."""
        return super().due and self.batch_size < self.maximum


class NormTestBatch(BatchTestController):
    """The batch that the norm test asks for.

    batch_size: where it starts, 2 examples or more. maximum: the cap. On a data set of thousands the test soon asks
        for all of it, and that costs accuracy: without a cap softmax regression on digits took 0.7 % of the updates
        that a batch of 8 took, and lost 3 points of accuracy; with one of 128, 6 % and half a point, like a constant
        128.
    eta: η in (0, 1), 0.1 in the released code; its authors took 0.25 to 0.5 on CIFAR, 0.1 on MNIST and ImageNet.
    coordinate_wise: the test must hold in every coordinate. It needs `coordinate_moments`, and its statement is
        batchlab's (`measure.noise.coordinate_test` says why, and when not to use it).
    minimum, multiple_of, deadband, patience: see `BatchController`. growth: the most one change multiplies by; infinite
        in the source, which tests at every update. `due` says when to measure.

    Reads `batch_test`, the `Moments` of this update's per-example gradients, or of group gradients. Losses must be
    means. A model with batch normalisation has no per-example gradients: `check_no_batch_norm`. The learning rate is
    not moved with the batch in the source. Not where gradients of single examples cost too much: their stack is B
    copies of the gradient; the noise-scale batch needs only norms of micro-batches.

    >>> control = NormTestBatch(16, eta=0.5, maximum=512)
    >>> control.next_batch(1, StepFacts(16, 16, batch_test=Moments(16, 1.0, 25.0, 1.0, 24.0)))
    100
    >>> control.next_batch(2, StepFacts(116, 100, batch_test=Moments(100, 1.0, 5.0, 1.0, 4.0)))
    100
    """

    def __init__(
        self, batch_size: int, *, maximum: int, eta: float = 0.1, coordinate_wise: bool = False, **limits: Any
    ) -> None:
        super().__init__(batch_size, maximum=maximum, **limits)
        check_inside(eta=eta)
        check_count(2, batch_size=batch_size)
        self.eta, self.coordinate_wise = eta, coordinate_wise

    def proposed(self, moments: Moments | CoordinateMoments) -> float:
        """ΣVar(g_i)/(η²|ḡ|²), or the most that any coordinate asks for."""
        if not self.coordinate_wise:
            return asked_for(moments.trace, moments.grad_sq, self.eta)
        if not isinstance(moments, CoordinateMoments):
            raise InputError(
                f"batch_test must be of coordinate_moments where coordinate_wise, got {type(moments).__name__}"
            )
        finite = math.isfinite(moments.trace) and math.isfinite(moments.grad_sq)
        return moments.worst / self.eta**2 if finite else math.nan


def asked_for(variance: float, signal: float, share: float) -> float:
    """variance/(share²·signal): infinite where only the signal is 0, 0 where both are, NaN where one is not finite.

    >>> asked_for(25.0, 1.0, 0.5), asked_for(1.0, 0.0, 0.5), asked_for(0.0, 0.0, 0.5)
    (100.0, inf, 0.0)
    """
    if not (math.isfinite(variance) and math.isfinite(signal)):
        return math.nan
    if variance <= 0:
        return 0.0
    return variance / signal / share**2 if signal > 0 else math.inf


def check_no_batch_norm(model: nn.Module, *, examples: int = 1) -> None:
    """Refuses rows of single examples where a layer normalises over the batch in training; to be called once.

    examples: in each row of the stacks. With two or more (`group_gradients`) nothing is refused: a group's gradient
    exists, and is the one that is trained if a micro-batch is as large as a group.

    >>> check_no_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)))
    """
    check_count(examples=examples)
    for name, module in model.named_modules():
        normalises = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if examples == 1 and normalises and (module.training or module.running_mean is None):
            raise InputError(
                f"model must not normalise over the batch, but {name or type(module).__name__} does: there an "
                "example has no gradient of its own. Use group gradients (and give their examples), or GroupNorm"
            )
