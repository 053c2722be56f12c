"""The coordinate check of μP: whether an update changes activations as much in a wide model as in a narrow one.

Yang et al. 2022 (arXiv 2203.03466, appendix D.1). Models of several widths take a few updates on the same batches. Of
each module's output on the first batch, y_t after update t,

  Δ_t = √(mean (y_t - y_{t-1})²) ∝ width^s,

the mean over all its entries. Under μP (`rules.mup`) s is 0 for every module and update: then tuned learning rates
carry over between widths. With one rate for all widths Adam has s from 0.8 to 1.3 in hidden and output layers at first.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchlab.core.checks import check_count, check_inside, check_not_negative
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.core.random import derive_seed, preserved_generators, reseed
from batchlab.curves.log_line import LogLine

Outputs = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Coordinate(JsonNoun):
    """One module after one update. step: from 1. changes: Δ at each width, the geometric mean over seeds.

    slope: s, by least squares on the logarithms over all widths and seeds, each a model of its own; NaN where an output
    did not change at all, as below a readout that starts at zero.
    """

    module: str
    step: int
    changes: tuple[float, ...]
    slope: Estimate


@dataclass(frozen=True)
class CoordinateCheck(JsonNoun):
    """The changes of every module's output at every update, modules in the order of the forward pass."""

    widths: tuple[int, ...]
    seeds: int
    coordinates: tuple[Coordinate, ...]

    @property
    def steepest(self) -> Coordinate:
        """Of those that have a slope, the one that is farthest from 0."""
        known = [each for each in self.coordinates if each.slope.defined]
        if not known:
            raise InputError("no module's output changed: there is no slope")
        return max(known, key=lambda each: abs(each.slope.value))

    def flat(self, tolerance: float = 0.25) -> bool:
        """Whether no slope is farther from 0 than `tolerance`.

        0.25 is halfway between μP and the mildest mistake, a root of the width. At small widths μP itself is off by
        terms of 1/√width: a transformer of widths 64 to 256 has slopes to -0.18. Take wide ones, and read intervals.
        """
        check_not_negative(tolerance=tolerance)
        return abs(self.steepest.slope.value) <= tolerance

    def table(self) -> str:
        """A line for each module and update: the changes by width, and the slope with its interval."""
        return "\n".join(
            f"{each.module} after update {each.step}: "
            + ", ".join(f"{width} {change:.3g}" for width, change in zip(self.widths, each.changes, strict=True))
            + f"; slope {each.slope.value:.2f} [{each.slope.low:.2f}, {each.slope.high:.2f}]"
            for each in self.coordinates
        )


def coordinate_check(
    make: Callable[[int], nn.Module],
    optimizer: Callable[[nn.Module, int], torch.optim.Optimizer],
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    widths: Sequence[int],
    modules: Sequence[str] | None = None,
    seeds: int = 3,
    seed: int = 0,
    coverage: float = 0.95,
) -> CoordinateCheck:
    """Trains models of each width for one update a batch, and reports how the changes of activations go with width.

    make: width -> a model with fresh weights, drawn from torch's global generator. optimizer: (model, width) -> its
    optimizer, with the learning rates of that width. loss: `(model, batch)` -> scalar, the mean over the batch's
    examples, as in `Job`. batches: the same for all models, on their device; four are usual. The first is the probe.
    widths: at least three, each twice the one before or so, as wide as can be.
    modules: names, as `model.named_modules()` has them, of those to follow; by default all that have no modules inside.
    seeds: models of each width, each with weights of its own. seed: of all of them. coverage: of the intervals.

    Updates are taken in training mode, outputs in evaluation mode. Global generators are left as they were. A module
    that is used several times a pass counts as one; those that return no floating-point tensor are left out.

    Cost: seeds x widths x batches updates, and as many forward passes. Not a check of how well a model learns, and
    blind to what does not pass a module's output.

    >>> make = lambda width: nn.Linear(3, width, bias=False)
    >>> sgd = lambda model, width: torch.optim.SGD(model.parameters(), lr=1.0)
    >>> loss = lambda model, batch: model(batch).sum(1).mean()
    >>> found = coordinate_check(make, sgd, loss, [torch.ones(4, 3)], widths=[8, 16, 32])
    >>> found.coordinates[0].module, [round(change, 3) for change in found.coordinates[0].changes], found.flat()
    ('model', [3.0, 3.0, 3.0], True)
    """
    batches = list(batches)
    widths = _checked(widths)
    if not batches:
        raise InputError("batches must hold at least one, got none")
    check_count(seeds=seeds)
    check_inside(coverage=coverage)
    changes: dict[tuple[str, int], dict[int, list[float]]] = {}
    with preserved_generators():
        for width in widths:
            for number in range(seeds):
                reseed(derive_seed(seed, "coordinate check", width, number))
                for key, change in _changes(make(width), width, optimizer, loss, batches, modules):
                    changes.setdefault(key, {each: [] for each in widths})[width].append(change)
    found = [_coordinate(key, [*rows.values()], widths, seeds, coverage) for key, rows in changes.items()]
    return CoordinateCheck(tuple(widths), seeds, tuple(sorted(found, key=lambda each: each.step)))


def _checked(widths: Sequence[int]) -> list[int]:
    for width in widths:
        check_count(widths=width)
    if len(set(widths)) < 3 or list(widths) != sorted(set(widths)):
        raise InputError(f"widths must be at least 3, ascending, got {list(widths)!r}")
    return [int(width) for width in widths]


def _changes(
    model: nn.Module, width: int, optimizer: Any, loss: Any, batches: Sequence[Any], modules: Sequence[str] | None
) -> Iterator[tuple[tuple[str, int], float]]:
    """((module, update), Δ) along one model's training."""
    if not isinstance(model, nn.Module):
        raise InputError(f"make must return a torch.nn.Module, got {type(model).__name__}")
    steps, followed = optimizer(model, width), _followed(model, modules)
    before = _outputs(model, followed, loss, batches[0])
    for step, batch in enumerate(batches, 1):
        model.train()
        steps.zero_grad()
        loss(model, batch).backward()
        steps.step()
        after = _outputs(model, followed, loss, batches[0])
        for name, tensors in after.items():
            yield (name, step), _root_mean_square(name, width, before.get(name, []), tensors)
        before = after


def _followed(model: nn.Module, modules: Sequence[str] | None) -> Mapping[str, nn.Module]:
    named = {name or "model": module for name, module in model.named_modules()}
    if modules is None:
        return {name: module for name, module in named.items() if not any(True for _ in module.children())}
    if unknown := [name for name in modules if name not in named]:
        raise InputError(f"modules must be names of modules of the model, got {unknown[0]!r}; it has {sorted(named)}")
    return {name: named[name] for name in modules}


def _outputs(model: nn.Module, followed: Mapping[str, nn.Module], loss: Any, batch: Any) -> Outputs:
    """The outputs of each module, one tensor a use, in the order of their first use."""
    found: Outputs = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, Tensor) and first.is_floating_point():
                found.setdefault(name, []).append(first.detach().clone())

        return hook

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in followed.items():
            hooks.callback(module.register_forward_hook(keep(name)).remove)
        model.eval()
        loss(model, batch)
    return found


def _root_mean_square(name: str, width: int, before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Of all entries of all uses, in float64."""
    if [x.shape for x in before] != [x.shape for x in after]:
        raise InputError(f"the outputs of {name} must keep their shapes on one batch, at width {width}")
    total = math.fsum(float((b.double() - a.double()).square().sum()) for a, b in zip(before, after, strict=True))
    change = math.sqrt(total / sum(x.numel() for x in after))
    if not math.isfinite(change):
        raise InputError(f"the outputs of {name} are not finite at width {width}: lower its learning rate")
    return change


def _coordinate(
    key: tuple[str, int], rows: Sequence[Sequence[float]], widths: Sequence[int], seeds: int, coverage: float
) -> Coordinate:
    if [len(row) for row in rows] != [seeds] * len(widths):
        raise InputError(f"models of all widths must have the same modules, {key[0]} is not in all")
    if not all(change > 0 for row in rows for change in row):
        nothing = Estimate(math.nan, -math.inf, math.inf, "undefined: an output did not change", coverage)
        return Coordinate(*key, tuple(math.fsum(row) / seeds for row in rows), nothing)
    at = [width for width in widths for _ in range(seeds)]
    line = LogLine.through(at, [change for row in rows for change in row])
    means = tuple(math.exp(math.fsum(map(math.log, row)) / seeds) for row in rows)
    return Coordinate(*key, means, line.exponent(f"{len(at)} models", coverage))
