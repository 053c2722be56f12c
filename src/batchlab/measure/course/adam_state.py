"""A fixed random subset of an Adam-like optimizer's state: chosen once, read where it lies, summed over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.core.random import derive_seed
from batchlab.measure.course.adam_update import UpdateSums, adam_update, update_sums
from batchlab.measure.norms import to_floats
from batchlab.parallel.shards import Mesh, over_meshes, share

CHUNK = 2**13
COLUMNS = len(UpdateSums._fields)


@dataclass
class Watched:
    """One parameter: its name, the layer it counts in, its group in the optimizer, and which coordinates are read.

    places: of this rank's part, None for all. before: the gradient there one step earlier, where it was kept.
    """

    name: str
    layer: int
    parameter: Tensor
    group: int
    places: Tensor | None
    before: Tensor | None = None

    @property
    def count(self) -> int:
        """Coordinates that are read on this rank."""
        return share(self.parameter).part.numel() if self.places is None else len(self.places)

    def pick(self, tensor: Tensor) -> Tensor:
        """The watched coordinates of this rank's part, flat, in float32, or in float64 where it is that."""
        dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        flat = share(dense).part.reshape(-1)
        chosen = flat if self.places is None else flat.index_select(0, self.places)
        return chosen if chosen.dtype == torch.float64 else chosen.float()


@dataclass(frozen=True)
class Moments:
    """An optimizer's constants for one parameter after update t: u's sign follows the gradient to be minimised."""

    betas: tuple[float, float]
    eps: float
    t: float
    sign: float


def places(parameter: Tensor, most: int, seed: int, name: str) -> Tensor | None:
    """One coordinate at random in each of equal stretches of this rank's part, `most` over all parts; None for all."""
    local, total = share(parameter.detach()).part, parameter.numel()
    count = math.ceil(most * local.numel() / total) if total else 0
    if local.numel() <= count:
        return None
    generator = torch.Generator().manual_seed(derive_seed(seed, "coordinates", name))
    within = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    found = (
        ((torch.arange(count, device="cpu") + within) * (local.numel() / count)).long().clamp_(max=local.numel() - 1)
    )
    return found.to(local.device)


class AdamState:
    """Reads the optimizer's "exp_avg", "exp_avg_sq" (or their maximum, with amsgrad) and "step"; changes nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def ready(self, watched: Sequence[Watched]) -> list[tuple[Watched, Moments]]:
        """Those that have been updated at least once."""
        found, counts = [], []
        for each in watched:
            state, group = self.optimizer.state.get(each.parameter), self.optimizer.param_groups[each.group]
            if not state:
                continue
            for key in ("exp_avg", "exp_avg_sq"):
                self._require(key, state)
            if "step" not in group:
                self._require("step", state)
            count = state["step"] if "step" in state else group["step"]
            counts.append(count if isinstance(count, Tensor) else float(count))
            found.append(each)
        pairs = zip(found, to_floats(counts), strict=True)
        return [(each, self._moments(each, t)) for each, t in pairs if t >= 1]

    def _require(self, key: str, state: Mapping[str, Any]) -> None:
        if key not in state:
            raise TypeError(
                f'{type(self.optimizer).__name__} keeps no "{key}" in its state: its updates are not Adam\'s'
            )

    def _moments(self, watched: Watched, t: float) -> Moments:
        group = self.optimizer.param_groups[watched.group]
        betas = (float(group["betas"][0]), float(group["betas"][1]))
        return Moments(betas, float(group["eps"]), t, -1.0 if group.get("maximize", False) else 1.0)

    def _mv(self, watched: Watched) -> tuple[Tensor, Tensor]:
        state = self.optimizer.state[watched.parameter]
        return watched.pick(state["exp_avg"]), watched.pick(state.get("max_exp_avg_sq", state["exp_avg_sq"]))

    def update(self, watched: Watched, moments: Moments) -> Tensor:
        """u on this rank, of the watched coordinates that have a gradient now."""
        m, v = self._mv(watched)
        gradient = watched.parameter.grad
        active = (m != 0) | (v != 0) if gradient is None else watched.pick(gradient) != 0
        return adam_update(m, v, moments.betas, moments.eps, moments.t)[0][active]

    def sums(
        self,
        ready: Sequence[tuple[Watched, Moments]],
        watched: Sequence[Watched],
        layers: int,
        group: dist.ProcessGroup | None,
    ) -> list[UpdateSums]:
        """Of each layer, over all ranks that hold a part of it: every one must call. watched: also those not ready."""
        tables: dict[Mesh | None, list[float]] = {}
        for each in watched:
            tables.setdefault(share(each.parameter).mesh, [0.0] * (COLUMNS * layers))
        for chunk in _chunks(ready):
            for (each, _), row in zip(chunk, self._chunk_sums(chunk).tolist(), strict=True):
                held = share(each.parameter)
                for column, number in enumerate(row, each.layer * COLUMNS):
                    tables[held.mesh][column] += number / held.holders
        if group is not None:
            device = "cpu" if "gloo" in str(dist.get_backend(group)) else torch.accelerator.current_accelerator()
            parts = torch.tensor(tables.get(None, [0.0] * (COLUMNS * layers)), dtype=torch.float64, device=device)
            dist.all_reduce(parts, group=group)
            tables[None] = parts.tolist()
        flat = over_meshes(tables)
        return [UpdateSums(*flat[start : start + COLUMNS]) for start in range(0, len(flat), COLUMNS)]

    def _chunk_sums(self, chunk: Sequence[tuple[Watched, Moments]]) -> Tensor:
        """A row of `UpdateSums` for each parameter; without a gradient, its columns are 0."""
        moments, ms, vs, gradients, befores, actives = chunk[0][1], [], [], [], [], []
        for each, _ in chunk:
            m, v = self._mv(each)
            gradient, before = each.parameter.grad, each.before
            ms.append(m)
            vs.append(v)
            gradients.append(torch.zeros_like(m) if gradient is None else each.pick(gradient).to(m.dtype))
            actives.append((m != 0) | (v != 0) if gradient is None else gradients[-1] != 0)
            befores.append(torch.zeros_like(m) if before is None else before.to(m))
        lengths = [len(m) for m in ms]
        columns = (ms, vs, gradients, befores, actives)
        m, v, g, p, active = (each[0] if len(each) == 1 else torch.cat(each) for each in columns)
        g, p = (g, p) if moments.sign == 1 else (-g, -p)
        u, root = adam_update(m, v, moments.betas, moments.eps, moments.t)
        return update_sums(u * active, root, g, p, active, moments.eps, lengths)


def _chunks(ready: Sequence[tuple[Watched, Moments]]) -> Iterator[list[tuple[Watched, Moments]]]:
    """Successive parameters that share device, type and constants: small ones together, a large one alone."""
    chunk: list[tuple[Watched, Moments]] = []
    key: Any = None
    size = 0
    for each, moments in ready:
        own = (each.parameter.device, each.parameter.dtype == torch.float64, moments)
        if chunk and (own != key or size + each.count > CHUNK):
            yield chunk
            chunk, size = [], 0
        chunk.append((each, moments))
        key, size = own, size + each.count
    if chunk:
        yield chunk
