"""Layouts as columns of one array each, and all those that divide: the search space of `layout`."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import is_count
from batchlab.core.errors import InputError
from batchlab.planner.hardware import Cluster
from batchlab.planner.layouts.shape import ModelShape

Sharding = Literal["none", "optimizer", "gradients", "weights"]
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)


class Grid(NamedTuple):
    """Columns of equal length, or scalars for one layout.

    dp, tp, pp: data, tensor and pipeline parallel ranks; their product is the number of devices.
    micro_batch: b, sequences. accumulation: m = global batch/(dp·b), micro-batches of one rank in an update.
    checkpointing, sequence_parallel: whether. sharding: what data parallelism divides, an index into `SHARDINGS`.
    """

    dp: NDArray[np.int64]
    tp: NDArray[np.int64]
    pp: NDArray[np.int64]
    micro_batch: NDArray[np.int64]
    accumulation: NDArray[np.int64]
    checkpointing: NDArray[np.bool_]
    sequence_parallel: NDArray[np.bool_]
    sharding: NDArray[np.int64]

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> Grid:
        """The layouts at some indices, or those of a mask."""
        columns: list[Any] = [column[index] for column in self]
        return Grid(*columns)


class Limits(NamedTuple):
    """What may be tried; None for all that divides. Each a collection of the values allowed."""

    tp: Collection[int] | None = None
    pp: Collection[int] | None = None
    micro_batch: Collection[int] | None = None
    checkpointing: Collection[bool] | None = None
    sequence_parallel: Collection[bool] | None = None
    sharding: Collection[Sharding] | None = None
    uneven_stages: bool = False

    @classmethod
    def of(cls, *, uneven_stages: bool, **values: Any) -> Limits:
        """Limits from one value or several of each; `InputError` by name where one is none of the right kind."""
        rules = {
            "tp": ("tensor_parallel", "integers of at least 1", is_count),
            "pp": ("pipeline_parallel", "integers of at least 1", is_count),
            "micro_batch": ("micro_batch", "integers of at least 1", is_count),
            "checkpointing": ("checkpointing", "True or False", _is_flag),
            "sequence_parallel": ("sequence_parallel", "True or False", _is_flag),
            "sharding": ("sharding", f"some of {list(SHARDINGS)}", lambda value: value in SHARDINGS),
        }
        checked: dict[str, Any] = {}
        for field, (name, right, is_right) in rules.items():
            value = values[field]
            several = value if value is None or isinstance(value, (list, tuple, set, frozenset, range)) else [value]
            if several is not None and not (several and all(is_right(one) for one in several)):
                raise InputError(f"{name} must hold {right}, got {value!r}")
            checked[field] = several
        return cls(**checked, uneven_stages=bool(uneven_stages))


def _is_flag(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


@cache
def divisors(number: int) -> tuple[int, ...]:
    """All of them, ascending, from the prime factors: the root of the largest but one, not of the number, bounds it.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    found, rest, prime = [1], number, 2
    while rest > 1:
        if prime * prime > rest:
            prime = rest
        powers = [1]
        while rest % prime == 0:
            rest //= prime
            powers.append(powers[-1] * prime)
        if len(powers) > 1:
            found = [known * power for known in found for power in powers]
        prime += 1 if prime == 2 else 2
    return tuple(sorted(found))


def tensor_sizes(shape: ModelShape, cluster: Cluster) -> list[int]:
    """The tensor-parallel sizes t that divide: within a node and dividing it, the devices, the heads and the MLP.

    Heads of keys and values are divided by t, or each is held by several ranks where t is a multiple of their number.
    """
    return [
        t
        for t in divisors(cluster.node_size)
        if shape.heads % t == 0
        and shape.mlp % t == 0
        and (shape.kv_width % t == 0 or t % shape.kv_width == 0)
        and cluster.devices % t == 0
    ]


def pipeline_sizes(shape: ModelShape, cluster: Cluster, uneven: bool) -> list[int]:
    """The numbers of stages p that divide the devices and the layers; with `uneven` every p of at most L stages."""
    return [p for p in divisors(cluster.devices) if p <= shape.layers and (uneven or shape.layers % p == 0)]


def grid(shape: ModelShape, cluster: Cluster, *, global_batch: int, sequence_length: int, limits: Limits) -> Grid:
    """All layouts that divide, within the limits. Raises `InputError` naming what does not divide where there are none.

    dp·tp·pp is the number of devices and dp·b divides the global batch. Sequence parallelism needs t > 1 that divides
    the sequence; data parallelism divides nothing where there is one rank of it.
    """
    sizes = _model_sizes(shape, cluster, limits)
    micro = None if limits.micro_batch is None else set(limits.micro_batch)
    pieces = []
    shares = sorted({cluster.devices // (t * p) for t, p in sizes})
    for t, p in sizes:
        dp, rest = divmod(cluster.devices, t * p)
        if rest or global_batch % dp:
            continue
        share = global_batch // dp
        batches = [b for b in divisors(global_batch) if share % b == 0 and (micro is None or b in micro)]
        pieces.append(_options(dp, t, p, batches, share, sequence_length, limits))
    columns: list[Any] = [np.concatenate(parts) for parts in zip(*pieces)] if pieces else []
    if not columns or not len(columns[0]):
        raise InputError(_nothing_divides(shares, global_batch, micro))
    return Grid(*columns)


def _options(
    dp: int, t: int, p: int, batches: list[int], share: int, sequence_length: int, limits: Limits
) -> tuple[NDArray[np.int64] | NDArray[np.bool_], ...]:
    checkpointing = [c for c in (False, True) if limits.checkpointing is None or c in limits.checkpointing]
    sequence = [False, True] if t > 1 and sequence_length % t == 0 else [False]
    sequence = [s for s in sequence if limits.sequence_parallel is None or s in limits.sequence_parallel]
    if t == 1 and limits.sequence_parallel is not None:
        sequence = [False]
    kinds = [i for i, name in enumerate(SHARDINGS) if limits.sharding is None or name in limits.sharding]
    if dp == 1:
        kinds = [0]
    b, c, s, k = (
        axis.ravel()
        for axis in np.meshgrid(
            np.array(batches, np.int64),
            np.array(checkpointing, bool),
            np.array(sequence, bool),
            np.array(kinds, np.int64),
            indexing="ij",
        )
    )
    one = np.ones(len(b), np.int64)
    return dp * one, t * one, p * one, b, share // b, c, s, k


def _model_sizes(shape: ModelShape, cluster: Cluster, limits: Limits) -> list[tuple[int, int]]:
    """The pairs (t, p) that may be tried. A size that was asked for and does not divide is refused by name."""
    tensor, pipeline = tensor_sizes(shape, cluster), pipeline_sizes(shape, cluster, limits.uneven_stages)
    if limits.tp is not None:
        for t in limits.tp:
            if t not in tensor:
                raise InputError(f"tensor_parallel must {_tensor_rule(t, shape, cluster)}, got {t}")
        tensor = sorted(set(limits.tp))
    if limits.pp is not None:
        for p in limits.pp:
            if p not in pipeline:
                raise InputError(f"pipeline_parallel must {_pipeline_rule(p, shape, cluster)}, got {p}")
        pipeline = sorted(set(limits.pp))
    pairs = [(t, p) for t in tensor for p in pipeline if cluster.devices % (t * p) == 0]
    if not pairs:
        raise InputError(
            f"devices {cluster.devices} must be divisible by tensor_parallel times pipeline_parallel, which may be "
            f"{tensor} and {pipeline}"
        )
    return pairs


def _tensor_rule(t: int, shape: ModelShape, cluster: Cluster) -> str:
    if cluster.node_size % t:
        return f"divide the {cluster.node_size} devices of a node"
    if shape.heads % t:
        return f"divide the {shape.heads} heads"
    if shape.mlp % t:
        return f"divide the MLP's width {shape.mlp}"
    return f"divide or be a multiple of the {shape.kv_width} heads of keys and values"


def _pipeline_rule(p: int, shape: ModelShape, cluster: Cluster) -> str:
    if cluster.devices % p:
        return f"divide the {cluster.devices} devices"
    if p > shape.layers:
        return f"be at most the {shape.layers} layers"
    return f"divide the {shape.layers} layers (or give uneven_stages=True)"


def _nothing_divides(shares: list[int], global_batch: int, micro: set[int] | None) -> str:
    if micro is not None and any(global_batch % dp == 0 for dp in shares):
        return (
            f"micro_batch must hold a divisor of a data-parallel rank's share of global_batch {global_batch}, with "
            f"data-parallel sizes {shares}, got {sorted(micro)}"
        )
    return (
        f"global_batch must be divisible by one of the data-parallel sizes {shares} that are left by the tensor- and "
        f"pipeline-parallel ones, got {global_batch}"
    )
