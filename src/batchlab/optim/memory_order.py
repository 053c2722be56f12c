"""torch's SGD, Adam and AdamW, whose fused steps on CPUs go through memory as it lies, with that in one order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchlab.parallel.shards import is_spread

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class _InOrder(torch.optim.Optimizer):
    """One that keeps the order before each step, and whose copies do: torch's copies have no hooks."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.register_step_pre_hook(keep_order)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if keep_order not in self._optimizer_step_pre_hooks.values():
            self.register_step_pre_hook(keep_order)


class SGD(_InOrder, torch.optim.SGD):
    """torch's."""


class Adam(_InOrder, torch.optim.Adam):
    """torch's."""


class AdamW(_InOrder, torch.optim.AdamW):
    """torch's."""


IN_ORDER: dict[Any, type[torch.optim.Optimizer]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
}


def keep_order(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A hook before each step: gradients and states of weights of four or five dimensions lie as the weights do.

    They do not where a state of another order was loaded, or the model made channels_last in mid-run: torch 2.13's
    fused steps would then take each number for another's. Where a weight lies in no dense order, torch's choice of a
    step is taken from then on.
    """
    for group in optimizer.param_groups:
        for p in group["params"] if group.get("fused") else ():
            if p.ndim not in _LAST or p.grad is None or is_spread(p):
                continue
            if not (p.is_contiguous() or p.is_contiguous(memory_format=_LAST[p.ndim])):
                group["fused"] = None
                break
            p.grad = _as_it_lies(p.grad, p)
            for name, value in optimizer.state.get(p, {}).items():
                optimizer.state[p][name] = _as_it_lies(value, p)


def _as_it_lies(value: Any, p: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.shape != p.shape or value.stride() == p.stride():
        return value
    return torch.empty_like(p, dtype=value.dtype).copy_(value)
