"""What is asked of the rules, what each answers, and which to believe."""

from __future__ import annotations

from dataclasses import dataclass

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun

LEAST_LOSS, LOSS = "batch of least loss", "loss"
CRITICAL, CHEAP = "critical batch (twice the least tokens)", "batch that costs 20 % more tokens"
RATE, DECAY, MEMORY, STEPS = "learning rate", "weight decay", "memory of the weights", "updates"


CHINCHILLA_RATIO, TOO_FAR = 20.0, 1e4
_BATCHES = ("batch_tokens", "base_batch_tokens", "noise_scale_tokens")


@dataclass(frozen=True)
class Setting(JsonNoun):
    """A training run to be advised on. Counts are plain: 7e9 parameters, 300e9 tokens.

    params: N. tokens: D, all that are trained on. sequence_length: tokens, to give batches in sequences too.
    batch_tokens: the batch in mind, over all devices; None for the one that is believed best.
    learning_rate, base_batch_tokens: a rate and the batch it was tuned at, together. noise_scale_tokens: as measured.
    loss: nats a token that the run is to reach; None for what `chinchilla` predicts. replicas: of DiLoCo.
    non_embedding_params: N without embeddings, which two laws of the loss count; None leaves them out.
    """

    params: float
    tokens: float
    optimizer: str = "adamw"
    sequence_length: int = 2048
    batch_tokens: float | None = None
    learning_rate: float | None = None
    base_batch_tokens: float | None = None
    noise_scale_tokens: float | None = None
    loss: float | None = None
    replicas: int | None = None
    non_embedding_params: float | None = None

    def __post_init__(self) -> None:
        optional = (*_BATCHES, "learning_rate", "loss", "non_embedding_params")
        given = {name: getattr(self, name) for name in optional}
        check_positive(params=self.params, tokens=self.tokens, **{k: v for k, v in given.items() if v is not None})
        check_count(sequence_length=self.sequence_length)
        if self.replicas is not None:
            check_count(replicas=self.replicas)
        if (self.learning_rate is None) != (self.base_batch_tokens is None):
            raise InputError(
                "learning_rate and base_batch_tokens, the batch that it was tuned at, go together, got "
                f"{self.learning_rate!r} and {self.base_batch_tokens!r}"
            )
        for name in _BATCHES:
            batch = given[name]
            if batch is not None and not self.sequence_length <= batch <= self.tokens:
                raise InputError(
                    f"{name} must lie between a sequence of {self.sequence_length} tokens and the run's "
                    f"{self.tokens:.6g}, got {batch!r}: is it in sequences?"
                )
        if not 1 / TOO_FAR <= self.tokens_per_parameter / CHINCHILLA_RATIO <= TOO_FAR:
            raise InputError(
                f"params and tokens must be plain counts, got {self.params:.6g} and {self.tokens:.6g}: "
                f"{self.tokens_per_parameter:.3g} tokens a parameter are beyond all that was ever trained"
            )
        if (self.non_embedding_params or 0) > self.params:
            raise InputError(
                f"non_embedding_params must be at most params, {self.params:.6g}, got {self.non_embedding_params!r}"
            )

    @property
    def tokens_per_parameter(self) -> float:
        """D/N."""
        return self.tokens / self.params


@dataclass(frozen=True)
class Answer(JsonNoun):
    """What one rule says. value: in `unit`, "" for a plain number.

    rule: its name, of `rules.published` where it stands there. formula, source: for the reader. status: how its
    constants are known. outside: why it does not hold here, such as an input beyond the range it was fitted over, and
    beyond: by which factor, infinite where another law stands in between. note: what it means.
    """

    question: str
    rule: str
    value: float
    unit: str
    formula: str
    source: str
    status: str
    outside: str = ""
    note: str = ""
    beyond: float = 1.0


@dataclass(frozen=True)
class NotAsked(JsonNoun):
    """A rule that does not apply to the setting, and why."""

    question: str
    rule: str
    why: str


@dataclass(frozen=True)
class Verdict(JsonNoun):
    """Of all answers to a question: which to believe and why, and from least to most what all of them say.

    low, high: of the answers, in `unit`; of a learning rate those by rules for the optimizer. agreement: high/low.
    warning: where they differ by more than a factor of 2, a loss by more than 0.1 nats, or the believed one does not
    quite hold; or "".
    """

    question: str
    rule: str
    value: float
    unit: str
    low: float
    high: float
    why: str
    warning: str = ""

    @property
    def agreement(self) -> float:
        """The largest answer over the least."""
        return self.high / self.low


@dataclass(frozen=True)
class Advice(JsonNoun):
    """Every rule that applies to a setting, side by side, with a verdict on each question."""

    setting: Setting
    answers: tuple[Answer, ...]
    verdicts: tuple[Verdict, ...]
    not_asked: tuple[NotAsked, ...]

    def verdict(self, question: str) -> Verdict:
        """The verdict on a question, by its name."""
        found = {each.question: each for each in self.verdicts}
        if question not in found:
            raise InputError(f"question must be one of {', '.join(found)}, got {question!r}")
        return found[question]

    def table(self) -> str:
        """Text for a terminal: a block for each question, the believed rule marked, then the warnings."""
        from batchlab.planner.advice.words import table

        return table(self)
