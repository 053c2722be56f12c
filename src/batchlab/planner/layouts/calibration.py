"""`fit_efficiency`: the efficiency constants from step times that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.planner.hardware import Cluster
from batchlab.planner.layouts.activations import Block
from batchlab.planner.layouts.grid import SHARDINGS, Grid
from batchlab.planner.layouts.memory import Array, Costing, Precision, precision_named
from batchlab.planner.layouts.rows import Measured
from batchlab.planner.layouts.shape import ModelShape
from batchlab.planner.layouts.step_time import Efficiency, step_time


@dataclass(frozen=True)
class FittedEfficiency(JsonNoun):
    """efficiency: with what was fitted. fitted: the names of it. error: root mean square of ln(measured/predicted)."""

    efficiency: Efficiency
    fitted: tuple[str, ...]
    error: float


def fit_efficiency(
    model: ModelShape,
    cluster: Cluster,
    measured: Sequence[Measured],
    *,
    global_batch: int,
    sequence_length: int,
    precision: str | Precision = "bf16",
    block: Block | None = None,
    loss_parallel: bool = False,
    start: Efficiency | None = None,
) -> FittedEfficiency:
    """`matmul` and `half_width` by least squares of ln(measured/predicted) over layouts that ran on one cluster.

    Arguments as in `layout`; `start` gives all that is not fitted. Three layouts at least, at two tensor-parallel
    sizes or more: with one size the two cannot be told apart, and only `matmul` is fitted, to one layout or more.
    Raises `InputError` where none ran.
    """
    check_count(global_batch=global_batch, sequence_length=sequence_length)
    ran = [row for row in measured if row.seconds is not None]
    if not ran:
        raise InputError("measured must hold a layout that ran, got none")
    numbers, start = precision_named(precision), start or Efficiency()
    block = block or Block.of(model, bytes_each=numbers.activation)
    costing = Costing(sequence_length, block, numbers, loss_parallel)
    columns, seconds = as_grid(ran, cluster.devices, global_batch), np.array([row.seconds for row in ran], np.float64)
    names = ("matmul", "half_width") if len(ran) >= 3 and len({row.tp for row in ran}) >= 2 else ("matmul",)

    def with_values(logs: Array) -> Efficiency:
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        return replace(start, **values)

    def errors(logs: Array) -> Array:
        times = step_time(model, columns, costing, cluster, with_values(logs))
        return np.asarray(np.log(seconds / np.sum(list(times.values()), axis=0)))

    from scipy.optimize import least_squares

    upper = [0.0, np.inf][: len(names)]
    first = np.log([start.matmul, max(start.half_width, 1.0)])[: len(names)]
    found = least_squares(errors, np.minimum(first, np.array(upper) - 1e-9), bounds=(-20.0, upper), x_scale=1.0)
    return FittedEfficiency(with_values(found.x), names, float(np.sqrt(np.mean(found.fun**2))))


def as_grid(rows: Sequence[Measured], devices: int, global_batch: int) -> Grid:
    """Measured layouts as columns. Raises `InputError` where one does not divide."""
    for row in rows:
        ranks = row.tp * row.pp
        if devices % ranks or global_batch % (devices // ranks * row.micro_batch):
            raise InputError(
                f"measured must divide {devices} devices and a global batch of {global_batch}, got {row!r}"
            )
    tp, pp, micro_batch = (
        np.array([getattr(row, name) for row in rows], np.int64) for name in ("tp", "pp", "micro_batch")
    )
    dp = devices // (tp * pp)
    checkpointing = np.array([row.checkpointing for row in rows], bool)
    sequence = np.array([row.sequence_parallel for row in rows], bool)
    sharding = np.where(dp == 1, 0, np.array([SHARDINGS.index(row.sharding) for row in rows], np.int64))
    return Grid(dp, tp, pp, micro_batch, global_batch // (dp * micro_batch), checkpointing, sequence, sharding)
