"""Knowing an out-of-memory error when it comes, and letting go of what it holds."""

from __future__ import annotations

import gc
import traceback

import torch

TEXTS = (
    "out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "CUFFT_INTERNAL_ERROR",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "Cannot allocate memory",
    "MODULE:PT_DEVMEM Allocation failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: by type, or a `RuntimeError` by its text.

    `torch.OutOfMemoryError` and `MemoryError` are; of other runtime errors those of CUDA, HIP, XPU, MPS, cuDNN,
    cuBLAS, cuFFT, HPU and the CPU allocator. An internal cuFFT error and an unsupported cuDNN configuration count,
    for that is how these libraries answer when they find no room for their workspace.

    >>> is_out_of_memory(RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"))
    True
    >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)


def let_go(error: BaseException, handled: BaseException | None = None) -> None:
    """Drops the frames that an error holds, and with them the tensors of the step that failed.

    The error's causes and contexts are treated alike, but for `handled`: what the caller was handling when the step
    began is not of the step. Type and text stay.
    """
    seen: set[int] = {id(handled)}
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        todo += [each.__cause__, each.__context__]
        if each.__traceback__ is not None:
            traceback.clear_frames(each.__traceback__)
        each.__traceback__ = None


def free(device: torch.device | None = None) -> None:
    """Collects garbage and gives cached memory back to the device and to the operating system."""
    gc.collect()
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        torch.cuda.empty_cache()
    _trim_heap()


def _trim_heap() -> None:
    """glibc keeps freed memory; `malloc_trim` returns it. Other C libraries have no such call, and need none."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
