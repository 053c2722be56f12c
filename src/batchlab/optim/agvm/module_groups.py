"""Parameter groups by the parts of a model: backbone, neck, heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchlab.core.errors import InputError


def groups_by_module(model: nn.Module, components: Sequence[str | Sequence[str]]) -> list[dict[str, Any]]:
    """One parameter group for each component, in their order, with its "name" and its parameters by name.

    components: names of modules or parameters of the model, dotted where they lie deeper; several in a tuple make one
    group. Frozen parameters are in it too. Raises `InputError` where a component has no parameters, where one
    parameter is in two of them (tied weights: put both into one tuple), or where a parameter is in none, for it would
    never be updated.

    >>> model = nn.ModuleDict({"backbone": nn.Linear(2, 3), "neck": nn.Tanh(), "head": nn.Linear(3, 1)})
    >>> backbone, head = groups_by_module(model, ["backbone", "head"])
    >>> backbone["name"], [name for name, _ in head["params"]]
    ('backbone', ['head.weight', 'head.bias'])
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(components, str) or not components:
        raise InputError(f"components must be a list of names, as in ['backbone', 'head'], got {components!r}")
    model = model.module if isinstance(model, DistributedDataParallel | nn.DataParallel) else model
    named = list(model.named_parameters(remove_duplicate=False))
    owner: dict[Tensor, str] = {}
    groups: list[dict[str, Any]] = []
    for component in components:
        prefixes = (component,) if isinstance(component, str) else tuple(component)
        label = "+".join(prefixes)
        members = []
        for name, p in [pair for prefix in prefixes for pair in _under(named, prefix)]:
            if p not in owner:
                members.append((name, p))
            elif owner[p] != label:
                raise InputError(f"{name} is in {owner[p]!r} and in {label!r}: make both one component, in a tuple")
            owner[p] = label
        groups.append({"params": members, "name": label})
    if left := list(dict.fromkeys(name for name, p in named if p not in owner)):
        raise InputError(
            f"components leave out {len(left)} of the model's parameters, which would never be updated: "
            f"{', '.join(left[:5])}{', ...' if len(left) > 5 else ''}"
        )
    return groups


def _under(named: Sequence[tuple[str, nn.Parameter]], prefix: str) -> list[tuple[str, nn.Parameter]]:
    found = [(name, p) for name, p in named if name == prefix or name.startswith(f"{prefix}.")]
    if not found:
        tops = list(dict.fromkeys(name.split(".")[0] for name, _ in named))
        raise InputError(f"components: the model has no parameters under {prefix!r}; at its top are {tops}")
    return found
