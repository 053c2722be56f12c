"""How far the weights have gone from where they began, |w_t - w_0|, and how it grows (Hoffer et al., 1705.08741)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchlab.core.checks import is_count
from batchlab.core.errors import InputError
from batchlab.measure.course.diffusion import Diffusion, fit_diffusion
from batchlab.measure.norms import sq_norm, to_floats
from batchlab.parallel.shards import Mesh, over_meshes, share

PER_DECADE = 20
_CHUNK = 2**22


class WeightDistance:
    """Follows |w_t - w_0| over updates in any training loop, at little cost.

        distance = WeightDistance(model)
        for batch in batches:
            ...
            optimizer.step()
            distance.step()
        diffusion = distance.fit(low=3, high=100)

    model: its parameters that require a gradient when this is made are followed, a shared one once; buffers are not.
    Make it when the weights are w_0. per_layer: keep the distance of each parameter too, by its name. per_decade: so
    many updates in each factor of 10 are recorded, spaced evenly in log t; None records each.
    device: where the copy of w_0 is kept, in the parameters' own dtype; by default beside each parameter. "cpu" spares
    the accelerator's memory and costs a transfer at each recorded update.

    Between recorded updates nothing is computed: 10^6 updates record about 110 times. Differences are taken in
    float32, or float64 for float64 parameters. Parameters spread over ranks (FSDP2 and other DTensors) keep their own
    shard of w_0, and all ranks of their mesh must call `step` alike; under DDP each rank computes the same.

    It tells how fast a run diffuses, not how well it learns: runs at different batch sizes that follow one line have
    their learning rates set alike, in the sense of that paper. The logarithm belongs to the early phase at a constant
    rate; after the loss has vanished, under weight decay or a decayed rate, it does not hold: read `fit`'s R².
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        per_layer: bool = False,
        per_decade: int | None = PER_DECADE,
        device: str | torch.device | None = None,
    ) -> None:
        if per_decade is not None and not is_count(per_decade):
            raise InputError(f"per_decade must be an integer of at least 1, or None, got {per_decade!r}")
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not self._named:
            raise InputError("the model has no parameter that requires a gradient")
        if any(p.is_complex() for _, p in self._named):
            raise InputError("the distance of complex parameters is not defined here: view them as real ones")
        self.per_layer, self._per_decade = per_layer, per_decade
        self._start = [_copy(parameter, device) for _, parameter in self._named]
        self.updates = 0
        self._points: list[tuple[int, float]] = []
        self._layers: list[list[float]] = []

    def step(self) -> float | None:
        """After an optimizer step: the distance if this update is recorded, else None."""
        self.updates += 1
        if not self._recorded(self.updates):
            return None
        squares = self._squares()
        distance = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan
        self._points.append((self.updates, distance))
        if self.per_layer:
            self._layers.append([math.sqrt(square) for square in squares])
        return distance

    def _recorded(self, t: int) -> bool:
        """Whether t is the first whole number in one of the bins that are even in log t."""
        if self._per_decade is None or t == 1:
            return True
        return math.floor(self._per_decade * math.log10(t)) > math.floor(self._per_decade * math.log10(t - 1))

    @torch.no_grad()
    def _squares(self) -> list[float]:
        """|w_t - w_0|² of each parameter, over all its shards."""
        places: list[Mesh | None] = []
        scalars: list[float | Tensor] = []
        for (_, parameter), start in zip(self._named, self._start, strict=True):
            held = share(parameter.detach())
            places.append(held.mesh)
            scalars.append(_sq_distance(held.part, start) / held.holders)
        squares = to_floats(scalars)
        if all(mesh is None for mesh in places):
            return squares
        meshes = list(dict.fromkeys(places))
        return over_meshes(
            {each: [s if mesh == each else 0.0 for s, mesh in zip(squares, places, strict=True)] for each in meshes}
        )

    def points(self, layer: str | None = None) -> list[tuple[int, float]]:
        """(update, distance) of each recorded update: of the whole model, or of one parameter by its name."""
        if layer is None:
            return list(self._points)
        names = [name for name, _ in self._named]
        if not self.per_layer or layer not in names:
            known = f"one of {names}" if self.per_layer else "None: per_layer was not asked for"
            raise InputError(f"layer must be {known}, got {layer!r}")
        place = names.index(layer)
        return [(t, squares[place]) for (t, _), squares in zip(self._points, self._layers, strict=True)]

    def fit(
        self, *, low: int = 1, high: int | None = None, layer: str | None = None, coverage: float = 0.95
    ) -> Diffusion:
        """distance = a + b·ln t over the recorded updates low..high (to the last if None); see `fit_diffusion`."""
        return fit_diffusion(self.points(layer), low=low, high=high, coverage=coverage)

    def state_dict(self) -> dict[str, Any]:
        """The updates counted, the points, and w_0 as this rank holds it, by parameter name."""
        start = {name: copy for (name, _), copy in zip(self._named, self._start, strict=True)}
        points, layers = [list(point) for point in self._points], [list(each) for each in self._layers]
        return {"updates": self.updates, "points": points, "layers": layers, "start": start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave, on a model with the same parameters, spread in the same way."""
        shapes = {name: tuple(copy.shape) for (name, _), copy in zip(self._named, self._start, strict=True)}
        given = {name: tuple(copy.shape) for name, copy in state["start"].items()}
        if given != shapes:
            differing = sorted(name for name in {*given, *shapes} if given.get(name) != shapes.get(name))
            raise InputError(f"the state is of another model or another spread over ranks: {differing[0]!r} differs")
        if len(state["layers"]) != (len(state["points"]) if self.per_layer else 0):
            raise InputError(f"the state is of per_layer={not self.per_layer}, this is of per_layer={self.per_layer}")
        for (name, _), copy in zip(self._named, self._start, strict=True):
            copy.copy_(state["start"][name])
        self.updates = int(state["updates"])
        self._points = [(int(t), float(distance)) for t, distance in state["points"]]
        self._layers = [[float(square) for square in each] for each in state["layers"]]


def _copy(parameter: Tensor, device: str | torch.device | None) -> Tensor:
    part = share(parameter.detach()).part
    return part.clone() if device is None else part.to(device, copy=True)


def _sq_distance(part: Tensor, start: Tensor) -> Tensor:
    """|part - start|² in float32 at least, 2^22 numbers at a time."""
    wide = torch.float64 if part.dtype == torch.float64 else torch.float32
    pairs = zip(torch.split(part.reshape(-1), _CHUNK), torch.split(start.reshape(-1), _CHUNK), strict=True)
    squares = [sq_norm(now.to(wide) - then.to(now.device).to(wide)) for now, then in pairs]
    return torch.stack(squares).sum()
