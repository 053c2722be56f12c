"""Ghost batch normalisation: each small part of a large batch is normalised alone (Hoffer et al. 2017, 1705.08741).

A batch of B examples in their order is k = ⌈B/g⌉ ghosts of g; each has its own mean μ_i and biased variance over its
examples and places, all share γ and β. The running statistics take in one ghost after another,

    run ← (1-η)·run + η·stat_i, i = 1..k,   that is   (1-η)^k·run + Σ_i η·(1-η)^(k-i)·stat_i

with the variance's divisor n - 1, as PyTorch has it. The paper prints (1-η)^|B_S| before the old value, B_S the ghost
size, and (1-η)^i with i from 1 before the i-th ghost: weights that do not add to 1 and forget all at every step.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.core.c_library import compiler
from batchlab.core.checks import as_count, check_count
from batchlab.core.errors import InputError
from batchlab.nn.ghost_c import ghosts_in_c, may_be_c
from batchlab.nn.ghost_cpu import ghosts_on_cpu, takes
from batchlab.nn.parts import OfParts, change_kind, check_channels, parts_at_once

Ragged = Literal["own", "merge", "refuse"]
_RAGGED = get_args(Ragged)

# Numbers in a ghost from which a call for each beats two copies: measured on a CPU with PyTorch's layouts (32 x 64 and
# 8 x 16 x 8 x 8 below or at it, 32 x 16 x 4 x 4 above); on accelerators reckoned from 40 µs a call and 2 TB/s.
_LOOP_FROM, _LOOP_FROM_ACCELERATED = 2**13, 2**21


def ghost_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    ghost_size: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    ragged: Ragged = "own",
    interleaved: bool = False,
    loop: bool | None = None,
    fused: bool = False,
) -> Tensor:
    """`F.batch_norm` over each ghost of the batch, of the input's shape (B, C, ...); without `training` the same as it.

    running_mean, running_var: (C,), changed in place in training, or None. momentum: η; None for the plain mean over
    all ghosts, which needs num_batches_tracked, an integer tensor; that counts ghosts and is raised by k where given.
    ragged: of the B mod g examples that are left over, "own": they are a smaller ghost of their own, but with a single
    value a channel, which has no variance, they join the ghost before it; "merge": they always join it; "refuse":
    `InputError`. A batch smaller than a ghost is one ghost for the first two; an empty one has none and stays empty.
    interleaved: among the full ghosts example i is in ghost i mod k, instead of ghosts in order. For shuffled batches
    it is the same in distribution, and inputs in PyTorch's plain layout are then not copied. Not for channels_last.
    loop: a call for each ghost, or one call for all; None takes the faster way by size and device, on a CPU one that
    copies less (`ghost_cpu`). The results differ by rounding. Under `torch.compile` it is one call.
    fused: on a CPU, for ghosts in order, all by one call of C code, which is compiled at the first: a second,
    and a C compiler; without one, as if not asked for. It takes half the time of the other ways.

    >>> x = torch.arange(8.0).reshape(8, 1)
    >>> ghost_batch_norm(x, None, None, 4, training=True).flatten().round(decimals=2)
    tensor([-1.3400, -0.4500,  0.4500,  1.3400, -1.3400, -0.4500,  0.4500,  1.3400])
    """
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, eps=eps)
    check_channels(input, weight, bias, running_mean, running_var)
    if (running_mean is None) != (running_var is None):
        raise InputError("running_mean and running_var must both be given or both be None")
    if running_mean is not None and momentum is None and num_batches_tracked is None:
        raise InputError("momentum None needs num_batches_tracked, the ghosts that the running statistics hold")
    if type(ghost_size) is not int:
        ghost_size = as_count(ghost_size=ghost_size)
    if not input.numel():  # no ghost: an empty output and gradient, and statistics as they are
        _check(ghost_size, ragged)
        return F.batch_norm(input, running_mean, running_var, weight, bias, True, 0.0, eps)
    full, rest = ghosts(len(input), ghost_size, math.prod(input.shape[2:]), ragged)
    k, tracked = full + (rest > 0), num_batches_tracked
    again = partial(_by_calls, full=full, ghost_size=ghost_size, rest=rest, eps=eps, interleaved=interleaved, loop=loop)
    if loop is None and not interleaved and k > 1 and takes(input, weight, bias, running_mean, running_var):
        sizes = (ghost_size,) * full + (rest,) * (rest > 0)
        if tracked is not None:
            tracked.add_(k)  # before what moves the statistics: activation checkpointing may end a pass right after it
        since = 1 if tracked is None or momentum is not None else int(tracked) - k + 1
        momenta = (momentum,) * k if momentum is not None else tuple([1 / (since + i) for i in range(k)])
        in_c = fused and may_be_c(input, weight, bias, running_mean, running_var) and compiler()
        way = ghosts_in_c if in_c else ghosts_on_cpu
        output = way(input, weight, bias, running_mean, running_var, sizes, momenta, eps, again)
    else:
        runs = (running_mean, running_var)
        stats = [None if run is None else run.new_zeros(k, len(run)) for run in runs]
        output = again(input, weight, bias, *stats)
        for run, each in zip(runs, stats, strict=True):
            if run is not None and each is not None:
                _advance(run, each, tracked, momentum)
        if tracked is not None:
            tracked.add_(k)
    return output


def _by_calls(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    full: int,
    ghost_size: int,
    rest: int,
    eps: float,
    interleaved: bool,
    loop: bool | None,
) -> Tensor:
    """By PyTorch's own calls; fills mean and var, (ghosts, C)."""
    at_once = full > 1 and (interleaved or not (_loops(x, ghost_size) if loop is None else loop))
    sizes = [full * ghost_size] * at_once + [ghost_size] * (0 if at_once else full) + [rest] * (rest > 0)
    parts = list(torch.split(x, sizes))  # not slices, whose backward passes would each fill a whole batch
    outputs = []
    if at_once:
        first = None if mean is None else mean[:full], None if var is None else var[:full]
        outputs = [parts_at_once(parts.pop(0), full, *first, weight, bias, 1.0, eps, interleaved=interleaved)]
    for i, part in enumerate(parts, full if at_once else 0):
        own = None if mean is None else mean[i], None if var is None else var[i]
        outputs.append(F.batch_norm(part, *own, weight, bias, True, 1.0, eps))  # momentum 1: the statistics themselves
    if len(outputs) == 1:
        return outputs[0]
    if not torch.is_autocast_enabled(x.device.type):
        return torch.cat(outputs)
    with torch.autocast(x.device.type, enabled=False):  # which on CPUs joins nothing that is in float16
        return torch.cat(outputs)


def ghosts(batch: int, ghost_size: int, values: int, ragged: Ragged = "own") -> tuple[int, int]:
    """How many full ghosts a batch has, and how many examples are in the one of another size after them (0: none).

    values: of each channel in one example, 1 without places. Raises `InputError` where a ghost would have one value.

    >>> ghosts(100, 32, 1), ghosts(97, 32, 1), ghosts(97, 32, 64), ghosts(100, 32, 1, "merge")
    ((3, 4), (2, 33), (3, 1), (2, 36))
    """
    _check(ghost_size, ragged)
    full, rest = batch // ghost_size, batch % ghost_size  # not divmod, which a compiled batch of any size has not
    if rest and ragged == "refuse":
        raise InputError(f"the batch must be a multiple of ghost_size {ghost_size}, got {batch} examples")
    if full and rest and (ragged == "merge" or rest * values < 2):
        full, rest = full - 1, rest + ghost_size
    if min(ghost_size if full else rest, rest or ghost_size) * values < 2:
        raise InputError(
            f"each ghost must have 2 values a channel, got {batch} examples of {values} and ghosts of {ghost_size}"
        )
    return full, rest


def _check(ghost_size: int, ragged: Ragged) -> None:
    check_count(ghost_size=ghost_size)
    if ragged not in _RAGGED:
        raise InputError(f"ragged must be one of {list(_RAGGED)}, got {ragged!r}")


def _loops(x: Tensor, ghost_size: int) -> bool:
    least = _LOOP_FROM if x.device.type == "cpu" else _LOOP_FROM_ACCELERATED
    return not torch.compiler.is_compiling() and ghost_size * x[0].numel() >= least


@torch.no_grad()
def _advance(run: Tensor, stats: Tensor, tracked: Tensor | None, momentum: float | None) -> None:
    """The running statistic after k ghosts in order; without a momentum, the mean over them and all before."""
    k = len(stats)
    if tracked is not None and momentum is None:
        run.add_((stats.mean(0) - run) * (k / (tracked + k).to(run.dtype)))
    elif momentum is not None:
        age = torch.arange(k - 1, -1, -1, device=run.device, dtype=run.dtype)
        # addmv_, not @, which autocast would do in half precision
        run.mul_((1 - momentum) ** k).addmv_(stats.t(), momentum * (1 - momentum) ** age)


class _GhostBatchNorm(OfParts):
    ghost_size: int
    ragged: Ragged
    interleaved: bool
    fused: bool = False  # of layers that were pickled before there was one

    def __init__(
        self,
        num_features: int,
        ghost_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        ragged: Ragged = "own",
        interleaved: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._set(ghost_size, ragged, interleaved, fused)

    def _set(self, ghost_size: int, ragged: Ragged, interleaved: bool, fused: bool) -> None:
        _check(ghost_size, ragged)
        self.ghost_size, self.ragged, self.interleaved, self.fused = int(ghost_size), ragged, interleaved, fused

    def _leave(self) -> None:
        for name in ("ghost_size", "ragged", "interleaved", "fused"):
            self.__dict__.pop(name, None)

    def forward(self, input: Tensor) -> Tensor:
        """Of the input's shape: by the ghosts' statistics in training, as `nn.BatchNorm` in evaluation."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        tracks = self.track_running_stats
        return ghost_batch_norm(
            input,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.ghost_size,
            self.weight,
            self.bias,
            True,
            self.momentum,
            self.eps,
            num_batches_tracked=self.num_batches_tracked if tracks else None,
            ragged=self.ragged,
            interleaved=self.interleaved,
            fused=self.fused,
        )

    def extra_repr(self) -> str:
        """As of `nn.BatchNorm`, with the ghosts."""
        more = ", interleaved=True" * self.interleaved + ", fused=True" * self.fused
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, ghost_size={self.ghost_size}, ragged={self.ragged!r}{more}"


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    """Ghost batch normalisation of (B, C) or (B, C, L); see `GhostBatchNorm2d`."""


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    """Ghost batch normalisation of (B, C, H, W): in training each `ghost_size` examples are normalised alone.

    num_features, eps, momentum, affine, track_running_stats: as of `nn.BatchNorm2d`. ragged, interleaved, fused: as of
    `ghost_batch_norm`. State, names and evaluation are those of `nn.BatchNorm2d`: each loads the other's.

    ghost_size: examples on this device, the batch at which the rest of the recipe was tuned (128 in the paper). With
    DDP each rank has ghosts of its own share, and ranks together do what one would with the whole batch; buffers are
    rank 0's, as DDP has it. Gradient accumulation by micro-batches of `ghost_size` gives the same with plain BatchNorm.
    num_batches_tracked counts ghosts: at one momentum the running statistics move k times as fast as plain ones, and
    the last ghost weighs most. Without running statistics evaluation is by the whole batch, as in `nn.BatchNorm2d`.

    Not for batches in the order of their classes (a ghost sees one), nor where BatchNorm's statistics are too noisy
    already: that is `nn.SyncBatchNorm`'s case, which joins what this divides, and
    `nn.SyncBatchNorm.convert_sync_batchnorm` would make plain synchronised layers of these. `torch.jit.script` takes a
    model after `convert_plain_batchnorm`, which evaluates alike.

    >>> layer = GhostBatchNorm2d(3, ghost_size=4)
    >>> y = layer(torch.randn(10, 3, 5, 5))
    >>> y[:4].mean().abs() < 1e-6, layer.num_batches_tracked
    (tensor(True), tensor(3))
    """


class GhostBatchNorm3d(_GhostBatchNorm, nn.BatchNorm3d):
    """Ghost batch normalisation of (B, C, D, H, W); see `GhostBatchNorm2d`."""


_GHOST: dict[type[nn.Module], type[_GhostBatchNorm]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.BatchNorm3d: GhostBatchNorm3d,
}


def convert_ghost_batchnorm(
    model: nn.Module, ghost_size: int, *, ragged: Ragged = "own", interleaved: bool = False, fused: bool = False
) -> nn.Module:
    """Makes each BatchNorm of the model a ghost one, in place; returns the model.

    The layers keep their parameters, statistics, hooks, modes and names, so that it may be called before or after an
    optimizer is made, weights are loaded or the model is wrapped in DDP. Layers that have ghosts get the new settings.
    A model without BatchNorm is left as it is. Raises `InputError` for SyncBatchNorm, lazy layers and subclasses with
    ways of their own.

    >>> convert_ghost_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), 32)[1].ghost_size
    32
    """
    _check(ghost_size, ragged)
    return change_kind(model, _GHOST, lambda layer: layer._set(ghost_size, ragged, interleaved, fused))
