"""Ghost batch normalisation on a CPU: outputs and gradients are written into slices of one tensor, not joined.

A large ghost goes through PyTorch's kernel alone. Small ones, whose calls would cost more than their numbers, go many
at a time through the formulas. For n values x of a channel in a ghost, with s = 1/√(σ² + ε):

    μ = Σx/n,    σ² = Σ(x - μ)²/n,    y = γs·x + (β - γsμ)
    ∂γ = s·Σ(x - μ)∂y,    ∂β = Σ∂y,    ∂x = γs·(∂y - (x - μ)s·∂γ/n - ∂β/n)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from batchlab.nn.parts import is_batched, is_channels_last

Differentiable = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]

_PLAIN = Tensor, nn.Parameter  # and not what stands for others: sharded, fake, quantised ones

_mse_loss = torch.ops.aten.mse_loss.default  # (a - b)² in one pass: reduction 0 is none
_mse_loss_backward = torch.ops.aten.mse_loss_backward.grad_input  # 2·(a - b)·∂ in one pass
_native_backward = torch.ops.aten.native_batch_norm_backward.default

# A ghost of more than _ALONE numbers has a call of its own; smaller ones, where there are _MANY, go together, up to
# _TOGETHER numbers at a time. Measured beside nn.BatchNorm on one core of a Xeon with AVX-512: ghosts of 128 x 256 take
# 1.8 times as long as it alone and 2.2 together, of 128 x 128 2.3 and 1.8, of 32 x 16 x 4 x 4 2.0 and 1.5; 8 ghosts of
# 32 x 64 take 3.9 and 3.1, 4 of them 3.1 and 3.1.
_ALONE, _MANY, _TOGETHER = 2**14, 8, 2**18


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether `ghosts_on_cpu` is for them: plain dense tensors of one type, which nothing traces or transforms."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
        return False
    if forward_ad._current_level >= 0:
        return False
    for t in (x, *others):
        if t is not None and not (type(t) in _PLAIN and t.is_cpu and t.dtype is x.dtype and not t.is_neg()):
            return False
    dense = x.layout is torch.strided and (x.is_contiguous() or is_channels_last(x))
    return dense and x.dtype in (torch.float32, torch.float64)


def ghosts_on_cpu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    sizes: Sequence[int],
    momenta: Sequence[float],
    eps: float,
    again: Differentiable,
) -> Tensor:
    """x normalised in ghosts of `sizes` examples, equal but for the last; momenta: η of each, for running statistics.

    again: does the same to x, weight and bias by operations that have second derivatives.
    """
    numbers = sizes[0] * x.numel() // len(x)
    full = len(sizes) - (sizes[-1] != sizes[0])
    most = 1 if numbers > _ALONE or full < _MANY else max(1, _TOGETHER // numbers)
    cut = [(min(most, full - at), sizes[0]) for at in range(0, full, most)] + [(1, size) for size in sizes[full:]]
    apply = cast(Callable[..., Tensor], _Ghosts.apply)
    return apply(x, weight, bias, (running_mean, running_var), cut, momenta, eps, again)


def gradients_of(
    again: Differentiable, given: tuple[Tensor | None, ...], needs: Sequence[bool], dy: Tensor, *, twice: bool
) -> Iterator[Tensor | None]:
    """Those of x, weight and bias that are needed, by a graph that has second derivatives too, if `twice`."""
    wanted = [t for t, need in zip(given, needs, strict=True) if need]
    with torch.enable_grad():
        y = again(*given)  # type: ignore[arg-type]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=twice))  # type: ignore[arg-type]
    return (next(found) if need else None for need in needs)


class _Ghosts(torch.autograd.Function):
    """cut: how many ghosts are computed in one go, and the examples in each of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        cut: list[tuple[int, int]],
        momenta: Sequence[float],
        eps: float,
        again: Differentiable,
    ) -> Tensor:
        y, at = torch.empty_like(x), 0
        stats: list[Tensor] = []  # of each cut μ and s
        alone = sum(k == 1 for k, _ in cut)
        spare = iter(x.new_empty(2 * alone, x.shape[1]).unbind() if alone else ())
        for (k, _), xs, ys in zip(cut, *_split(cut, x, y), strict=True):
            if k == 1:
                two = next(spare), next(spare)
                torch.native_batch_norm(xs, weight, bias, *running, True, momenta[at], eps, out=(ys, *two))
            else:
                own = momenta[at : at + k]
                two = _forward(_rows(xs, k), _rows(ys, k), weight, bias, running, own, eps, x.shape[1])
            stats += two
            at += k
        ctx.save_for_backward(x, weight, *stats)
        ctx.bias = bias  # no gradient depends on its values: an update in place may come before the backward pass
        ctx.cut, ctx.eps, ctx.again = cut, eps, again
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, *stats), bias = ctx.saved_tensors, ctx.bias
        needs = ctx.needs_input_grad[:3]
        if (twice := torch.is_grad_enabled()) or is_batched(dy):
            return *gradients_of(ctx.again, (x, weight, bias), needs, dy, twice=twice), *(None,) * 5
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        dx, sums = torch.empty_like(x), []
        split = _split(ctx.cut, x, dy, dx)
        for (k, _), mean, invstd, xs, dys, dxs in zip(ctx.cut, stats[::2], stats[1::2], *split, strict=True):
            if k == 1:
                own, *two = _native_backward(dys, xs, weight, None, None, mean, invstd, True, ctx.eps, needs)
                if needs[0]:
                    dxs.copy_(own)
            else:
                two = _backward(_rows(xs, k), _rows(dys, k), _rows(dxs, k), weight, mean, invstd)
            sums.append(two)
        dw, db = (_sum(each) if need else None for each, need in zip(zip(*sums, strict=True), needs[1:], strict=True))
        return dx if needs[0] else None, dw, db, *(None,) * 5


def _forward(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    momenta: Sequence[float],
    eps: float,
    channels: int,
) -> tuple[Tensor, Tensor]:
    """Writes y, (k, n, P), moves the running statistics; returns μ and s, (k, 1, C)."""
    n = x.shape[1] * x.shape[2] // channels
    mean = _fold(x.sum(1, keepdim=True), channels).div_(n)
    squares = _fold(_mse_loss(x, _spread(mean, x), 0).sum(1, keepdim=True), channels)
    if running[0] is not None and running[1] is not None:
        keep, shares = _shares(momenta)
        weights = x.new_tensor(shares)
        running[0].mul_(keep).addmv_(mean[:, 0].t(), weights)
        running[1].mul_(keep).addmv_(squares[:, 0].t(), weights, alpha=1 / (n - 1))
    invstd = squares.div_(n).add_(eps).rsqrt_()
    scale = invstd if weight is None else invstd * weight
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    torch.addcmul(_spread(shift, x), x, _spread(scale, x), out=y)
    return mean, invstd


def _backward(
    x: Tensor, dy: Tensor, dx: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes ∂x; returns ∂γ and ∂β, summed over the ghosts."""
    channels = mean.shape[2]
    n = x.shape[1] * x.shape[2] // channels
    total = _fold(dy.sum(1, keepdim=True), channels)
    slope = _fold(_mse_loss_backward(dy, x, _spread(mean, x), 0, grad_input=dx).sum(1, keepdim=True), channels)
    slope.mul_(invstd)  # 2·∂γ
    scale, pull = invstd if weight is None else invstd * weight, slope * invstd
    shift = torch.addcmul(total, pull, mean, value=-0.5).mul_(scale).div_(-n)
    torch.addcmul(dy, x, _spread(pull, x), value=-0.5 / n, out=dx)
    torch.addcmul(_spread(shift, x), dx, _spread(scale, x), out=dx)
    return slope.sum((0, 1)).div_(2), total.sum((0, 1))


def _shares(momenta: Sequence[float]) -> tuple[float, list[float]]:
    """What run ← (1 - η)·run + η·stat, for one ghost after another, leaves of the first run and of each stat."""
    keep, shares = 1.0, []
    for eta in reversed(momenta):
        shares.append(eta * keep)
        keep *= 1 - eta
    return keep, shares[::-1]


def _split(cut: list[tuple[int, int]], *tensors: Tensor) -> list[Sequence[Tensor]]:
    examples = [k * size for k, size in cut]
    return [torch.split(t, examples) if len(cut) > 1 else [t] for t in tensors]


def _sum(each: tuple[Tensor, ...]) -> Tensor:
    return each[0] if len(each) == 1 else torch.stack(each).sum(0)


def _rows(x: Tensor, k: int) -> Tensor:
    """(k·g, C, ...) as (k, n, P): P is C, or C times the places in the plain layout."""
    return x.movedim(1, -1).view(k, -1, x.shape[1]) if is_channels_last(x) else x.view(k, len(x) // k, -1)


def _fold(sums: Tensor, channels: int) -> Tensor:
    """(k, 1, P) summed over places."""
    return sums if sums.shape[2] == channels else sums.view(len(sums), 1, channels, -1).sum(3)


def _spread(s: Tensor, x: Tensor) -> Tensor:
    """(k, 1, C) repeated over the places of x, (k, n, P): rows as long as x has them are the faster ones."""
    return s if s.shape[2] == x.shape[2] else s.repeat_interleave(x.shape[2] // s.shape[2], 2)
