"""What a step did to each tensor, of any optimizer: |Δw|/|w|, and what the optimizer itself notes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from batchlab.parallel.shards import over_meshes, share

MOST = 64


def watched_step(
    step: Callable[[], Any], optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], *, most: int = MOST
) -> dict[str, dict[str, float]]:
    """Takes the step; returns by name `update_ratio`, |Δw|/|w| with w before it, and the optimizer's own `report`.

    parameters: by name; of more than `most` the largest are watched. Costs a copy of them. A tensor whose norm was 0
    has an infinite ratio where it moved, else 0. Spread tensors count whole: every rank must call.

    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> w.grad = torch.tensor([0.0, 5.0])
    >>> sgd = torch.optim.SGD([w], lr=0.1)
    >>> watched_step(sgd.step, sgd, {"w": w})
    {'w': {'update_ratio': 0.1}}
    """
    names = sorted(parameters, key=lambda name: -parameters[name].numel())[:most]
    watched = {name: parameters[name] for name in parameters if name in set(names)}
    before = {name: share(p.detach()).part.clone() for name, p in watched.items()}
    watching = getattr(optimizer, "watching", contextlib.nullcontext)
    with watching():
        step()
    norms = _norms(watched, before)
    found = {name: {"update_ratio": _ratio(p, *norms[name])} for name, p in watched.items()}
    noted: Any = getattr(optimizer, "report", dict)()
    for name, values in noted.items() if isinstance(noted, Mapping) else ():
        if name in found:
            found[name] |= {
                what: value for what, value in values.items() if what not in ("update_ratio", "weight_norm")
            }
    return found


def _norms(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """|Δw| and |w| of what this rank holds of each: one wait for the device."""
    found: list[Tensor] = []
    for name, old in before.items():
        part, dtype = share(now[name].detach()).part, torch.promote_types(old.dtype, torch.float32)
        found.append(torch.stack([torch.linalg.vector_norm(each, dtype=dtype) for each in (part - old, old)]))
    rows = torch.stack([each.to(found[0].device) for each in found]).tolist() if found else []
    return dict(zip(before, rows, strict=True))


def _ratio(parameter: Tensor, change: float, norm: float) -> float:
    _, mesh, holders = share(parameter.detach())
    moved, size = over_meshes({mesh: [each**2 / holders for each in (change, norm)]})
    return math.sqrt(moved / size) if size else (math.inf if moved else 0.0)
