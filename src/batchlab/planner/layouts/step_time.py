"""Seconds of one update under a layout, by part, and MFU.

One micro-batch of b sequences of s tokens takes a layer on t tensor-parallel ranks

  matrices   3·F/(t·peak·e), F its forward FLOPs, or the time to read its weights where that is longer (roofline)
  the rest   3·(bytes moved outside matrix products)/(memory bandwidth)
  tensor     4 all-reduces of b·s·h numbers, ring volume 2(t-1)/t each; 6 where the layer is recomputed

and the forward pass once more where it is checkpointed. e = e_max/(1 + t·w/h + k/(b·s)): narrow matrices and few
tokens fill a chip badly. Under 1F1B with p stages of times tᵢ and m micro-batches (Narayanan et al. 2021)

  step = Σ tᵢ + (m - 1)·max tᵢ,     that is (m + p - 1)·t for equal stages: a share (p-1)/(m+p-1) is idle.

That equals a discrete-event simulation where no stage is slower than the last, which has the loss, as where p divides
L; elsewhere it is an upper bound. Tensor parallelism lies innermost, then data, then pipeline: a data-parallel ring
that spans nodes shares their adapters with the t rings beside it.

Against the published sweep of Hagemann et al. 2023 (arXiv 2311.05610), computed from its spreadsheets: e_max and w are
fitted to the 13 runs of Llama 65B at 2k tokens with fused norms, root mean square error of ln(seconds) 0.034, and
nothing else is fitted to any. Spearman's rank correlation of predicted and measured seconds, with that error:

  fused norms                                        norms in separate kernels, with and without checkpointing
  65B 2k, 128 GPUs   13 runs   0.93   0.03  (fitted)    65B 2k, 128 GPUs   30 runs   0.95   0.09
  65B 2k,  64        27        0.83   0.10              30B 8k, 128        15        0.98   0.03
  30B 8k, 128         3        1.00   0.06              30B 2k, 256        28        0.57   0.20
  30B 8k,  64         7        0.75   0.14              13B 8k, 128        19        0.88   0.07
  30B 2k, 256        11        0.07   0.24              13B 2k,  64        20        0.83   0.16
  30B 2k,  64        24        0.75   0.06
  13B 8k, 128         6        0.94   0.05
  13B 8k,  64        21        0.99   0.07
  13B 2k,  64         8        0.88   0.06
  13B 2k,  32        16        0.91   0.03

With k free too it comes out as 441, with an error of 0.019. Then 65B and 30B on 64 GPUs are told better (0.90, 0.88),
and 13B at 2k worse (0.50 on 64, 0.65 on 32), with micro-batch 2 before 1 against what was measured. So k is 0 by
default, a choice made with these results in sight.
On 256 GPUs the runs with large data-parallel volumes took longer than a network of 25 GB/s a device explains, and the
order is lost; on 64 of the same model it is kept. Measure the network, or give `layout` measured rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from batchlab.core.checks import (
    check_count,
    check_not_negative,
    check_positive,
    check_share,
    holds,
    is_count,
)
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.planner.hardware import Cluster
from batchlab.planner.layouts.grid import SHARDINGS, Grid
from batchlab.planner.layouts.memory import Array, Costing, stage_layers, stage_parameters
from batchlab.planner.layouts.shape import ModelShape

LOGIT_MOVED = 24


@dataclass(frozen=True)
class Efficiency(JsonNoun):
    """Which shares of its peaks a machine attains. Measure them, or fit them with `fit_efficiency`.

    matmul: e_max, of peak FLOP/s. half_width: w, the width h/t at which half of e_max is left. half_tokens: k, likewise
    in tokens of a micro-batch; 0 (see the module) holds for h of 5,120 and sequences of 2,048 and more. For small
    models fit it: where it is large, larger micro-batches win.
    table: measured shares (micro_batch, tp, share); they replace the curve for these pairs.
    memory: of memory bandwidth, for what is not a matrix product; an assumption. link, network: of the bandwidth
    inside a node and between nodes; Calculon's for an A100 system.
    host_seconds: the host's time to launch one layer's forward kernels, about 20 of 5 µs: what a small layer takes at
    least; an assumption.
    tensor_overlap, data_overlap, pipeline_overlap: shares of that communication hidden behind computation; 0 is the
    safe side.
    """

    matmul: float = 0.69
    half_width: float = 225.0
    half_tokens: float = 0.0
    table: tuple[tuple[int, int, float], ...] = ()
    memory: float = 0.8
    link: float = 0.65
    network: float = 0.9
    host_seconds: float = 1e-4
    tensor_overlap: float = 0.0
    data_overlap: float = 0.0
    pipeline_overlap: float = 0.0

    def __post_init__(self) -> None:
        for name in ("matmul", "memory", "link", "network"):
            value = getattr(self, name)
            if not holds(lambda share: 0 < share <= 1, value):
                raise InputError(f"{name} must lie in (0, 1], got {value!r}")
        check_not_negative(half_width=self.half_width, half_tokens=self.half_tokens, host_seconds=self.host_seconds)
        check_share(
            tensor_overlap=self.tensor_overlap, data_overlap=self.data_overlap, pipeline_overlap=self.pipeline_overlap
        )
        for row in self.table:
            if not (len(row) == 3 and is_count(row[0]) and is_count(row[1]) and holds(lambda e: 0 < e <= 1, row[2])):
                raise InputError(f"table must hold rows (micro_batch, tp, share in (0, 1]), got {row!r}")

    def of_matmul(self, shape: ModelShape, grid: Grid, sequence_length: int) -> Array:
        """e of each layout."""
        narrow = grid.tp * self.half_width / shape.hidden
        share = self.matmul / (1 + narrow + self.half_tokens / (grid.micro_batch * sequence_length))
        for micro_batch, tp, measured in self.table:
            share = np.where((grid.micro_batch == micro_batch) & (grid.tp == tp), measured, share)
        return np.asarray(share, np.float64)


@dataclass(frozen=True)
class StepTime(JsonNoun):
    """Seconds of one update. compute: of the slowest stage's work. bubble: it waits for others to fill and drain.

    tensor, pipeline, data: communication that is not hidden. update: the optimizer.
    """

    compute: float
    bubble: float
    tensor: float
    pipeline: float
    data: float
    update: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


TIME_PARTS = tuple(field.name for field in fields(StepTime))


def bubble_share(stages: int, micro_batches: int) -> float:
    """(p - 1)/(m + p - 1): the share of a 1F1B step of equal stages in which a stage is idle.

    >>> bubble_share(4, 12)
    0.2
    """
    check_count(stages=stages, micro_batches=micro_batches)
    return (stages - 1) / (micro_batches + stages - 1)


def mfu(
    shape: ModelShape, *, tokens: float, sequence_length: int, seconds: float, devices: int, peak_flops: float
) -> float:
    """Model FLOPs utilisation: tokens·(6·N + 12·L·h·s)/(seconds·devices·peak), `ModelShape.model_flops` of a token.

    tokens: of one update of so many seconds, over all devices. peak_flops: of one device. Hagemann et al. publish
    0.7057 for the example: their count leaves something out that is 0.2 % of this one's.

    >>> llama_13b = ModelShape(layers=40, hidden=5120, heads=40, mlp=13824, vocabulary=128_000)
    >>> round(mfu(llama_13b, tokens=2**22, sequence_length=2048, seconds=26.5395, devices=64, peak_flops=312e12), 3)
    0.705
    """
    check_positive(tokens=tokens, seconds=seconds, devices=devices, peak_flops=peak_flops)
    return tokens * shape.model_flops(sequence_length) / (seconds * devices * peak_flops)


class _Layer(NamedTuple):
    """Seconds of one micro-batch: a layer's work and all-reduces, the loss and its matrix, a stage's transfers."""

    work: Array
    tensor: Array
    loss: Array
    transfer: Array


def step_time(
    shape: ModelShape, grid: Grid, costing: Costing, cluster: Cluster, efficiency: Efficiency
) -> dict[str, Array]:
    """Seconds by part (`TIME_PARTS`) of each layout."""
    one = _micro_batch(shape, grid, costing, cluster, efficiency)
    first, last = (stage_layers(shape, grid.pp, last=end) for end in (False, True))
    work = np.stack([first * one.work + np.where(grid.pp == 1, one.loss, 0.0), last * one.work + one.loss])
    tensor = np.stack([first * one.tensor, last * one.tensor])
    stage = np.argmax(work + tensor, axis=0)[None]
    compute, messages = (np.take_along_axis(part, stage, axis=0)[0] for part in (work, tensor))
    everything = shape.layers * (one.work + one.tensor) + one.loss + grid.pp * one.transfer
    m = grid.accumulation
    return {
        "compute": m * compute,
        "bubble": everything - compute - messages - one.transfer,
        "tensor": m * messages,
        "pipeline": m * one.transfer,
        "data": _data_parallel(shape, grid, costing, cluster, efficiency),
        "update": _update(shape, grid, costing, cluster, efficiency),
    }


def _micro_batch(shape: ModelShape, grid: Grid, costing: Costing, cluster: Cluster, efficiency: Efficiency) -> _Layer:
    device, block, s = cluster.device, costing.block, costing.sequence_length
    tokens, each = np.asarray(grid.micro_batch * float(s), np.float64), costing.precision.activation
    share = efficiency.of_matmul(shape, grid, s)
    passes = np.where(grid.checkpointing, 4.0, 3.0)
    attention = 4.0 * s * shape.heads * shape.head_width * block.attention_share
    products = tokens * (2.0 * shape.layer_matrices + attention) / (grid.tp * device.peak_flops * share)
    moving = device.memory_bandwidth * efficiency.memory
    reading = each * shape.layer_matrices / (grid.tp * moving)
    shared = np.where(grid.sequence_parallel, grid.tp, 1)
    moved = tokens * (block.moved_whole / shared + block.moved_split / grid.tp)
    moved = moved + grid.micro_batch * block.moved_scores * shape.heads * float(s) ** 2 / grid.tp
    work = np.maximum(passes * (np.maximum(products, reading) + moved / moving), passes * efficiency.host_seconds)
    loss_ranks = grid.tp if costing.loss_parallel else np.ones_like(grid.tp)
    loss = 6.0 * tokens * shape.embedding / (grid.tp * device.peak_flops * share)
    loss = loss + tokens * (LOGIT_MOVED + 5 * each) * shape.vocabulary / (loss_ranks * moving)
    return _Layer(
        work=work,
        tensor=_all_reduces(shape, grid, tokens * each, cluster, efficiency),
        loss=loss,
        transfer=_transfer(shape, grid, tokens * each / shared, cluster, efficiency),
    )


def _all_reduces(shape: ModelShape, grid: Grid, token_bytes: Array, cluster: Cluster, efficiency: Efficiency) -> Array:
    """A layer's tensor-parallel all-reduces in one micro-batch: four, and two more where it is recomputed."""
    t = grid.tp
    volume = 2.0 * (t - 1) / t * token_bytes * shape.hidden
    one = volume / (cluster.device.link_bandwidth * efficiency.link) + 2.0 * (t - 1) * cluster.link_latency
    count = np.where(grid.checkpointing, 6.0, 4.0)
    return np.asarray((1 - efficiency.tensor_overlap) * count * one)


def _transfer(shape: ModelShape, grid: Grid, token_bytes: Array, cluster: Cluster, efficiency: Efficiency) -> Array:
    """A stage's transfers in one micro-batch: activations onward and their gradients back."""
    inside = grid.tp * grid.dp * grid.pp <= cluster.node_size
    bandwidth = np.where(
        inside, cluster.device.link_bandwidth * efficiency.link, cluster.inter_node_bandwidth * efficiency.network
    )
    latency = np.where(inside, cluster.link_latency, cluster.inter_node_latency)
    both = 2.0 * (token_bytes * shape.hidden / bandwidth + latency)
    return np.where(grid.pp > 1, (1 - efficiency.pipeline_overlap) * both, 0.0)


def _data_parallel(shape: ModelShape, grid: Grid, costing: Costing, cluster: Cluster, efficiency: Efficiency) -> Array:
    """Reducing gradients and gathering weights, (n - 1)/n of them each time they go round a ring of n ranks.

    "none": gradients twice, an all-reduce. "optimizer": both once. "gradients": gradients in every micro-batch, for
    whole ones are not kept. "weights": in every micro-batch weights twice, forward and backward, and gradients once.
    """
    dp, numbers, m = grid.dp, costing.precision, grid.accumulation
    one = np.ones_like(m)
    weights = np.choose(grid.sharding, [0 * one, one, one, 2 * m])
    gradients = np.choose(grid.sharding, [2 * one, one, m, m])
    volume = (weights * numbers.weight + gradients * numbers.gradient) * _most_parameters(shape, grid) * (dp - 1) / dp
    link = cluster.device.link_bandwidth * efficiency.link
    inside = grid.tp * dp <= cluster.node_size
    members = np.clip(cluster.node_size // grid.tp, 1, dp)
    across = np.minimum(link, cluster.inter_node_bandwidth * efficiency.network * members)
    latency = np.where(inside, cluster.link_latency, cluster.inter_node_latency) * (dp - 1)
    layered = np.where(grid.sharding == SHARDINGS.index("weights"), stage_layers(shape, grid.pp, last=False), 1.0)
    seconds = volume / np.where(inside, link, across) + (weights + gradients) * layered * latency
    return np.asarray((1 - efficiency.data_overlap) * seconds)


def _update(shape: ModelShape, grid: Grid, costing: Costing, cluster: Cluster, efficiency: Efficiency) -> Array:
    """Reading gradients, reading and writing the optimizer's state, writing weights."""
    numbers, parameters = costing.precision, _most_parameters(shape, grid)
    ranks = np.where(grid.sharding >= SHARDINGS.index("optimizer"), grid.dp, 1)
    moved = parameters / ranks * (numbers.gradient + 2 * numbers.state + numbers.weight)
    return np.asarray(moved / (cluster.device.memory_bandwidth * efficiency.memory))


def _most_parameters(shape: ModelShape, grid: Grid) -> Array:
    first, last = (stage_parameters(shape, grid, last=end)[0] for end in (False, True))
    return np.maximum(first, last)
