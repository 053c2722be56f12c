"""The device that a caller names, or the one that there is."""

from __future__ import annotations

import torch

from batchlab.core.errors import InputError


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
