"""Watches the distribution of Adam's updates, layer by layer, for the state that precedes loss spikes (2304.09871).

While gradients are independent in time, u = m̂/(√v̂ + ε) is a narrow bell of variance (1 - β1)/(1 + β1). Where a layer's
gradients become as small as ε or correlated in time, as large batches make them, u turns into two peaks near ±1: a
large step with little relation to descent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.measure.course.adam_reading import AlarmLimits, LayerRecord, LayerStability, StabilityReading, describe
from batchlab.measure.course.adam_state import AdamState, Moments, Watched, places
from batchlab.measure.course.adam_update import update_bound, white_variance
from batchlab.parallel.shards import is_spread

GRANULARITIES = ("parameter", "layer")


class AdamStability:
    """Reads the updates of an Adam-like optimizer every few steps, and warns.

        stability = AdamStability(optimizer, model=model)
        ...                                   # train as before; zero_grad comes after optimizer.step
        stability.reading.alarms              # of the last reading; or give on_reading
        stability.close()

    optimizer: Adam, AdamW, NAdam or RAdam of torch, in any of its forms, or another whose state has "exp_avg",
    "exp_avg_sq" and "step"; with `amsgrad` the maximum is v. NAdam's look-ahead and RAdam's rectification are not in
    u. A step hook reads the state and `.grad` after the update, and changes nothing. model: for its parameters' names.
    by: "parameter", or "layer" for all parameters of a module together. every: steps between readings; the default 50
    keeps the cost small. coordinates: at most so many of each parameter, a fixed random subset by `seed`; the default
    16384 gives var u to 1 % at one reading. lag_memory: weight that `lag1` keeps at each reading, 1 for all alike.
    dip: also Hartigan's dip of layers that are whole on this rank (needs the package diptest; sorts every layer).
    limits: of the alarms. on_reading: called with each reading. `reading` is the last one, None before the first.

    No alarm is raised before t > 3/(1 - β2), while v̂ still forms. Sharded parameters (`fully_shard`, DTensor) are
    read where they lie and their sums added over the ranks, exactly: all ranks must step together. process_group: for
    plain tensors that each hold a part of a layer (flat shards): the ranks whose parts make the whole.

    An alarm is evidence, not proof: layers may live with correlated gradients for long, and spikes come by other ways.
    On small networks the "frozen" alarm came tens to hundreds of steps before the spikes of full-batch training, and
    none came before those of mini-batch training (benchmarks/adam_stability_lead.py).
    Not for optimizers without a second moment, nor for 8-bit states, which must be dequantised, nor for a step that is
    replayed from a CUDA graph, where no hook runs.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        model: nn.Module | None = None,
        by: str = "parameter",
        every: int = 50,
        coordinates: int = 16384,
        seed: int = 0,
        lag_memory: float = 0.9,
        dip: bool = False,
        limits: AlarmLimits | None = None,
        process_group: dist.ProcessGroup | None = None,
        on_reading: Callable[[StabilityReading], None] | None = None,
    ) -> None:
        if by not in GRANULARITIES:
            raise InputError(f'by must be "parameter" or "layer", got {by!r}')
        check_count(every=every, coordinates=coordinates)
        if not 0 <= lag_memory <= 1:
            raise InputError(f"lag_memory must lie in [0, 1], got {lag_memory!r}")
        if "betas" not in optimizer.defaults or "eps" not in optimizer.defaults:
            raise TypeError(
                f'{type(optimizer).__name__} keeps no "exp_avg_sq" in its state: its updates are not Adam\'s'
            )
        if by == "layer" and model is None and not all("param_names" in group for group in optimizer.param_groups):
            raise InputError(
                'by="layer" needs the parameters\' names: give model, or named_parameters to the optimizer'
            )
        if any(p.is_complex() for group in optimizer.param_groups for p in group["params"]):
            raise InputError("the updates of complex parameters are not defined here: view them as real ones")
        self._diptest = _load_diptest() if dip else None
        self._state, self._by, self._every, self._coordinates = AdamState(optimizer), by, every, coordinates
        self._seed, self._lag_memory, self._limits = seed, lag_memory, limits or AlarmLimits()
        self._process_group, self._on_reading = process_group, on_reading
        self._names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
        self._watched: dict[int, Watched] = {}
        self._records: dict[str, LayerRecord] = {}
        self._loaded: dict[str, Tensor] = {}
        self._steps = 0
        self.reading: StabilityReading | None = None
        hook: Any = torch.compiler.disable(self._after_step)  # type: ignore[no-untyped-call]
        self._handle = optimizer.register_step_post_hook(hook)

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        self._steps += 1
        reads, keeps = self._steps % self._every == 0, (self._steps + 1) % self._every == 0
        if not (reads or keeps):
            return
        self._watch()
        if reads:
            self.reading = self._read()
        for watched in self._watched.values():
            gradient = watched.parameter.grad
            watched.before = watched.pick(gradient).clone() if keeps and gradient is not None else None
        if reads and self._on_reading is not None and self.reading is not None:
            self._on_reading(self.reading)

    def _watch(self) -> None:
        """Takes up what the optimizer has gained."""
        for index, group in enumerate(self._state.optimizer.param_groups):
            for place, p in enumerate(group["params"]):
                if id(p) in self._watched or not p.requires_grad:
                    continue
                known = group.get("param_names")
                name = self._names.get(id(p)) or (known[place] if known else f"group{index}.{place}")
                layer = name if self._by == "parameter" else name.rpartition(".")[0] or name
                layer = f"{layer} (group {index})" if self._by == "layer" and index else layer
                self._records.setdefault(layer, LayerRecord())
                number = list(self._records).index(layer)
                chosen = places(p, self._coordinates, self._seed, name)
                self._watched[id(p)] = Watched(name, number, p, index, chosen, self._loaded.pop(name, None))

    def _read(self) -> StabilityReading:
        watched = list(self._watched.values())
        ready = self._state.ready(watched)
        sums = self._state.sums(ready, watched, len(self._records), self._process_group)
        parts: dict[int, list[tuple[Watched, Moments]]] = {}
        for each, moments in ready:
            parts.setdefault(each.layer, []).append((each, moments))
        layers, records = [], list(self._records.items())
        for number, own in sorted(parts.items()):
            name, record = records[number]
            last = max((moments for _, moments in own), key=lambda moments: moments.t)
            white, bound = white_variance(last.betas[0]), update_bound(last.betas, last.t)
            layer = self._with_dip(describe(name, sums[number], last.t, bound, white), own)
            warm = last.t * (1 - last.betas[1]) > 3 * (1 + 1e-9)  # 3/(1 - 0.95) is a little under 60
            layers.append(record.take(layer, sums[number].lag1, self._lag_memory, self._limits, white=white, warm=warm))
        return StabilityReading(self._steps, tuple(layers))

    def _with_dip(self, layer: LayerStability, own: list[tuple[Watched, Moments]]) -> LayerStability:
        whole = self._process_group is None and not any(is_spread(each.parameter) for each, _ in own)
        if self._diptest is None or not whole or layer.coordinates < self._limits.fewest:
            return layer
        u = torch.cat([self._state.update(each, moments) for each, moments in own]).double().cpu()
        if not bool(u.isfinite().all()):
            return layer
        dip, p = self._diptest.diptest(u.numpy())
        return replace(layer, dip=float(dip), dip_p=float(p))

    def updates(self, name: str) -> Tensor:
        """u of a layer's watched coordinates that have a gradient now, on this rank, as the state is now; flat.

        For a histogram beside the Gaussian of variance (1 - β1)/(1 + β1).
        """
        self._watch()
        if name not in self._records:
            raise InputError(f"name must be one of {list(self._records)!r:.200}, got {name!r}")
        number = list(self._records).index(name)
        own = [each for each in self._watched.values() if each.layer == number]
        found = [self._state.update(each, moments) for each, moments in self._state.ready(own)]
        return torch.cat(found) if found else torch.empty(0)

    def close(self) -> None:
        """Takes the hook off the optimizer; the last reading stays."""
        self._handle.remove()

    def __enter__(self) -> AdamStability:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Counters and running statistics as plain numbers, and the gradients kept for the next reading as tensors.

        The subset of coordinates follows from the seed and is not in it. With shards, each rank's own.
        """
        self._watch()
        before = {each.name: each.before.clone() for each in self._watched.values() if each.before is not None}
        return {
            "steps": self._steps,
            "settings": self._settings(),
            "layers": {name: record.state_dict() for name, record in self._records.items()},
            "before": before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; refuses a state of other coordinates."""
        if state["settings"] != self._settings():
            raise InputError(f"this state was read with {state['settings']}, got {self._settings()}")
        self._watch()
        if unknown := sorted(set(state["layers"]) - set(self._records)):
            raise InputError(f"the state's layer {unknown[0]!r} is not one of the optimizer's")
        self._steps, self._loaded = state["steps"], dict(state["before"])
        for name, record in state["layers"].items():
            self._records[name].load_state_dict(record)
        for each in self._watched.values():
            kept = self._loaded.pop(each.name, None)
            each.before = None if kept is None else kept.to(each.parameter.device, copy=True)

    def _settings(self) -> dict[str, Any]:
        return {"by": self._by, "every": self._every, "coordinates": self._coordinates, "seed": self._seed}


def _load_diptest() -> Any:
    try:
        import diptest  # type: ignore[import-untyped]
    except ImportError:
        raise InputError("dip needs the package diptest: pip install diptest") from None
    return diptest
