"""The device that a caller names, or the one that there is, and what it makes of float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from batchlab.core.errors import InputError

TF32_EPS = 2.0**-10
_MATMUL: Any = torch.backends.cuda.matmul
_BACKENDS: tuple[Any, ...] = (_MATMUL, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)  # type: ignore[attr-defined]


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """`device` itself if this machine has it; by default the first GPU, else the CPU.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError, TypeError) as error:
        said = str(error).splitlines()[0]
        raise InputError(
            f"device must be one that torch finds here, as cpu or cuda:0, got {device!r}: {said}"
        ) from None
    return picked


def product_eps(like: Tensor) -> float:
    """The relative spacing of the numbers that a matrix product or a convolution of such tensors is made of.

    Of their dtype; of TF32 for float32 on a GPU where torch may round to it: by default in convolutions.
    """
    return TF32_EPS if like.is_cuda and like.dtype == torch.float32 and _tf32() else torch.finfo(like.dtype).eps


def _tf32() -> bool:
    return any(each.fp32_precision not in ("ieee", "none") for each in _BACKENDS)


@contextlib.contextmanager
def whole_float32() -> Iterator[None]:
    """Within it no float32 product or convolution is rounded to TF32; torch's switches are then as they were."""
    with _older_switches() if _older_are_in_use() else _newer_switches():
        yield


def _older_are_in_use() -> bool:
    """Whether torch's older switches can be read: it refuses where the newer ones were set otherwise."""
    try:
        return isinstance(torch.backends.cudnn.allow_tf32, bool) and isinstance(_MATMUL.allow_tf32, bool)
    except RuntimeError:
        return False


@contextlib.contextmanager
def _older_switches() -> Iterator[None]:
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = False
        if products != "highest":  # to set what is so already would change what the newer switches say
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        if products != "highest":
            torch.set_float32_matmul_precision(products)


@contextlib.contextmanager
def _newer_switches() -> Iterator[None]:
    held = [each.fp32_precision for each in _BACKENDS]
    try:
        for each in _BACKENDS:
            each.fp32_precision = "ieee"
        yield
    finally:
        for each, precision in zip(_BACKENDS, held, strict=True):
            each.fp32_precision = precision
