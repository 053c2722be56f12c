"""Tests of whether a batch is large enough, from the spread of its examples' gradients.

Of B examples with gradients g_i and mean ḡ, |.| over all parameters, Var the unbiased sample variance over i:

    norm:           Σ_coordinates Var(g_i)/(η²|ḡ|²)                       Byrd et al. 2012
    inner product:  Var(<g_i, ḡ>)/(θ²|ḡ|⁴)                                Bollapragada et al. 2018
    orthogonality:  Σ_coordinates Var(g_i - (<g_i, ḡ>/|ḡ|²)ḡ)/(ν²|ḡ|²)    the same
    augmented:      the larger of the last two                            the same

each rounded up is the batch that the test asks for; it passes where B is as large. AdAdaGrad (Lau, Liu and Kolar 2024,
arXiv 2402.11215) grows the batch to it and never shrinks it. |ḡ|² has the noise of B examples in it, so one test asks
for no more than about B/η²: growth is gradual.

The released code of AdAdaGrad sums the inner products' variances tensor by tensor, which leaves out what tensors have
in common; that is `inner_product_test_per_tensor` and `orthogonality_test_per_tensor` here. Over micro-batches and
ranks it adds a biased variance of means to a mean of unbiased variances; here B examples have one variance, however
they are cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.core.checks import check_count, check_inside, check_positive, is_count
from batchlab.core.errors import InputError
from batchlab.measure.norms import to_floats
from batchlab.parallel.shards import is_spread

Stacks = Sequence[Tensor] | Mapping[str, Tensor]


class BatchTest(NamedTuple):
    """batch: B, examples. proposed: examples the test asks for, a whole number.

    It is infinite where the mean gradient is 0 and the variance is not, 0 where both are, and NaN where a gradient is
    not finite. variance: the numerator, of one example. grad_sq: |ḡ|².
    """

    batch: int
    proposed: float
    variance: float
    grad_sq: float

    @property
    def passed(self) -> bool:
        """Whether the batch is as large as the test asks for; not where that is NaN."""
        return self.proposed <= self.batch


class Moments(NamedTuple):
    """Of the B examples. grad_sq: |ḡ|². trace: Σ Var(g_i). along: Var(<g_i, ḡ>). across: Σ Var of the rest of g_i."""

    examples: int
    grad_sq: float
    trace: float
    along: float
    across: float


def norm_test(
    *micro_batches: Stacks, eta: float = 0.1, examples: int = 1, process_group: dist.ProcessGroup | None = None
) -> BatchTest:
    """Asks for ΣVar(g_i)/(η²|ḡ|²) examples: then the mean gradient's expected error is at most η of its norm.

    micro_batches: the gradients of the whole batch in one piece or several of any sizes. Each is a list or a dict of
    stacks, one a tensor, whose first dimension is the examples; `torch.func.vmap` of `torch.func.grad` gives such.
    eta: in (0, 1), 0.1 in the released code; its authors took 0.25 to 0.5 on CIFAR. examples: how many are in each
    row, where rows are mean gradients of groups (`group_gradients`): their variance times that stands for an
    example's, with as many fewer degrees of freedom. process_group: sums over its ranks, whose micro-batches may differ
    in number and size but must hold a row; every rank must call.

    Losses must be means, so that a row is an example's own gradient. Under batch normalisation there is none: use group
    gradients. Dropout needs `randomness="different"` in vmap, and then the gradients are not those of the step. All
    rows of a micro-batch are held, one tensor of it at a time in float64. On a small data set the batch asked for can
    be all of it: put a cap on it.

    Raises `InputError` for fewer than two rows, whose variance is undefined, and for stacks that do not match.

    >>> norm_test([torch.tensor([[3.0, 0.0], [1.0, 0.0]])], eta=0.5)
    BatchTest(batch=2, proposed=2.0, variance=2.0, grad_sq=4.0)
    """
    check_inside(eta=eta)
    m = batch_moments(*micro_batches, examples=examples, process_group=process_group)
    return _test(m.examples, m.trace, m.grad_sq, eta**2 * m.grad_sq)


def inner_product_test(
    *micro_batches: Stacks, theta: float = 0.1, examples: int = 1, process_group: dist.ProcessGroup | None = None
) -> BatchTest:
    """Asks for Var(<g_i, ḡ>)/(θ²|ḡ|⁴) examples: then the step is downhill with high probability. Others: `norm_test`.

    theta: in (0, 1), 0.1 in the released code, 0.5 in its authors' runs. Blind to noise orthogonal to ḡ. Where ḡ = 0
    the numerator is the whole variance.

    >>> inner_product_test([torch.tensor([[3.0, 1.0], [1.0, -1.0]])], theta=0.5)
    BatchTest(batch=2, proposed=2.0, variance=8.0, grad_sq=4.0)
    """
    check_inside(theta=theta)
    m = batch_moments(*micro_batches, examples=examples, process_group=process_group)
    return _test(m.examples, m.along if m.grad_sq else m.trace, m.grad_sq, theta**2 * m.grad_sq**2)


def orthogonality_test(
    *micro_batches: Stacks, nu: float = 0.1, examples: int = 1, process_group: dist.ProcessGroup | None = None
) -> BatchTest:
    """Asks for ΣVar(g_i - (<g_i, ḡ>/|ḡ|²)ḡ)/(ν²|ḡ|²) examples, which bounds the step's part across ḡ.

    nu: > 0, 0.1 in the released code, 1 in its authors' runs. Others: `norm_test`. Use it with the inner-product test.

    >>> orthogonality_test([torch.tensor([[3.0, 1.0], [1.0, -1.0]])], nu=1.0)
    BatchTest(batch=2, proposed=1.0, variance=2.0, grad_sq=4.0)
    """
    check_positive(nu=nu)
    m = batch_moments(*micro_batches, examples=examples, process_group=process_group)
    return _test(m.examples, m.across, m.grad_sq, nu**2 * m.grad_sq)


def augmented_inner_product_test(
    *micro_batches: Stacks,
    theta: float = 0.1,
    nu: float = 0.1,
    examples: int = 1,
    process_group: dist.ProcessGroup | None = None,
) -> BatchTest:
    """The inner-product or the orthogonality test, whichever asks for more; `variance` is that one's."""
    check_inside(theta=theta)
    check_positive(nu=nu)
    m = batch_moments(*micro_batches, examples=examples, process_group=process_group)
    inner = _test(m.examples, m.along if m.grad_sq else m.trace, m.grad_sq, theta**2 * m.grad_sq**2)
    across = _test(m.examples, m.across, m.grad_sq, nu**2 * m.grad_sq)
    return inner if inner.proposed >= across.proposed or math.isnan(inner.proposed) else across


def inner_product_test_per_tensor(*micro_batches: Stacks, theta: float = 0.1, examples: int = 1) -> BatchTest:
    """As the released code has it: ΣVar(<g_it, ḡ_t>) over tensors t, without their covariances, over θ²|ḡ|⁴."""
    check_inside(theta=theta)
    each = _per_tensor(micro_batches, examples)
    grad_sq = math.fsum(m.grad_sq for m in each)
    return _test(each[0].examples, math.fsum(m.along for m in each), grad_sq, theta**2 * grad_sq**2)


def orthogonality_test_per_tensor(*micro_batches: Stacks, nu: float = 0.1, examples: int = 1) -> BatchTest:
    """As the released code has it in one process: each tensor's gradients are projected on that tensor's mean."""
    check_positive(nu=nu)
    each = _per_tensor(micro_batches, examples)
    grad_sq = math.fsum(m.grad_sq for m in each)
    return _test(each[0].examples, math.fsum(m.across for m in each), grad_sq, nu**2 * grad_sq)


@torch.no_grad()
def batch_moments(
    *micro_batches: Stacks, examples: int | Sequence[int] = 1, process_group: dist.ProcessGroup | None = None
) -> Moments:
    """What all the tests are made of, in two passes over the rows. Arguments: `norm_test`.

    With d_i = g_i - ḡ these are Σ|d_i|², Σ<d_i, ḡ>² and Σ(|d_i|² - <d_i, ḡ>²/|ḡ|²), each over B - 1. examples: one
    number for all rows, or one for each row of this rank in turn, where ragged micro-batches gave the rows: ḡ and the
    sums weigh a row by its b_i, and a sum of b_i|d_i|² over (rows - 1) is unbiased for the variance of an example.

    >>> batch_moments([torch.tensor([[4.0], [1.0]])], examples=[1, 2]).grad_sq  # ((4 + 1 + 1)/3)²
    4.0
    """
    pieces = _checked(micro_batches)
    weights = _weights(examples, pieces)
    means, rows, total = _mean(pieces, weights, process_group)
    grad_sq = math.fsum(to_floats([mean.square().sum() for mean in means]))
    sums = torch.zeros(3, dtype=torch.float64, device=means[0].device)
    for stacks, weight in zip(pieces, weights, strict=True):
        squares, along = (torch.zeros(len(stacks[0]), dtype=torch.float64, device=sums.device) for _ in range(2))
        for stack, mean in zip(stacks, means, strict=True):
            d = stack.detach().reshape(len(stack), -1).double() - mean
            squares += d.square().sum(1)
            along += d @ mean
        rest = (squares - along.square() / grad_sq).clamp(min=0) if grad_sq > 0 else squares
        sums += torch.stack([squares, along.square(), rest]) @ weight
    if process_group is not None:
        dist.all_reduce(sums, group=process_group)
    return Moments(total, grad_sq, *(sums / (rows - 1)).tolist())


def pooled_variance(means: Tensor, variances: Tensor, sizes: Sequence[int]) -> Tensor:
    """The unbiased variance of all examples, coordinate by coordinate, from each group's mean and unbiased variance.

    means, variances: [groups, ...]; sizes: examples of each group. With N = Σ S_d and the mean m of all,
    (Σ(S_d - 1)·var_d + ΣS_d·(mean_d - m)²)/(N - 1). The variance of a group of one is not looked at.

    >>> pooled_variance(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 0.0]), [2, 1])  # of 0, 2 and 4
    tensor(4.)
    """
    if means.shape != variances.shape or len(means) != len(sizes):
        raise InputError(
            f"means and variances must be of one shape, one row for each of {len(sizes)} sizes, got "
            f"{tuple(means.shape)} and {tuple(variances.shape)}"
        )
    for size in sizes:
        check_count(sizes=size)
    total = sum(sizes)
    check_count(2, examples=total)
    s = torch.tensor(sizes, dtype=means.dtype, device=means.device).view(-1, *[1] * (means.ndim - 1))
    mean = (means * s).sum(0) / total
    inside = torch.where(s > 1, (s - 1) * variances, 0.0).sum(0)
    return (inside + (s * (means - mean).square()).sum(0)) / (total - 1)


def next_batch(batch: int, proposed: float, max_batch: int) -> int:
    """min(proposed, max_batch) where that is more than `batch`, else `batch`: it never shrinks.

    >>> next_batch(64, 100.0, 512), next_batch(64, 3.0, 512), next_batch(64, math.inf, 512)
    (100, 64, 512)
    """
    check_count(batch=batch)
    check_count(batch, max_batch=max_batch)
    if math.isnan(proposed):
        raise InputError("proposed must be a number of examples, got nan: a gradient was not finite, skip this test")
    return max(batch, math.ceil(min(proposed, max_batch)))


class Placement(NamedTuple):
    """batch = micro_batch · workers · accumulation, in examples."""

    batch: int
    micro_batch: int
    accumulation: int


def place_batch(
    batch: int, max_batch: int, *, workers: int = 1, max_micro_batch: int | None = None, accumulation: int = 1
) -> Placement:
    """The batch rounded up to whole micro-batches on all workers, or the most of them that `max_batch` holds.

    max_micro_batch: the most a worker holds at once; beyond it more are accumulated. accumulation: at the least.

    >>> place_batch(100, 1000, workers=8, max_micro_batch=4)
    Placement(batch=128, micro_batch=4, accumulation=4)
    """
    check_count(batch=batch, workers=workers, accumulation=accumulation)
    check_count(max(batch, workers * accumulation), max_batch=max_batch)
    largest = max_batch if max_micro_batch is None else max_micro_batch
    check_count(max_micro_batch=largest)
    unit = workers * accumulation
    if batch <= unit * largest:
        micro = min(math.ceil(batch / unit), max_batch // unit)
        return Placement(micro * unit, micro, accumulation)
    turns = min(math.ceil(batch / (largest * workers)), max_batch // (largest * workers))
    return Placement(largest * workers * turns, largest, turns)


def _test(batch: int, variance: float, grad_sq: float, bound: float) -> BatchTest:
    if math.isnan(variance) or math.isnan(bound) or math.isinf(variance):
        return BatchTest(batch, math.nan, variance, grad_sq)
    wanted = variance / bound if bound > 0 else (math.inf if variance > 0 else 0.0)
    return BatchTest(batch, float(math.ceil(wanted)) if math.isfinite(wanted) else wanted, variance, grad_sq)


def _in_order(stacks: Stacks, first: Stacks) -> list[Tensor]:
    """A dict's stacks in the order of the first micro-batch's names."""
    if not isinstance(stacks, Mapping):
        return list(stacks)
    names = list(first) if isinstance(first, Mapping) else list(stacks)
    if set(names) != set(stacks):
        raise InputError(f"micro_batches must name the same tensors, got {sorted(stacks)} and {names}")
    return [stacks[name] for name in names]


def _checked(micro_batches: Sequence[Stacks]) -> list[list[Tensor]]:
    pieces = [_in_order(each, micro_batches[0]) for each in micro_batches]
    if not pieces or not pieces[0]:
        raise InputError("micro_batches must hold at least one stack of gradients, got none")
    shapes = [[tuple(stack.shape[1:]) for stack in stacks] for stacks in pieces]
    for stacks, shape in zip(pieces, shapes, strict=True):
        lengths = {len(stack) if stack.ndim else 0 for stack in stacks}
        if len(lengths) != 1 or 0 in lengths or shape != shapes[0]:
            raise InputError(
                "micro_batches must hold stacks of one number of examples each, of the same tensors, got shapes "
                f"{[tuple(stack.shape) for stack in stacks]}"
            )
        for stack in stacks:
            if not stack.is_floating_point() or stack.layout != torch.strided:
                raise InputError(f"gradients must be dense real floating-point stacks, got {stack.dtype}")
            if is_spread(stack):
                raise InputError("gradients must be whole on each rank, got some that are spread over ranks")
    return pieces


def _weights(examples: int | Sequence[int], pieces: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The examples of each row, a vector in float64 for each piece."""
    counts = [len(stacks[0]) for stacks in pieces]
    if is_count(examples):
        each = [[examples] * count for count in counts]
    elif isinstance(examples, Sequence) and len(examples) == sum(counts) and all(map(is_count, examples)):
        ends = list(itertools.accumulate(counts))
        each = [list(examples[end - count : end]) for end, count in zip(ends, counts, strict=True)]
    else:
        raise InputError(
            f"examples must be an integer of at least 1, or one for each of the {sum(counts)} rows, got {examples!r}"
        )
    device = pieces[0][0].device
    return [torch.tensor(row, dtype=torch.float64, device=device) for row in each]


def _mean(
    pieces: Sequence[Sequence[Tensor]], weights: Sequence[Tensor], group: dist.ProcessGroup | None
) -> tuple[list[Tensor], int, int]:
    """ḡ of each tensor, flat, in float64, and how many rows and examples there are, over all ranks."""
    sums = [
        torch.stack(
            [
                weight @ stack.detach().reshape(len(stack), -1).double()
                for stack, weight in zip(one, weights, strict=True)
            ]
        ).sum(0)
        for one in zip(*pieces)
    ]
    counts = [float(sum(map(len, weights))), math.fsum(to_floats([weight.sum() for weight in weights]))]
    flat = torch.cat([*sums, sums[0].new_tensor(counts)])
    if group is not None:
        dist.all_reduce(flat, group=group)
    rows, total = (int(count) for count in flat[-2:])
    if rows < 2:
        raise InputError(f"a variance needs two examples or more, got {rows}: test a larger batch")
    return list(torch.split(flat[:-2] / total, [each.numel() for each in sums])), rows, total


def _per_tensor(micro_batches: Sequence[Stacks], examples: int) -> list[Moments]:
    return [batch_moments(*([stack] for stack in one), examples=examples) for one in zip(*_checked(micro_batches))]
