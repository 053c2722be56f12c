"""How convex the loss is over a plane: |λ_min/λ_max| of the Hessian at its points (Li et al. 2018, section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.core.random import derive_seed
from batchlab.measure.hessian.lanczos import extremes, lanczos
from batchlab.measure.hessian.loss_surface import LossSurface
from batchlab.measure.surface.directions import Axes, Direction, ignored, trainable
from batchlab.measure.surface.displaced import Loss, MeanLoss, displaceable
from batchlab.measure.surface.grid_points import Array, fill
from batchlab.measure.surface.landscape import chosen_directions, grid_axes

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class HessianMap(JsonNoun):
    """The largest and the smallest eigenvalue of the mean loss's Hessian at θ + x[i]·d₁ + y[j]·d₂, by [i][j].

    residuals: so near to each of the two, at most, lies an eigenvalue. parameters: the Hessian's size. examples: of
    one pass. NaN: not yet evaluated. Where the Hessian is not finite the largest is inf and the smallest -inf.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    largest: Rows
    smallest: Rows
    residuals: Rows
    parameters: int
    examples: int

    @property
    def ratios(self) -> Rows:
        """|λ_min/λ_max|: near 0 where the loss is nearly convex. NaN where it is undefined."""
        pairs = zip(self.smallest, self.largest, strict=True)
        return tuple(tuple(_ratio(low, high) for low, high in zip(*rows, strict=True)) for rows in pairs)

    @property
    def worst_residual(self) -> float:
        """The largest residual in shares of the largest |λ| of its point; NaN where no point has one."""
        points = zip(np.ravel(self.residuals), np.ravel(self.largest), np.ravel(self.smallest), strict=True)
        shares = [r / max(abs(high), abs(low)) for r, high, low in points if math.isfinite(r) and (high or low)]
        return float(max(shares, default=math.nan))


def _ratio(smallest: float, largest: float) -> float:
    return abs(smallest / largest) if math.isfinite(smallest) and math.isfinite(largest) and largest else math.nan


def hessian_map(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Any],
    *,
    points: int = 11,
    span: float = 1.0,
    norm: str = "filter",
    ignore: str | None = "biasbn",
    directions: Sequence[Direction] | None = None,
    coordinates: tuple[Sequence[float], Sequence[float]] | None = None,
    axes: Axes | None = None,
    tolerance: float = 1e-2,
    max_steps: int = 128,
    count: Callable[[Any], int] | None = None,
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
    progress: Callable[[HessianMap], None] | None = None,
) -> HessianMap:
    """The extreme eigenvalues of the Hessian over the plane of a 2-D `landscape`, by Lanczos.

    All arguments that `landscape` has are as there, and with the same ones the plane is the same. All batches are held
    on the model's device.
    ignore: "biasbn" takes the Hessian over the other parameters alone, as the reference code does.
    tolerance: of the residuals, in shares of the largest |λ|; as many Lanczos steps as that takes, from 16 by doubling
        up to max_steps. What was reached is in `residuals`; a Ritz value lies within the spectrum, so that an end not
        reached is too small in size. Memory: as many vectors as steps, each as large as the weights.

    The Hessian is that of the mean over all examples, for batches of unequal size too. The reference code adds up the
    mean losses of its batches: its eigenvalues are larger by the number of batches, and the ratio is the same.

    A point costs two or more dozen Hessian products over the data, each about 4 forward passes: take few points and a
    few hundred examples.

    Raises `InputError` where the loss has no second derivative in torch, and without the extra "curvature".
    """
    x, y = grid_axes(2, points, span, coordinates)
    if not 0 < tolerance < 1 or isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 2:
        raise InputError(
            f"tolerance must lie in (0, 1) and max_steps be at least 2, got {tolerance!r} and {max_steps!r}"
        )
    drawn = chosen_directions(model, 2, directions, norm, ignore, axes, seed)
    with displaceable(model) as weights, _frozen(model, ignored(model) if ignore else set()):
        mean = MeanLoss(model, loss, data, count, seed)
        pieces = list(mean.batches())
        curved = LossSurface(model, loss, seed=seed)
        unfilled = ((math.nan,) * len(y),) * len(x)
        start = HessianMap(x, y, unfilled, unfilled, unfilled, curved.size, mean.examples)

        def evaluate(point: int) -> list[float]:
            i, j = divmod(point, len(y))
            weights.move((x[i], y[j]), drawn)
            return _extremes(curved.hessian(pieces), tolerance, max_steps, seed)

        def made(values: Array) -> HessianMap:
            parts = [tuple(map(tuple, part.tolist())) for part in values.T.reshape(3, len(x), len(y))]
            return replace(start, largest=parts[0], smallest=parts[1], residuals=parts[2])

        report = None if progress is None else lambda values: progress(made(values))
        with curved.still():
            return made(fill(np.full((len(x) * len(y), 3), math.nan), evaluate, process_group, report))


def _extremes(hessian: Any, tolerance: float, max_steps: int, seed: int) -> list[float]:
    """λ_max, λ_min and the larger of their residuals."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "lanczos"))
    probe = torch.randn(hessian.shape[0], generator=generator, dtype=torch.float64, device="cpu")
    if not (hessian @ probe.to(hessian.device, hessian.dtype)).isfinite().all():
        return [math.inf, -math.inf, math.inf]
    steps = min(16, max_steps)
    while True:
        run = lanczos(hessian, steps, generator)
        (largest,), (smallest,) = extremes(hessian, run, 1)
        residual = max(largest.residual, smallest.residual)
        if residual <= tolerance * run.scale or steps >= min(max_steps, hessian.shape[0]):
            return [largest.value, smallest.value, residual]
        steps = min(2 * steps, max_steps)


@contextmanager
def _frozen(model: nn.Module, names: set[str]) -> Iterator[None]:
    """The named parameters without gradients meanwhile: the Hessian is over the others."""
    held = [p for name, p in trainable(model).items() if name in names]
    try:
        for p in held:
            p.requires_grad_(False)
        yield
    finally:
        for p in held:
            p.requires_grad_(True)
