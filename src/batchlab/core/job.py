"""`Job`: what to train. `Target`: when it has learned enough. Neither knows of batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from batchlab.core.errors import InputError

if TYPE_CHECKING:  # plans, facts and all that rests on rules name a Target, and answer without torch
    from torch import Tensor, nn


class MapDataset(Sized, Protocol):
    """A map-style data set: `len(data)` and `data[i]`; `data.__getitems__(list)` is used where it exists."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Target:
    """When a run has learned enough: `metric` has reached `value`.

    metric: a key of the dict that the job's metric returns; "loss" for the validation loss.
    value: in that metric's own unit.
    direction: "min" if smaller is better, else "max". Equality reaches the target; NaN never does.

    >>> Target("accuracy", 0.9, "max").reached(0.91)
    True
    """

    metric: str
    value: float
    direction: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if self.direction not in ("min", "max"):
            raise InputError(f'target direction must be "min" or "max", got {self.direction!r}')
        if not math.isfinite(self.value):
            raise InputError(f"target value must be finite, got {self.value!r}")

    def __str__(self) -> str:
        return f"{self.metric} of at {'most' if self.direction == 'min' else 'least'} {self.value:.10g}"

    def reached(self, measured: float) -> bool:
        """Whether `measured` is as good as the target."""
        return measured <= self.value if self.direction == "min" else measured >= self.value


@dataclass(frozen=True)
class Job:
    """What to train, and how to tell whether it learns. A job knows nothing of batch size.

    name: shown in reports and stored with runs.
    model: returns a module with fresh weights, drawn from torch's global generator.
    loss: `(module, batch) -> scalar`, the mean over the batch's examples (or tokens, see `unit`).
    train, valid: map-style data sets; `valid` must not share examples with `train`.
    metric: `(module, batch) -> dict` of means over the batch; the validation loss is always added as "loss".
    collate: list of examples -> batch, as in `torch.utils.data.DataLoader`.
    unit: what a batch is counted in when shown, "example" or "token".
    units_per_example: how many units one example holds; or a function `batch -> count` where that varies,
        and then `loss` must be the mean over those units: micro-batches are weighted by their count.
    optimizer: a name that `batchlab.optim.create` knows.
    target: when a run has learned enough; without one, `probe` sets it from a reference run and says so.

    >>> from torch import nn
    >>> data = [(float(i), 2.0 * i) for i in range(8)]
    >>> def squared_error(model, batch):
    ...     x, y = batch
    ...     return (model(x.float()[:, None]) - y[:, None]).square().mean()
    >>> Job("line", lambda: nn.Linear(1, 1), squared_error, train=data, valid=data).unit
    'example'
    """

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    train: MapDataset
    valid: MapDataset
    metric: Callable[[nn.Module, Any], Mapping[str, Any]] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    unit: Literal["example", "token"] = "example"
    units_per_example: int | Callable[[Any], int] = 1
    optimizer: str = "adamw"
    target: Target | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"job name must be a non-empty string, got {self.name!r}")
        from torch import nn

        if isinstance(self.model, nn.Module):
            raise InputError(
                f"job model must be a function that returns a fresh module, got a {type(self.model).__name__}: "
                "each run needs weights of its own"
            )
        for field in ("model", "loss", "metric", "collate"):
            value = getattr(self, field)
            optional = field in ("metric", "collate")
            if not (callable(value) or (optional and value is None)):
                raise InputError(f"job {field} must be callable{' or None' if optional else ''}, got {value!r}")
        for field in ("train", "valid"):
            data = getattr(self, field)
            if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
                raise InputError(
                    f"job {field} must be a map-style data set with len() and [], got {type(data).__name__}"
                )
            if len(data) == 0:
                raise InputError(f"job {field} data set is empty")
        if self.unit not in ("example", "token"):
            raise InputError(f'job unit must be "example" or "token", got {self.unit!r}')
        if not callable(self.units_per_example) and self.units_per_example < 1:
            raise InputError(f"job units_per_example must be at least 1, got {self.units_per_example!r}")
        if self.target is not None and not isinstance(self.target, Target):
            raise InputError(f"job target must be a batchlab.Target, got {self.target!r}")
