"""Bytes that a rank keeps and sends when a model is trained by DDP or FSDP (standard practice; arXiv 2410.19456).

P parameters on n ranks, w, g and o bytes of weights, gradients and optimizer for each. Kept by a rank, and sent by it:

  "ddp"              keeps P(w + g + o)        sends 2(n - 1)/n·P·g an update: one all-reduce of gradients
  "grad_optimizer"   keeps P·w + P(g + o)/n    sends (n - 1)/n·P(w + g) a pass: weights gathered, gradients scattered
  "full"             keeps P(w + g + o)/n      sends (n - 1)/n·P(2w + g) a pass: two gathers, one scatter

"grad_optimizer" is ZeRO-2: `SHARD_GRAD_OP` in FSDP1, `reshard_after_forward=False` in FSDP2. "full" is ZeRO-3.

The bytes are those of ring collectives, of which an all-reduce is a scatter and a gather. gloo has no scatter of its
own and sends an all-reduce in its place: (n - 1)/n·P·g more. DDP over gloo sends what the formula says, within 0.1 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from batchlab.core.checks import check_count, check_not_negative, check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun

Strategy = Literal["ddp", "grad_optimizer", "full"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
_ALSO: dict[str, Strategy] = {"fsdp": "full", "fsdp2": "full", "zero3": "full", "zero2": "grad_optimizer"}


@dataclass(frozen=True)
class StateBytes(JsonNoun):
    """Bytes for each parameter. The default, 16 in all, is Adam in mixed precision: weights and gradients of 2 bytes,
    and 12 of a float32 copy and two moments. All in float32 it is `StateBytes(4, 4, 8)`; SGD with momentum `(4, 4, 4)`.

    Under PyTorch's autocast weights and gradients stay float32.
    """

    weights: float = 2.0
    gradients: float = 2.0
    optimizer: float = 12.0

    def __post_init__(self) -> None:
        check_positive(weights=self.weights)
        check_not_negative(gradients=self.gradients, optimizer=self.optimizer)


def check_strategy(strategy: str) -> Strategy:
    """The strategy of that name: "fsdp", "fsdp2" and "zero3" are "full", "zero2" is "grad_optimizer"."""
    known = {name: name for name in STRATEGIES} | _ALSO
    if strategy not in known:
        raise InputError(f"strategy must be one of {sorted(STRATEGIES)} or {sorted(_ALSO)}, got {strategy!r}")
    return known[strategy]


def state_bytes(parameters: float, strategy: str, ranks: int, *, each: StateBytes = StateBytes()) -> float:
    """Bytes of weights, gradients and optimizer that each of `ranks` keeps.

    Weights gathered for a while by "full" are not in it: at most two of the wrapped blocks. Nor are DDP's buckets,
    which hold the gradients once more unless `gradient_as_bucket_view` is set.

    >>> [state_bytes(1e9, name, 8) / 1e9 for name in STRATEGIES]
    [16.0, 3.75, 2.0]
    """
    check_positive(parameters=parameters)
    check_count(ranks=ranks)
    rest = each.gradients + each.optimizer
    kept = {
        "ddp": each.weights + rest,
        "grad_optimizer": each.weights + rest / ranks,
        "full": (each.weights + rest) / ranks,
    }
    return parameters * kept[check_strategy(strategy)]


def communication_bytes(
    parameters: float, strategy: str, ranks: int, *, passes: int = 1, each: StateBytes = StateBytes()
) -> float:
    """Bytes that each of `ranks` sends in one update of `passes` forward and backward passes.

    DDP averages at the last pass only (`no_sync` before it); the sharded strategies gather and scatter at each.

    >>> [communication_bytes(1e9, name, 8) / 1e9 for name in STRATEGIES]
    [3.5, 3.5, 5.25]
    """
    check_positive(parameters=parameters)
    check_count(ranks=ranks, passes=passes)
    sent = {
        "ddp": 2 * each.gradients,
        "grad_optimizer": passes * (each.weights + each.gradients),
        "full": passes * (2 * each.weights + each.gradients),
    }
    return parameters * sent[check_strategy(strategy)] * (ranks - 1) / ranks
