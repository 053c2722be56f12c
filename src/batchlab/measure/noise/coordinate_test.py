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
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.core.checks import check_count, check_inside
from batchlab.measure.noise.batch_tests import BatchTest, Stacks, batch_moments
from batchlab.parallel.agree import device_of


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
    check_count(examples=examples)
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
    """Of stacks that `batch_moments` has checked: Σ(g_ic - ḡ_c)² over the rows, by two sums over ranks a tensor."""
    rows = torch.tensor(float(sum(len(next(iter(_values(each)))) for each in micro_batches)))
    if group is not None:
        rows = rows.to(device_of(group))
        dist.all_reduce(rows, group=group)
    worst = 0.0
    for stacks in _tensor_by_tensor(micro_batches):
        parts = [stack.detach().reshape(len(stack), -1).double() for stack in stacks]
        mean = _summed([part.sum(0) for part in parts], group) / float(rows)
        squares = _summed([(part - mean).square().sum(0) for part in parts], group)
        if mean.numel():
            ratios = torch.where(squares == 0, torch.zeros_like(squares), squares / mean.square())
            ratios = torch.where(mean.isfinite() & squares.isfinite(), ratios, math.nan)
            found = float(ratios.max())
            worst = found if found > worst or math.isnan(found) else worst
    return worst * examples / (float(rows) - 1)


def _values(stacks: Stacks) -> list[Tensor]:
    return list(stacks.values()) if isinstance(stacks, Mapping) else list(stacks)


def _tensor_by_tensor(micro_batches: tuple[Stacks, ...]) -> Iterator[list[Tensor]]:
    """The stacks of one tensor in all micro-batches, matched by name where they have names."""
    first = micro_batches[0]
    for key in first if isinstance(first, Mapping) else range(len(first)):
        yield [each[key] for each in micro_batches]  # type: ignore[index]


def _summed(parts: list[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    total = torch.stack(parts).sum(0)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total
