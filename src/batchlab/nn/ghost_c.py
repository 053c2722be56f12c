"""Ghost batch normalisation on a CPU by C code (`ghosts.c`): all ghosts in one call, forward and backward."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from batchlab.core.c_library import library
from batchlab.nn.ghost_cpu import Differentiable, gradients_of
from batchlab.nn.parts import is_batched, is_channels_last

_SOURCE = Path(__file__).with_name("ghosts.c")
PARALLEL_FROM = 2**15  # numbers from which on more threads than one pay


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("ghosts", "size", "rest", "channels", "places", "last")]


def ghosts_in_c(
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
    """As `ghost_cpu.ghosts_on_cpu`, for what `ghost_cpu.takes` takes."""
    apply = cast(Callable[..., Tensor], _GhostsInC.apply)
    return apply(x, weight, bias, (running_mean, running_var), tuple(sizes), tuple(momenta), eps, again)


def may_be_c(x: Tensor, *others: Tensor | None) -> bool:
    """Whether `ghosts_in_c` is for what `ghost_cpu.takes` takes: it reads memory itself, and no mode may look on."""
    for t in others:
        if t is not None and not t.is_contiguous():
            return False
    return not x._is_zerotensor() and not torch._C._len_torch_dispatch_stack()


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
        again: Differentiable,
    ) -> Tensor:
        y, stats = torch.empty_like(x), x.new_empty(3, len(sizes), x.shape[1], dtype=torch.float64)
        _functions(x.dtype).forward(
            _shape(x.shape, is_channels_last(x), sizes), _threads(x), x.data_ptr(), _at(weight), _at(bias),
            y.data_ptr(), stats.data_ptr(), _at(running[0]), _at(running[1]), _doubles(momenta), eps,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, stats)
        ctx.bias = bias  # no gradient depends on its values: an update in place may come before the backward pass
        ctx.sizes, ctx.again = sizes, again
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, stats), bias = ctx.saved_tensors, ctx.bias
        needs = ctx.needs_input_grad[:3]
        if (twice := torch.is_grad_enabled()) or is_batched(dy) or not _as_they_were(x, dy, weight, stats):
            return *gradients_of(ctx.again, (x, weight, bias), needs, dy, twice=twice), *(None,) * 5
        if dy.stride() != x.stride() or dy.is_neg() or dy._is_zerotensor():
            dy = torch.empty_like(x).copy_(dy)
        dx, room = torch.empty_like(x) if needs[0] else None, torch.empty_like(stats)
        dweight, dbias = (x.new_empty(x.shape[1]) if need else None for need in needs[1:])
        _functions(x.dtype).backward(
            _shape(x.shape, is_channels_last(x), ctx.sizes), _threads(x), x.data_ptr(), dy.data_ptr(), _at(weight),
            _at(dx), stats.data_ptr(), room.data_ptr(), _at(dweight), _at(dbias),
        )  # fmt: skip
        return dx, dweight, dbias, *(None,) * 5


def _as_they_were(x: Tensor, dy: Tensor, weight: Tensor | None, stats: Tensor) -> bool:
    """Whether what was saved can be read by its address: hooks may have put it away and brought back something else."""
    dense = x.is_contiguous() or is_channels_last(x)
    plain = type(dy) is Tensor and dy.dtype is x.dtype and dense and stats.is_contiguous()
    whole = weight is None or (weight.dtype is x.dtype and weight.is_contiguous())
    return plain and whole and stats.dtype is torch.float64 and x.is_cpu and stats.is_cpu


class _Functions(NamedTuple):
    forward: Callable[..., None]
    backward: Callable[..., None]


@cache
def _functions(dtype: torch.dtype) -> _Functions:
    """With their arguments declared, so that plain integers are addresses."""
    made, place = library(_SOURCE, dtype), ctypes.c_void_p
    made.ghosts_forward.argtypes = [place, ctypes.c_int, *[place] * 8, ctypes.c_double]
    made.ghosts_backward.argtypes = [place, ctypes.c_int, *[place] * 8]
    return _Functions(made.ghosts_forward, made.ghosts_backward)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= PARALLEL_FROM else 1


@lru_cache(maxsize=256)
def _shape(shape: tuple[int, ...], last: bool, sizes: tuple[int, ...]) -> Any:
    places = math.prod(shape[2:])
    return ctypes.byref(_Shape(len(sizes), sizes[0], sizes[-1], shape[1], places, int(last or places == 1)))


@lru_cache(maxsize=256)
def _doubles(numbers: tuple[float, ...]) -> Any:
    return (ctypes.c_double * len(numbers))(*numbers)
