"""The norm test coordinate by coordinate: Var(g_ic) <= B·η²·ḡ_c² for every coordinate c.

AdAdaGrad (Lau, Liu and Kolar 2024, arXiv 2402.11215) names a coordinate-wise variant of its norm test, for AdaGrad
with a rate of its own for each coordinate. Its statement could not be read, and the released code does not have it;
what stands here is the plain reading, and batchlab's: the batch that the test asks for is the most that any coordinate
asks for, max_c Var(g_ic)/(η²ḡ_c²), where both are 0 none.

One coordinate without signal decides: with pure noise in n coordinates, the largest of n ratios 1/F(1, B - 1) grows as
n², so that any network of size asks for the cap at once. Take it for a handful of parameters, or to see what it says.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from batchlab.core.checks import check_count, check_inside
from batchlab.measure.noise.batch_tests import BatchTest, Stacks, _checked, _mean, batch_moments


class CoordinateMoments(NamedTuple):
    """`Moments`, and worst: max_c Var(g_ic)/ḡ_c²; infinite where a mean is 0 and the variance is not."""

    examples: int
    grad_sq: float
    trace: float
    along: float
    across: float
    worst: float


def coordinate_moments(
    *micro_batches: Stacks, examples: int = 1, process_group: dist.ProcessGroup | None = None
) -> CoordinateMoments:
    """What all the tests are made of, the coordinate-wise one too. Arguments: `batch_tests.norm_test`.

    Over ranks it sums two float64 tensors of the model's size, where the other tests sum one.
    """
    moments = batch_moments(*micro_batches, examples=examples, process_group=process_group)
    return CoordinateMoments(*moments, _worst(micro_batches, examples, process_group))


def coordinate_norm_test(
    *micro_batches: Stacks, eta: float = 0.1, examples: int = 1, process_group: dist.ProcessGroup | None = None
) -> BatchTest:
    """The norm test that must hold in every coordinate; `variance` and `grad_sq` are of all together.

    >>> coordinate_norm_test([torch.tensor([[3.0, 1.0], [1.0, 3.0]])], eta=0.5).proposed
    2.0
    """
    check_inside(eta=eta)
    m = coordinate_moments(*micro_batches, examples=examples, process_group=process_group)
    wanted = m.worst / eta**2
    return BatchTest(m.examples, float(math.ceil(wanted)) if math.isfinite(wanted) else wanted, m.trace, m.grad_sq)


@torch.no_grad()
def _worst(micro_batches: tuple[Stacks, ...], examples: int, group: dist.ProcessGroup | None) -> float:
    check_count(examples=examples)
    pieces = _checked(micro_batches)
    means, rows = _mean(pieces, group)
    worst = torch.zeros((), dtype=torch.float64, device=means[0].device)
    for index, mean in enumerate(means):
        squares = torch.zeros_like(mean)
        for stacks in pieces:
            squares += (stacks[index].detach().reshape(len(stacks[index]), -1).double() - mean).square().sum(0)
        if group is not None:
            dist.all_reduce(squares, group=group)
        if mean.numel():
            ratios = torch.where(squares == 0, torch.zeros_like(squares), squares / mean.square())
            ratios = torch.where(mean.isfinite() & squares.isfinite(), ratios, math.nan)
            worst = torch.maximum(worst, ratios.max())
    return float(worst) * examples / (rows - 1)
