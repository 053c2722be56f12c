"""A batch that cannot be taken for another unit: held in tokens, given in sequences only with their length."""

from __future__ import annotations

from dataclasses import dataclass

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun


@dataclass(frozen=True)
class TokenBatch(JsonNoun):
    """What a law says of a batch: tokens of one update, over all devices.

    law: its name in `rules.published`. outside: which inputs lie beyond the range that the law was fitted over; "" if
    none does.

    >>> TokenBatch.of_sequences(223, 2048).sequences(1024)
    446.0
    """

    tokens: float
    law: str = ""
    outside: str = ""

    def __post_init__(self) -> None:
        check_positive(tokens=self.tokens)

    @classmethod
    def of_sequences(cls, sequences: float, sequence_length: float, *, law: str = "", outside: str = "") -> TokenBatch:
        """From a number of sequences. sequence_length: tokens of each."""
        check_positive(sequences=sequences, sequence_length=sequence_length)
        return cls(sequences * sequence_length, law, outside)

    def sequences(self, sequence_length: float) -> float:
        """How many sequences of so many tokens; not rounded."""
        check_positive(sequence_length=sequence_length)
        return self.tokens / sequence_length

    def rounded(self, multiple_tokens: float) -> TokenBatch:
        """To the nearest multiple, at least one: of sequence length x devices x micro-batch, in tokens."""
        check_positive(multiple_tokens=multiple_tokens)
        return TokenBatch(max(1, round(self.tokens / multiple_tokens)) * multiple_tokens, self.law, self.outside)

    def __float__(self) -> float:
        raise InputError("a TokenBatch is no number: say .tokens or .sequences(sequence_length)")
