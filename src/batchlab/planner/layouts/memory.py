"""Bytes that one device holds at its fullest moment in training, by part.

P parameters on a device take weights, gradients and optimizer state of so many bytes each (`Precision`), the last
three divided over the dp data-parallel ranks as the sharding says (ZeRO 1 to 3, Rajbhandari et al. 2019). Stage i of p
holds min(m, p - i) micro-batches' activations under 1F1B (Narayanan et al. 2021), so the first stage, with the input
embedding, or the last, with output matrix and loss, is the fullest; of these two the fuller is given.

Against all tensors that live at once in an update of small real models on a CPU, float32 and bfloat16, with and without
checkpointing, fused attention and tied matrices: within 5 %.

Against the published sweep of Hagemann et al. 2023 (arXiv 2311.05610; Llama 13B to 65B, A100-80, FlashAttention-2; 587
runs that ended or ran out of memory), computed from its spreadsheets: none that ended is predicted not to fit, 520 are
told right, and 67 that ran out of memory are predicted to fit, most of them by little: fragmentation and temporary
tensors are not counted. With 2 GiB in reserve 529 are right and one that ended is refused. With the loss taken as
parallel over tensor-parallel ranks 507 are right, so theirs seems not to have been.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_not_negative, check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.planner.layouts.activations import STATISTIC, Block
from batchlab.planner.layouts.grid import SHARDINGS, Grid
from batchlab.planner.layouts.shape import ModelShape

Array = NDArray[np.float64]
PARTS = ("weights", "gradients", "optimizer", "activations", "logits")
GATHERED_LAYERS = 2
LOSS_BYTES = 12


@dataclass(frozen=True)
class Precision(JsonNoun):
    """Bytes of each number. state: of the optimizer, for each parameter, with a master copy of the weight if any.

    copy: of a lower-precision copy of each weight that lives through forward and backward pass, as autocast makes.
    """

    weight: float
    gradient: float
    state: float
    activation: int
    copy: float = 0.0

    def __post_init__(self) -> None:
        check_positive(weight=self.weight, gradient=self.gradient, activation=self.activation)
        check_not_negative(state=self.state, copy=self.copy)


PRECISIONS = {
    "bf16": Precision(2, 2, 12, 2),
    "bf16-float32-gradients": Precision(2, 4, 12, 2),
    "autocast": Precision(4, 4, 8, 2, copy=2),
    "float32": Precision(4, 4, 8, 4),
}


def precision_named(precision: str | Precision) -> Precision:
    """Adam's bytes by name: bfloat16 with a float32 master copy, autocast over float32, or float32 alone."""
    if isinstance(precision, Precision):
        return precision
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise InputError(f"precision must be a Precision or one of {sorted(PRECISIONS)}, got {precision!r}")
    return PRECISIONS[precision]


@dataclass(frozen=True)
class Memory(JsonNoun):
    """Bytes of the fullest device. logits: output, loss and their gradients, with the last norm's; under checkpointing
    what they need beyond the layer that is recomputed later.

    reserve: set aside for what is not counted (context, collectives' buffers, fragmentation).
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reserve: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.reserve

    @property
    def largest(self) -> str:
        """The largest part's name."""
        return max(PARTS, key=lambda part: float(getattr(self, part)))


class Costing(NamedTuple):
    """What is held fixed over a search: s, and how a layer, a number and the loss are counted."""

    sequence_length: int
    block: Block
    precision: Precision
    loss_parallel: bool


def stage_parameters(shape: ModelShape, grid: Grid, *, last: bool) -> tuple[Array, Array]:
    """Parameters on a device of the first or the last stage, and those of one layer of them.

    The first L mod p stages have a layer more. A tied matrix lies on both ends of a pipeline. Vocabulary matrices
    are divided by t, rounded up.
    """
    layers = stage_layers(shape, grid.pp, last=last)
    held_kv = np.maximum(shape.kv_width / grid.tp, 1.0) / shape.kv_width
    layer = shape.layer_split / grid.tp + shape.layer_kv * held_kv + shape.layer_whole
    words = np.ceil(shape.vocabulary / grid.tp) * shape.hidden
    alone = grid.pp == 1
    first_part = words + shape.positions * shape.hidden
    last_part = np.where(alone & shape.tied, 0.0, words) + shape.norm_parameters
    ends = last_part + np.where(alone, first_part, 0.0) if last else first_part + np.where(alone, last_part, 0.0)
    return layers * layer + ends, layer


def stage_layers(shape: ModelShape, pp: NDArray[np.int64], *, last: bool) -> Array:
    """Layers of the first stage, the most, or of the last, the fewest."""
    return np.asarray(shape.layers // pp if last else -(-shape.layers // pp), np.float64)


def memory(shape: ModelShape, grid: Grid, costing: Costing) -> dict[str, Array]:
    """Bytes by part (`PARTS`), of whichever of first and last stage holds more."""
    ends = [_stage(shape, grid, costing, last=last) for last in (False, True)]
    totals = [np.sum([stage[part] for part in PARTS], axis=0) for stage in ends]
    return {part: np.where(totals[1] > totals[0], ends[1][part], ends[0][part]) for part in PARTS}


def _stage(shape: ModelShape, grid: Grid, costing: Costing, *, last: bool) -> dict[str, Array]:
    parameters, layer = stage_parameters(shape, grid, last=last)
    layers = stage_layers(shape, grid.pp, last=last)
    in_flight = np.ones_like(layers) if last else np.minimum(grid.accumulation, grid.pp)
    numbers, has_loss = costing.precision, (grid.pp == 1) | last
    states = _states(parameters, layer, layers, grid, numbers)
    kept, recomputed = activations(shape, grid, costing)
    loss = grid.micro_batch * costing.sequence_length * loss_bytes(shape, grid, costing)
    return states | {
        "activations": kept * layers * in_flight + recomputed,
        "logits": np.where(has_loss, np.maximum(loss - recomputed, 0.0), 0.0),
    }


def _states(parameters: Array, layer: Array, layers: Array, grid: Grid, numbers: Precision) -> dict[str, Array]:
    """Weights, gradients and optimizer state. Sharded weights come with two gathered layers and what is outside them,
    sharded gradients with one layer's, not yet reduced."""
    outside = parameters - layers * layer
    gathered = outside + np.minimum(GATHERED_LAYERS, layers) * layer
    shares = {name: np.where(grid.sharding >= SHARDINGS.index(name), 1.0 / grid.dp, 1.0) for name in SHARDINGS[1:]}
    whole_weights = grid.sharding < SHARDINGS.index("weights")
    whole_gradients = grid.sharding < SHARDINGS.index("gradients")
    working = numbers.copy if numbers.copy else numbers.weight
    weights = parameters * numbers.weight * shares["weights"]
    return {
        "weights": weights + np.where(whole_weights, parameters * numbers.copy, gathered * working),
        "gradients": numbers.gradient * (parameters * shares["gradients"] + np.where(whole_gradients, 0.0, layer)),
        "optimizer": numbers.state * parameters * shares["optimizer"],
    }


def activations(shape: ModelShape, grid: Grid, costing: Costing) -> tuple[Array, Array]:
    """Bytes that a layer keeps of one micro-batch, and those of one layer at a time while it is recomputed.

    A checkpointed layer keeps its input. What is recomputed, with its gradients, comes after the loss is done with, so
    of these two only the larger counts.
    """
    s, block = costing.sequence_length, costing.block
    tokens, shared = grid.micro_batch * s, np.where(grid.sequence_parallel, grid.tp, 1)
    pairs = grid.micro_batch * shape.heads * float(s) ** 2 / grid.tp
    whole = tokens * (block.whole / shared + block.split / grid.tp) + pairs * block.scores
    gradients = np.maximum(tokens * block.backward / grid.tp, pairs * block.backward_scores)
    kept = np.where(grid.checkpointing, tokens * block.boundary / shared, whole)
    return kept, np.where(grid.checkpointing, whole + gradients, 0.0)


def loss_bytes(shape: ModelShape, grid: Grid, costing: Costing) -> Array:
    """Bytes a token for output and loss at the backward pass's start, and for the last norm.

    For each logit: itself, for most loops hold it, its float32 log-softmax, and two float32 gradients that are alive at
    once. Whole on every tensor-parallel rank unless the loss is computed in parallel.
    """
    each = costing.precision.activation + LOSS_BYTES
    ranks = grid.tp if costing.loss_parallel else np.ones_like(grid.tp)
    norm = 2 * costing.precision.activation * shape.hidden + STATISTIC
    return each * shape.vocabulary / ranks + norm / np.where(grid.sequence_parallel, grid.tp, 1)
