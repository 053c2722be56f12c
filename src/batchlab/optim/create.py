"""Optimizers by name, with parameter groups that decay matrices and leave biases and norms alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.parallel.shards import is_spread

ADAM_LIKE = frozenset({"adam", "adamw", "rmsprop"})
_FUSED_WHERE_SPREAD = frozenset({"adam", "adamw"})

_OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


def names() -> list[str]:
    """The names that `create` knows."""
    return sorted(_OPTIMIZERS)


def check_name(name: str) -> str:
    """`name` itself; `InputError` naming what exists where there is no such optimizer."""
    if name not in _OPTIMIZERS:
        raise InputError(f"optimizer must be one of {names()}, got {name!r}")
    return name


def defaults(name: str) -> dict[str, Any]:
    """The hyperparameters that `create` uses unless told otherwise, torch's own but for SGD's momentum of 0.9."""
    make, ours = _OPTIMIZERS[check_name(name)]
    accepted = inspect.signature(make).parameters
    wanted = ("betas", "eps", "weight_decay", "momentum", "alpha")
    return {key: accepted[key].default for key in wanted if key in accepted} | ours


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: tensors of two or more dimensions with `weight_decay`, biases and norm scales without.

    Frozen parameters are left out; a shared parameter stands once.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, plain = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    both = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in both if group["params"]]


def create(name: str, model: nn.Module, **hyperparameters: Any) -> torch.optim.Optimizer:
    """The optimizer `name` over `model`'s trained parameters; hyperparameters by torch's names.

    >>> optimizer = create("sgd", nn.Linear(2, 1), lr=0.1)
    >>> [group["weight_decay"] for group in optimizer.param_groups], optimizer.defaults["momentum"]
    ([0, 0.0], 0.9)
    """
    make, ours = _OPTIMIZERS[check_name(name)]
    accepted = {key: value for key, value in inspect.signature(make).parameters.items() if key != "params"}
    if unknown := sorted(set(hyperparameters) - set(accepted)):
        raise InputError(f"{name} takes no hyperparameter {unknown[0]!r}; it takes {sorted(accepted)}")
    settings = ours | hyperparameters
    decay = settings.pop("weight_decay", accepted["weight_decay"].default)
    parameter_groups = groups(model, decay)
    if not parameter_groups:
        raise InputError("the model has no parameter that requires a gradient")
    if "fused" in accepted and not {"fused", "foreach", "capturable", "differentiable"} & settings.keys():
        settings["fused"] = _fused_is_faster(name, parameter_groups)
    try:
        return make(parameter_groups, **settings)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} refuses its hyperparameters: {error}") from None


def first_step(name: str) -> None:
    """One step of `name` on one number: at the first one torch loads its compiler, which takes a second or more."""
    line = nn.Linear(1, 1)
    optimizer = create(name, line, lr=0.1)
    line(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _fused_is_faster(name: str, parameter_groups: list[dict[str, Any]]) -> bool:
    """On CPU and CUDA torch's fused step is the fastest of its three where it exists: for floating-point parameters.

    For parameters that are spread over ranks torch (2.13) has Adam's alone.
    """
    parameters = [p for group in parameter_groups for p in group["params"]]
    if name not in _FUSED_WHERE_SPREAD and any(map(is_spread, parameters)):
        return False
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
