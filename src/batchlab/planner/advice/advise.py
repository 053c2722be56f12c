"""`advise`: every rule that applies to a stated setting, side by side, and which to believe."""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchlab.core.errors import InputError
from batchlab.planner.advice import answers as ask
from batchlab.planner.advice.nouns import (
    CHEAP,
    CRITICAL,
    LEAST_LOSS,
    LOSS,
    RATE,
    Advice,
    Answer,
    NotAsked,
    Setting,
    Verdict,
)
from batchlab.rules import loss as losses
from batchlab.rules.learning_rate import for_optimizer
from batchlab.rules.optimizer_family import family, plain_name
from batchlab.rules.token_batch import TokenBatch

FAR_APART, FAR_NATS = 2.0, 0.1
_KNOWN = {ask.MEASURED: 0, ask.CLOSED_FORM: 1, "read": 1, "second-hand": 2, "unverified": 3}


def advise(
    *,
    params: float,
    tokens: float,
    optimizer: str = "adamw",
    sequence_length: int = 2048,
    batch_tokens: float | None = None,
    learning_rate: float | None = None,
    base_batch_tokens: float | None = None,
    noise_scale_tokens: float | None = None,
    loss: float | None = None,
    replicas: int | None = None,
    non_embedding_params: float | None = None,
) -> Advice:
    """What the published rules say of a run of `params` parameters over `tokens` tokens; arguments as in `Setting`.

    Of all rules that answer a question, one is believed: first what was measured on the job itself, then a law inside
    the range that it was fitted over, then one whose constants were read in their source. Where the answers differ by
    more than a factor of two the verdict warns: then measure (`batchlab probe`, `batchlab sweep`) or fit the law to
    your own runs (`rules.fit`).

    The laws are of language models, trained once over their data. For other jobs, measure.

    >>> told = advise(params=7e9, tokens=300e9)
    >>> [(v.question, v.rule) for v in told.verdicts][:2]
    [('batch of least loss', 'data_budget'), ('critical batch (twice the least tokens)', 'power_lines_crit')]
    """
    setting = Setting(
        params,
        tokens,
        plain_name(optimizer),
        sequence_length,
        batch_tokens,
        learning_rate,
        base_batch_tokens,
        noise_scale_tokens,
        loss,
        replicas,
        non_embedding_params,
    )
    family(setting.optimizer)
    expected = setting.loss or _expected_loss(setting)
    batches = [*ask.least_loss(setting), *ask.critical(setting, expected)]
    batch = batch_tokens or _believed_batch(batches)
    twice = [a for a in batches if isinstance(a, Answer) and a.question == CRITICAL]
    believed = min(twice, key=_doubt, default=None)
    critical = None if believed is None else TokenBatch(believed.value, outside=believed.outside)
    said = [*batches]
    if batch is not None:
        rate = _rate(setting, batch)
        said += [
            *ask.steps(setting, batch),
            *ask.losses(setting, batch, critical),
            *ask.rates(setting, batch),
            *ask.decays(setting, batch, rate, None if believed is None else believed.value),
        ]
    answered = tuple(each for each in said if isinstance(each, Answer))
    if not answered:
        raise InputError(
            f"no rule applies to {params:.3g} parameters and {tokens:.3g} tokens: {said[0].why}"  # type: ignore[union-attr]
        )
    questions = list(dict.fromkeys(each.question for each in answered))
    verdicts = tuple(verdict([a for a in answered if a.question == q], setting) for q in questions)
    return Advice(setting, answered, verdicts, tuple(each for each in said if isinstance(each, NotAsked)))


def verdict(answers: Sequence[Answer], setting: Setting) -> Verdict:
    """Which of the answers to one question to believe."""
    question = answers[0].question
    chosen = _for_optimizer(answers, setting) if question == RATE else min(answers, key=_doubt)
    low, high = min(a.value for a in answers), max(a.value for a in answers)
    told = []
    if question == LOSS and high - low > FAR_NATS:
        told.append(f"the rules differ by {high - low:.2g} nats: fit one of them to runs of your own")
    elif question != LOSS and high > FAR_APART * low:
        told.append(
            f"the rules differ by a factor of {high / low:.3g}: measure, or fit one of them to runs of your own"
        )
    if chosen.outside:
        told.append(f"it does not quite hold: {chosen.outside}")
    return Verdict(question, chosen.rule, chosen.value, chosen.unit, low, high, _why(chosen, answers), "; ".join(told))


def _doubt(answer: Answer) -> tuple[bool, float, int, float]:
    """Less is better: measured before all; then by factors of two outside its range; constants known; smaller batch."""
    known = max(rank for word, rank in _KNOWN.items() if word in answer.status)
    smaller = answer.value if answer.unit == "tokens" else 0.0
    beyond = math.inf if math.isinf(answer.beyond) else float(math.ceil(math.log2(answer.beyond)))
    return answer.status != ask.MEASURED, beyond, known, smaller


def _for_optimizer(answers: Sequence[Answer], setting: Setting) -> Answer:
    """The rule that fits the optimizer, where there is a rate to move; else the law."""
    moved = {a.rule: a for a in answers}
    for rule in moved:
        if setting.learning_rate is not None and setting.base_batch_tokens is not None:
            noise = setting.noise_scale_tokens
            rule = for_optimizer(setting.optimizer, 1.0, 1.0, 1.0, noise_scale=noise).rule
        if rule in moved:
            return moved[rule]
    return answers[0]


def _why(chosen: Answer, answers: Sequence[Answer]) -> str:
    if len(answers) == 1:
        return "the only rule that applies"
    if chosen.status == ask.MEASURED:
        return "it was measured on the job itself"
    if chosen.question == RATE and chosen.status == ask.CLOSED_FORM:
        return chosen.note
    doubts = {id(a): _doubt(a) for a in answers}
    equals = [a for a in answers if doubts[id(a)][:3] == doubts[id(chosen)][:3]]
    if len(equals) > 1 and chosen.unit == "tokens":
        return "none is known better than another; of them the least: a batch too small costs time, too large tokens"
    if len(equals) > 1:
        return "of those known as well it is the one that counts the batch"
    if any(doubts[id(a)][1] == doubts[id(chosen)][1] for a in answers if a is not chosen):
        return f"its constants are known best: {chosen.status}"
    return "it holds here best: the others extrapolate" + (" further" if chosen.outside else "")


def _expected_loss(setting: Setting) -> float | None:
    """By `chinchilla`, in nats of its own tokenizer; None where that refuses."""
    try:
        return losses.chinchilla(params=setting.params, tokens=setting.tokens).nats
    except InputError:
        return None


def _believed_batch(said: Sequence[Answer | NotAsked]) -> float | None:
    for question in (LEAST_LOSS, CHEAP):
        answers = [a for a in said if isinstance(a, Answer) and a.question == question]
        if answers:
            return min(answers, key=_doubt).value
    return None


def _rate(setting: Setting, batch_tokens: float) -> float | None:
    """The moved learning rate, where one was given."""
    if setting.learning_rate is None or setting.base_batch_tokens is None:
        return None
    noise = setting.noise_scale_tokens
    return for_optimizer(
        setting.optimizer, setting.learning_rate, setting.base_batch_tokens, batch_tokens, noise_scale=noise
    ).learning_rate
