"""Bytes that the attention operator keeps for the backward pass: scores of s² where they are made, else none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun

LOGSUMEXP_BYTES = 4


@dataclass(frozen=True)
class Attention(JsonNoun):
    """The attention of a model's `layers`: `heads` of queries and `kv_heads` of keys and values over `hidden` numbers.

    kind: "vanilla" makes the scores; "flash" (FlashAttention, SDPA's flash and efficient kernels) recomputes them.
    kv_heads: fewer than `heads` where queries share them; None for as many.
    element_bytes: of a number; 2 in half precision.
    dropout: whether attention weights are dropped: "vanilla" then keeps a mask of one byte and the dropped weights too.

    >>> small = Attention("vanilla", layers=1, hidden=128, heads=4, element_bytes=4)
    >>> small.bytes(1024) / 1e6
    18.35008
    """

    kind: Literal["vanilla", "flash"]
    layers: int
    hidden: int
    heads: int
    kv_heads: int | None = None
    element_bytes: float = 2
    dropout: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("vanilla", "flash"):
            raise InputError(f'kind must be "vanilla" or "flash", got {self.kind!r}')
        check_count(layers=self.layers, hidden=self.hidden, heads=self.heads)
        if self.kv_heads is not None:
            check_count(kv_heads=self.kv_heads)
            if self.heads % self.kv_heads:
                raise InputError(f"kv_heads must divide heads {self.heads}, got {self.kv_heads!r}")
        check_positive(element_bytes=self.element_bytes)

    def bytes(self, sequence_length: int, sequences: float = 1) -> float:
        """Bytes kept over all layers for so many sequences of `sequence_length` tokens.

        e bytes a number, h = hidden, a = heads, r = kv_heads/heads. Queries, keys and values: e·s·h(1 + 2r). "vanilla"
        adds the softmax, e·a·s², and with dropout (1 + e)·a·s²: the 5as² of half precision. "flash" adds the output,
        e·s·h, and 4·a·s of log-sum-exp. A boolean causal mask, s² bytes in all, is not in it; nor is a softmax that is
        computed in float32 and cast, which keeps more. A model that repeats shared keys for "vanilla" keeps them at
        kv_heads = heads.
        """
        check_count(sequence_length=sequence_length)
        check_positive(sequences=sequences)
        s, e = sequence_length, self.element_bytes
        shared = (self.kv_heads or self.heads) / self.heads
        kept = e * s * self.hidden * (1 + 2 * shared)
        if self.kind == "vanilla":
            kept += self.heads * s**2 * (2 * e + 1 if self.dropout else e)
        else:
            kept += e * s * self.hidden + LOGSUMEXP_BYTES * self.heads * s
        return float(sequences * self.layers * kept)
