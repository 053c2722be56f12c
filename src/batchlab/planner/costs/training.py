"""`Training`: what a run computes and keeps, whatever it runs on."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

from batchlab.core.checks import check_count, check_not_negative, check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.planner.costs.attention import Attention
from batchlab.planner.costs.sharding import StateBytes, state_bytes

FLOPS_PER_PARAMETER = 6.0


@dataclass(frozen=True)
class Training(JsonNoun):
    """A model to train on `tokens` in sequences of `sequence_length`.

    parameters: N, all that are trained. flops_per_token: forward and backward; None for 6N (Kaplan et al. 2020), which
    leaves attention's own products out: 12·layers·hidden·s more, 5 to 10 % at s = 2048 for models of 13B to 65B.
    state: bytes of each parameter's weights, gradient and optimizer.
    activation_bytes: what one sequence keeps for the backward pass in all layers, apart from `attention`'s share if
    that is given; None if it is not known: the memory is then that of the states and of `attention` alone.

    >>> Training(parameters=1e9, tokens=2e10, sequence_length=2048).flops
    1.2e+20
    """

    parameters: float
    tokens: float
    sequence_length: int
    flops_per_token: float | None = None
    state: StateBytes = field(default_factory=StateBytes)
    activation_bytes: float | None = None
    attention: Attention | None = None

    def __post_init__(self) -> None:
        check_positive(parameters=self.parameters, tokens=self.tokens)
        check_count(sequence_length=self.sequence_length)
        if self.flops_per_token is not None:
            check_positive(flops_per_token=self.flops_per_token)
        if self.activation_bytes is not None:
            check_not_negative(activation_bytes=self.activation_bytes)
            if self.activation_bytes == float("inf"):
                raise InputError("activation_bytes must be finite, got inf")
        for name in ("parameters", "tokens", "flops_per_token", "activation_bytes"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))
        object.__setattr__(self, "sequence_length", operator.index(self.sequence_length))

    @property
    def flops_of_a_token(self) -> float:
        """`flops_per_token`, or 6N."""
        return FLOPS_PER_PARAMETER * self.parameters if self.flops_per_token is None else self.flops_per_token

    @property
    def flops(self) -> float:
        """Of all tokens."""
        return self.flops_of_a_token * self.tokens

    @property
    def activations_known(self) -> bool:
        """Whether memory can be told to grow with the micro-batch as it does."""
        return self.activation_bytes is not None

    def memory_bytes(self, micro_batch: float, strategy: str, ranks: int) -> float:
        """Bytes on each of `ranks` at a pass of `micro_batch` sequences: states, activations, attention.

        Buffers, fragmentation and the driver's own are not in it: leave a reserve.
        """
        kept = micro_batch * (self.activation_bytes or 0.0)
        if self.attention is not None:
            kept += self.attention.bytes(self.sequence_length, micro_batch)
        return state_bytes(self.parameters, strategy, ranks, each=self.state) + kept


def check_training(training: Training) -> None:
    """Refuses what is no `Training`."""
    if not isinstance(training, Training):
        raise InputError(f"training must be a Training(parameters, tokens, sequence_length), got {training!r:.80}")
