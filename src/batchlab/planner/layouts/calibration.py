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

FIRST = {"matmul": 1e-3, "half_width": 1.0, "half_tokens": 1.0}


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
    constants: Sequence[str] | None = None,
) -> FittedEfficiency:
    """`matmul`, `half_width` and `half_tokens` by least squares of ln(measured/predicted) over layouts that ran.

    Arguments as in `layout`, all measured on its cluster; `start` gives all that is not fitted. constants: those to
    fit; None for `matmul`, and `half_width` where the layouts tell it. `half_width` takes two tensor-parallel sizes,
    `half_tokens` two micro-batch sizes, and all together a layout more than there are constants where there are two or
    more. Raises `InputError` where they do not, or where no layout ran.
    """
    check_count(global_batch=global_batch, sequence_length=sequence_length)
    ran = [row for row in measured if row.seconds is not None]
    if not ran:
        raise InputError("measured must hold a layout that ran, got none")
    numbers, start = precision_named(precision), start or Efficiency()
    block = block or Block.of(model, bytes_each=numbers.activation)
    costing = Costing(sequence_length, block, numbers, loss_parallel)
    columns, seconds = as_grid(ran, cluster.devices, global_batch), np.array([row.seconds for row in ran], np.float64)
    names = _constants(ran, constants)

    def with_values(logs: Array) -> Efficiency:
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        return replace(start, **values)

    def errors(logs: Array) -> Array:
        times = step_time(model, columns, costing, cluster, with_values(logs))
        return np.asarray(np.log(seconds / np.sum(list(times.values()), axis=0)))

    from scipy.optimize import least_squares

    upper = np.array([0.0 if name == "matmul" else np.inf for name in names])
    first = np.log([max(getattr(start, name), FIRST[name]) for name in names])
    found = least_squares(errors, np.minimum(first, upper - 1e-9), bounds=(-20.0, upper))
    return FittedEfficiency(with_values(found.x), names, float(np.sqrt(np.mean(found.fun**2))))


def _constants(ran: Sequence[Measured], wanted: Sequence[str] | None) -> tuple[str, ...]:
    spread = {"half_width": len({row.tp for row in ran}), "half_tokens": len({row.micro_batch for row in ran})}
    if wanted is None:
        return ("matmul", "half_width") if len(ran) >= 3 and spread["half_width"] >= 2 else ("matmul",)
    names = tuple(wanted)
    if isinstance(wanted, str) or not names or not set(names) <= set(FIRST) or len(set(names)) < len(names):
        raise InputError(f"constants must be some of {list(FIRST)}, each once, got {wanted!r}")
    for name, varied in (("half_width", "tp"), ("half_tokens", "micro_batch")):
        if name in names and spread[name] < 2:
            raise InputError(f"measured must hold two sizes of {varied} to tell {name}, got one")
    if 1 < len(names) >= len(ran):
        raise InputError(f"measured must hold {len(names) + 1} layouts that ran to tell {list(names)}, got {len(ran)}")
    return names


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
