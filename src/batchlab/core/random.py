"""Randomness as a function of a seed and labels, so that nothing random needs to be saved."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def derive_seed(seed: int, *labels: str | int) -> int:
    """A 64-bit seed from a seed and labels, the same in every process and version.

    >>> derive_seed(0, "update", 3) == derive_seed(0, "update", 3) != derive_seed(0, "update", 4)
    True
    """
    text = "\x1f".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64, of each number: a permutation of 64 bits that looks random.

    >>> int(mix64(np.array([1], dtype=np.uint64))[0])
    6238072747940578789
    """
    z = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@cache
def _accelerator() -> Any:
    """torch's module for the accelerator of this machine, or None."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if device is None else torch.get_device_module(device)


def reseed(seed: int) -> None:
    """Sets the global generators of torch (all devices), numpy and Python.

    Unlike `torch.manual_seed` it costs microseconds: that one records a stack trace at each call before CUDA starts.
    """
    torch.default_generator.manual_seed(seed)
    if _accelerator() is not None:
        _accelerator().manual_seed_all(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def _seeded_devices() -> range:
    """The accelerators with generators of their own; none in the fork of a process that used CUDA, which cannot."""
    if _accelerator() is None or torch.cuda._is_in_bad_fork():
        return range(0)
    return range(_accelerator().device_count())


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Gives the caller's global generators back as they were, whatever happens inside."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(_seeded_devices()):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
