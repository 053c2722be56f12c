"""A model and its optimizer given back bit for bit after a trial: what a range test on a model in use needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from batchlab.core.random import preserved_generators


@contextlib.contextmanager
def restored(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Gives model and optimizer back as they were, bit for bit, whatever is done to them inside.

    That is parameters, buffers, gradients and the training mode of each part; the optimizer's state and groups; and
    the global generators. It holds a copy of all of them meanwhile. Parameters that are replaced inside, and not
    merely changed, are not seen; buffers are.
    """
    tensors = [*model.parameters(), *model.buffers()]
    copies = [tensor.detach().clone() for tensor in tensors]
    tables = [part._buffers for part in model.modules()]
    buffers = [(table, dict(table)) for table in tables if isinstance(table, dict)]  # a scripted module's is none
    gradients = [(p, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in model.parameters()]
    modes = [(part, part.training) for part in model.modules()]
    kept = None if optimizer is None else _Kept(optimizer)
    with preserved_generators():
        try:
            yield
        finally:
            with torch.no_grad():
                for table, before in buffers:
                    table.clear()
                    table.update(before)
                for tensor, copy in zip(tensors, copies, strict=True):
                    tensor.copy_(copy)
                for parameter, gradient, kept_gradient in gradients:
                    if gradient is not None and kept_gradient is not None:
                        gradient.copy_(kept_gradient)
                    parameter.grad = gradient
                for part, training in modes:
                    part.training = training
                if kept is not None:
                    kept.put_back(optimizer)


class _Kept:
    """What an optimizer held: the objects in its state and groups, and copies of the tensors among them.

    Lists and dicts in them are made anew, for they may grow where they are, as the history of LBFGS does.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._state = {p: tree_map(_itself, held) for p, held in optimizer.state.items()}
        self._groups = [
            {k: tree_map(_itself, v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ]
        held = tree_leaves([*self._state.values(), *self._groups])
        self._tensors = [(value, value.detach().clone()) for value in held if isinstance(value, torch.Tensor)]

    def put_back(self, optimizer: Any) -> None:
        for tensor, copy in self._tensors:
            tensor.copy_(copy)
        optimizer.state.clear()
        optimizer.state.update(self._state)
        del optimizer.param_groups[len(self._groups) :]
        for group, settings in zip(optimizer.param_groups, self._groups, strict=True):
            for key in set(group) - set(settings) - {"params"}:
                del group[key]
            group.update(settings)


def _itself(leaf: Any) -> Any:
    return leaf
