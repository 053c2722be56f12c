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
    found = {name: {"update_ratio": _ratio(p, before[name])} for name, p in watched.items()}
    noted: Any = getattr(optimizer, "report", dict)()
    for name, values in noted.items() if isinstance(noted, Mapping) else ():
        if name in found:
            found[name] |= {
                what: value for what, value in values.items() if what not in ("update_ratio", "weight_norm")
            }
    return found


def _ratio(parameter: Tensor, before: Tensor) -> float:
    part, mesh, holders = share(parameter.detach())
    dtype = torch.promote_types(part.dtype, torch.float32)
    squares = [float(torch.linalg.vector_norm(each, dtype=dtype)) ** 2 for each in (part - before, before)]
    moved, size = over_meshes({mesh: [each / holders for each in squares]})
    return math.sqrt(moved / size) if size else (math.inf if moved else 0.0)
