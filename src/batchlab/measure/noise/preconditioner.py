"""The geometry an Adam-like optimizer steps in, as weights of squared gradients.

The update θ ← θ - ε·P⁻¹g is plain descent in φ = P^½θ, where the gradient is P^-½g: the noise scale that belongs to it
is tr(P⁻¹Σ)/(GᵀP⁻¹G), from |g|² weighted by 1/P. P = √v̂, v̂ the bias-corrected mean of squared gradients, is damped by a
share of its root mean square over all coordinates: where a coordinate has hardly had a gradient yet, 1/√v̂ is huge and
the undamped number has no usable variance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from batchlab.core.errors import InputError
from batchlab.measure.norms import to_floats, total
from batchlab.parallel.shards import Mesh, over_meshes, share

DAMPING = 0.1
MEAN_SQUARES = ("max_exp_avg_sq", "exp_avg_sq", "square_avg")  # the first is what amsgrad divides by


class Preconditioner:
    """w = 1/(√v̂ + damping·rms(√v̂)) for each parameter, read from an optimizer's state at each `refresh`.

    optimizer: Adam, AdamW, NAdam, RAdam or RMSprop of torch, or another with "exp_avg_sq" or "square_avg" in its state;
    with amsgrad v is the largest such mean so far.
    damping: in units of the root mean square of √v̂ over all coordinates; the default 0.1 is batchlab's: 0.01 to 1
    give noise scales within 10 % of each other on the digits job, 0 one that scatters tenfold.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], *, damping: float = DAMPING
    ) -> None:
        if not damping > 0:
            raise InputError(f"damping must be > 0, got {damping!r}")
        if isinstance(optimizer, torch.optim.SGD):
            raise InputError("the optimizer must keep a mean of squared gradients, as Adam does; SGD keeps none")
        self._optimizer, self._parameters, self._damping = optimizer, parameters, damping
        self._decay = {
            p: group.get("betas", (0.0, 0.0))[1] for group in optimizer.param_groups for p in group["params"]
        }
        if missing := [p for p in parameters if p not in self._decay]:
            raise InputError(f"the optimizer does not hold {len(missing)} of the model's {len(parameters)} parameters")
        self._weights: dict[int, Tensor] = {}

    @torch.no_grad()
    def refresh(self) -> bool:
        """Reads the state anew; False while there is none, before the first update."""
        states = [self._optimizer.state.get(p, {}) for p in self._parameters]
        has = [bool({"exp_avg_sq", "square_avg"} & state.keys()) for state in states]
        if any(state and not kept for state, kept in zip(states, has, strict=True)):
            raise InputError("the optimizer keeps no mean of squared gradients: measure without preconditioning")
        if not any(has):
            self._weights = {}
            return False
        roots, known = [], [place for place, kept in enumerate(has) if kept]
        steps = to_floats([states[place].get("step", 0.0) for place in known])
        for place, step in zip(known, steps, strict=True):
            parameter, state = self._parameters[place], states[place]
            mean_sq = next(state[name] for name in MEAN_SQUARES if name in state)
            seen = 1.0 - self._decay[parameter] ** step if "exp_avg_sq" in state else 1.0
            roots.append((mean_sq / seen).sqrt())
        count = sum(root.numel() for root in roots)
        floor = self._damping * math.sqrt(_sum_of_squares(roots) / count)
        if floor > 0:
            parts = [share(root).part for root in roots]
            torch._foreach_add_(parts, floor)
            torch._foreach_reciprocal_(parts)
        self._weights = dict(zip(known, roots, strict=True)) if floor > 0 else {}
        return floor > 0

    @property
    def known(self) -> bool:
        """Whether the last `refresh` found a state."""
        return bool(self._weights)

    def __getitem__(self, index: int) -> Tensor:
        """The weights of a parameter's coordinates, in its own shape and spread as it is.

        0 for a parameter that the optimizer has not stepped yet: there is no geometry to measure it in.
        """
        held = self._weights.get(index)
        return torch.zeros_like(self._parameters[index]) if held is None else held


def _sum_of_squares(tensors: list[Tensor]) -> float:
    shares = [share(tensor) for tensor in tensors]
    norms = torch._foreach_norm([each.part for each in shares])
    sums: dict[Mesh | None, list[Tensor]] = {}
    for norm, each in zip(norms, shares, strict=True):
        sums.setdefault(each.mesh, []).append(norm.double().square() / each.holders)
    return over_meshes({mesh: [total(squares)] for mesh, squares in sums.items()})[0]
