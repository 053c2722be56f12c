"""Ghost batch normalisation on a CPU by C code (`ghosts.c`): all ghosts in one call, forward and backward."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from batchlab.core.c_library import library
from batchlab.nn.parts import is_batched, is_channels_last

_SOURCE = Path(__file__).with_name("ghosts.c")
PARALLEL_FROM = 2**15  # numbers from which on more threads than one pay


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("ghosts", "size", "rest", "channels", "places", "last")]


class _Stats(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("mean", "invstd", "spread")]


class _Sums(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("slopes", "totals")]


def ghosts_in_c(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    sizes: Sequence[int],
    momenta: Sequence[float],
    eps: float,
    again: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
) -> Tensor:
    """As `ghost_cpu.ghosts_on_cpu`, for what `ghost_cpu.takes` takes."""
    apply = cast(Callable[..., Tensor], _GhostsInC.apply)
    return apply(x, weight, bias, (running_mean, running_var), tuple(sizes), tuple(momenta), eps, again)


class _GhostsInC(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        sizes: tuple[int, ...],
        momenta: tuple[float, ...],
        eps: float,
        again: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    ) -> Tensor:
        shape, threads = _shape(tuple(x.shape), is_channels_last(x), sizes), _threads(x)
        y, stats = torch.empty_like(x), x.new_empty(3, len(sizes), x.shape[1], dtype=torch.float64)
        call = library(_SOURCE, x.dtype).ghosts_forward
        weight_at, bias_at, mean_at, var_at = map(_at, (weight, bias, *running))
        call(
            ctypes.byref(shape), threads, _at(x), weight_at, bias_at, _at(y), ctypes.byref(_stats(stats)), mean_at,
            var_at, _doubles(momenta), ctypes.c_double(eps),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.sizes, ctx.again = sizes, again
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if (twice := torch.is_grad_enabled()) or is_batched(dy):
            wanted = [t for t, need in zip((x, weight, bias), needs, strict=True) if need]
            with torch.enable_grad():
                y = ctx.again(x, weight, bias)
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=twice))
            return *(next(found) if need else None for need in needs), *(None,) * 5
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        shape, threads = _shape(tuple(x.shape), is_channels_last(x), ctx.sizes), _threads(x)
        dx, both, sums = (
            torch.empty_like(x) if needs[0] else None,
            x.new_empty(2, x.shape[1]),
            torch.empty_like(stats[:2]),
        )
        call = library(_SOURCE, x.dtype).ghosts_backward
        step = sums.numel() * 4  # bytes of one of its two
        held = _Sums(sums.data_ptr(), sums.data_ptr() + step)
        dweight, dbias = both.unbind()
        call(
            ctypes.byref(shape), threads, _at(x), _at(dy), _at(weight), _at(dx), ctypes.byref(_stats(stats)),
            ctypes.byref(held), _at(dweight), _at(dbias),
        )  # fmt: skip
        return dx, dweight if needs[1] else None, dbias if needs[2] else None, *(None,) * 5


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _stats(stats: Tensor) -> _Stats:
    first, step = stats.data_ptr(), 8 * stats[0].numel()
    return _Stats(first, first + step, first + 2 * step)


def _threads(x: Tensor) -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads() if x.numel() >= PARALLEL_FROM else 1)


@lru_cache(maxsize=256)
def _shape(shape: tuple[int, ...], last: bool, sizes: tuple[int, ...]) -> _Shape:
    places = math.prod(shape[2:])
    return _Shape(len(sizes), sizes[0], sizes[-1], shape[1], places, int(last or places == 1))


@lru_cache(maxsize=256)
def _doubles(numbers: tuple[float, ...]) -> Any:
    return (ctypes.c_double * len(numbers))(*numbers)
