"""Numbers of Adam and its like, worked out before a rule runs: a compiled rule would do it at every element."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from batchlab.core.checks import holds
from batchlab.core.errors import InputError
from batchlab.optim.tables import stream_of


def bias_corrections(betas: Sequence[float], t: int) -> tuple[float, ...]:
    """1 - βᵗ: the sum of the weights of an average that started from zero t updates ago.

    >>> bias_corrections((0.5, 0.9), 2)
    (0.75, 0.18999999999999995)
    """
    return tuple(1 - beta**t for beta in betas)


def adam_numbers(
    like: Tensor,
    *,
    lr: float | Tensor,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    t: int,
    bias_correction: bool = True,
) -> dict[str, Any]:
    """What `lamb_` takes of Adam's step t: with k = (1 - β₁ᵗ)/√(1 - β₂ᵗ), ε' = ε·√(1 - β₂ᵗ), λ' = λk, η' = η/k

      m ← m + a₁(g - m);   v ← b₂v + a₂g²;   w ← w - η'·[m/(√v + ε') + λ'w]  =  w - η·[m̂/(√v̂ + ε) + λw]

    rate and decay, η' and λ', and with them b₂, ε' and k are tensors of `like`'s kind: most move from step to step, and
    a compiled rule would be compiled anew for numbers, or take 20 µs for each to make a tensor of it. decays: whether λ
    is not 0.
    """
    known = (tuple(betas), eps, weight_decay, t if bias_correction else None)
    k, numbers = _shared(like.dtype, like.device, stream_of(like.device), *known)
    return numbers | {"rate": rate_of(lr, like, by=k)}


@lru_cache(maxsize=256)
def _shared(
    dtype: torch.dtype,
    device: torch.device,
    stream: int,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    t: int | None,
) -> tuple[float, dict[str, Any]]:
    """k, and what is one for all tensors of a group at step t (None: without a correction): nobody may change it."""
    c1, c2 = (1.0, 1.0) if t is None else bias_corrections(betas, t)
    k = c1 / c2**0.5
    moving = {"keep2": betas[1], "eps": eps * c2**0.5, "decay": weight_decay * k, "k": k}
    numbers: dict[str, Any] = {name: scalar(value, dtype, device) for name, value in moving.items()}
    return k, numbers | {"share1": 1 - betas[0], "share2": 1 - betas[1], "decays": weight_decay != 0}


def rate_of(lr: float | Tensor, like: Tensor, *, by: float = 1.0) -> Tensor:
    """η divided by a number, as a tensor of `like`'s kind."""
    if isinstance(lr, Tensor):
        return lr.to(like.device, like.dtype) / by
    return scalar(lr / by, like.dtype, like.device)


def scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor without dimensions, the same one for the same number and stream: nobody may change it."""
    return _scalar(value, dtype, device, stream_of(device))


@lru_cache(maxsize=256)
def _scalar(value: float, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)  # torch.tensor would wait for a GPU to take it


def check_betas(betas: Sequence[float], count: int = 2, name: str = "betas") -> None:
    """Refuses all but `count` numbers in [0, 1)."""
    good = isinstance(betas, Sequence) and len(betas) == count
    if not good or not all(holds(lambda beta: 0 <= beta < 1, beta) for beta in betas):
        raise InputError(f"{name} must be {count} numbers in [0, 1), got {betas!r}")
