"""What all of DiLoCo's replicas hold alike: θ and v of each weight, and the SGD that moves them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from batchlab.core.errors import InputError
from batchlab.parallel.shards import is_spread, part_like, share

Named = Sequence[tuple[str, Tensor]]


class CommonWeights:
    """θ by weight, in float32 or the weight's own finer type; of a sharded weight, what this rank holds of it."""

    def __init__(self, *, lr: float, momentum: float, nesterov: bool) -> None:
        self.sgd = torch.optim.SGD([{"params": []}], lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0)
        self._theta: dict[Tensor, Tensor] = {}

    def __contains__(self, p: Tensor) -> bool:
        return p in self._theta

    def of(self, p: Tensor) -> Tensor:
        """θ of a weight; where it has none yet, as the weight is now."""
        if p not in self._theta:
            held = part_of(p)
            self._theta[p] = held.to(wide(held)).clone(memory_format=torch.contiguous_format)
            self.sgd.param_groups[0]["params"].append(self._theta[p])
        return self._theta[p]

    def pairs(self, named: Named) -> list[tuple[Tensor, Tensor]]:
        """Each trained weight's part and its θ, in the order of the names, whenever they were taken in."""
        return [(part_of(p), self._theta[p]) for _, p in named if p in self._theta]

    def velocity(self, theta: Tensor) -> Tensor:
        """v, zeros at first, from which SGD's first step is the same as from none."""
        state = self.sgd.state[theta]
        if state.get("momentum_buffer") is None:  # SGD without momentum leaves None
            state["momentum_buffer"] = torch.zeros_like(theta)
        velocity: Tensor = state["momentum_buffer"]
        return velocity

    def stop(self, named: Named) -> None:
        """v ← 0 of weights that are frozen by now: what was v would go on to move them."""
        for _, p in named:
            if p in self._theta and not p.requires_grad:
                self.sgd.state.pop(self._theta[p], None)

    def move(self, thetas: Sequence[Tensor], deltas: Iterable[Tensor]) -> None:
        """v ← μv + Δ; θ ← θ - η(Δ + μv)."""
        for theta, delta in zip(thetas, deltas, strict=True):
            theta.grad = delta
        self.sgd.step()
        self.sgd.zero_grad()

    def state(self, named: Named) -> dict[str, Any]:
        """θ and v by parameter, None where there is none, and the settings of the outer step."""
        thetas = [self._theta.get(p) for _, p in named]
        velocities = [None if theta is None else self.sgd.state[theta].get("momentum_buffer") for theta in thetas]
        return {
            "theta": [_spread_like(p, theta) for (_, p), theta in zip(named, thetas, strict=True)],
            "velocity": [_spread_like(p, v) for (_, p), v in zip(named, velocities, strict=True)],
            "outer": {key: value for key, value in self.sgd.param_groups[0].items() if key != "params"},
        }

    @torch.no_grad()
    def load(self, named: Named, saved: Mapping[str, Any]) -> None:
        """Takes over what `state` gave; weights that were frozen then and are trained now have θ as they are."""
        for (_, p), theta, v in zip(named, saved["theta"], saved["velocity"], strict=True):
            if theta is None and p not in self:
                continue
            mine = self.of(p)
            mine.copy_(part_of(p) if theta is None else part_like(theta, p))
            if v is not None:
                self.velocity(mine).copy_(part_like(v, p))
            else:
                self.sgd.state.pop(mine, None)
        self.sgd.param_groups[0].update(saved["outer"])


def check_state(named: Named, saved: Mapping[str, Any]) -> None:
    """Refuses a state of other parameters."""
    if len(saved["theta"]) != len(named):
        raise InputError(f"state_dict must be of {len(named)} parameters, got {len(saved['theta'])}")
    for (name, p), theta in zip(named, saved["theta"], strict=True):
        if theta is not None and theta.shape != p.shape:
            raise InputError(f"θ of {name} must be of shape {tuple(p.shape)}, got {tuple(theta.shape)}")


def named_parameters(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, Tensor]]:
    """All parameters in the order of an optimizer's groups, by their own names or their places."""
    found: list[tuple[str, Tensor]] = []
    for i, group in enumerate(groups):
        places = [f"param_groups[{i}]['params'][{j}]" for j in range(len(group["params"]))]
        found += zip(group.get("param_names") or places, group["params"], strict=True)
    return found


def check_real(name: str, p: Tensor) -> None:
    """Refuses complex weights, and weights that have no values yet."""
    if p.is_complex():
        raise InputError(f"DiLoCo needs real weights, got a complex {name}: make it a parameter by torch.view_as_real")
    if p.is_meta:
        raise InputError(f"DiLoCo needs weights with values, but {name} is on meta: give it some before DiLoCo is made")


def wide(tensor: Tensor) -> torch.dtype:
    """The type that sums and differences of a tensor are kept in: float32, or its own if that is finer."""
    return torch.promote_types(tensor.dtype, torch.float32)


def part_of(p: Tensor) -> Tensor:
    """What this rank holds of a weight, to be written in place."""
    return share(p.detach()).part


def _spread_like(p: Tensor, part: Tensor | None) -> Tensor | None:
    """A DTensor of this rank's part if the weight is one."""
    if part is None or not is_spread(p):
        return part
    from torch.distributed.tensor import DTensor

    spread: Any = p
    where = (spread.device_mesh, spread.placements)
    return DTensor.from_local(part, *where, run_check=False, shape=p.shape, stride=spread.stride())
