"""Each rule, asked of a setting: an `Answer`, or why it has none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial

from batchlab.core.errors import InputError
from batchlab.planner.advice.nouns import (
    CHEAP,
    CHINCHILLA_RATIO,
    CRITICAL,
    DECAY,
    LEAST_LOSS,
    LOSS,
    MEMORY,
    RATE,
    STEPS,
    Answer,
    NotAsked,
    Setting,
)
from batchlab.rules import batch, learning_rate, loss
from batchlab.rules.law_loss import LawLoss
from batchlab.rules.optimizer_family import decay_kind, family
from batchlab.rules.published import law
from batchlab.rules.token_batch import TokenBatch

Said = Answer | NotAsked
Ask = Callable[[], TokenBatch | LawLoss | float]

NEAR = 2.0
OVERHEAD, SMALL_BATCH = 0.2, 256 * 512.0  # of the definition of Zhang et al. 2024; tokens
MEASURED, CLOSED_FORM = "measured", "closed form"
_OF_BOTH = ("sqrt", "saturating_sqrt", "saturating")
MOVES = {"sgd": ("linear", *_OF_BOTH), "adam": ("surge", *_OF_BOTH), "adagrad": ("none",)}


def least_loss(setting: Setting) -> Iterator[Said]:
    """The batch that ends with the least loss after D tokens."""
    tokens = setting.tokens
    told = (
        _said(LEAST_LOSS, "power_lines_opt", lambda: batch.power_lines_opt(tokens=tokens), tokens=tokens),
        _said(LEAST_LOSS, "data_budget", lambda: batch.data_budget(tokens=tokens), tokens=tokens),
    )
    yield from (_of_data_parallel(setting, said) for said in told)
    yield _diloco(setting, LEAST_LOSS, "diloco_batch", lambda **of: batch.diloco_opt(params=setting.params, **of))


def critical(setting: Setting, expected_loss: float | None) -> Iterator[Said]:
    """Where more batch begins to cost more tokens, by both definitions. expected_loss: nats, for laws that need it.

    Zhang et al. allow 20 % more tokens than a batch of B_o = 256 sequences of 512; with tokens in proportion to
    1 + B/B_crit that batch is B* = 1.2·B_o + 0.2·B_crit, and so each definition is given by the laws of the other too.
    """
    for said in _twice_the_least(setting, expected_loss):
        yield said
        if isinstance(said, Answer):
            value = (1 + OVERHEAD) * SMALL_BATCH + OVERHEAD * said.value
            yield dataclasses.replace(
                said, question=CHEAP, value=value, note=_joined(said.note, "1.2·B_o + 0.2·B_crit")
            )
    tokens, params = setting.tokens, setting.params
    data = _said(CHEAP, "data_cbs", lambda: batch.data_cbs(tokens=tokens), tokens=tokens)
    size = _at_twenty(setting, CHEAP, "chinchilla_cbs", lambda: batch.chinchilla_cbs(params=params), params=params)
    for said in (data, size):
        yield said
        if isinstance(said, Answer):
            yield _as_critical(said)


def _as_critical(cheap: Answer) -> Said:
    """B_crit from B*, which must exceed 1.2·B_o."""
    value = (cheap.value - (1 + OVERHEAD) * SMALL_BATCH) / OVERHEAD
    if value <= 0:
        why = f"its batch of {cheap.value:.3g} tokens is not above 1.2·B_o = {1.2 * SMALL_BATCH:.3g}: no B_crit follows"
        return NotAsked(CRITICAL, cheap.rule, why)
    return dataclasses.replace(cheap, question=CRITICAL, value=value, note="(B* - 1.2·B_o)/0.2")


def _twice_the_least(setting: Setting, expected_loss: float | None) -> Iterator[Said]:
    """The batch at which a loss takes twice its least tokens."""
    if setting.noise_scale_tokens is not None:
        about = ("B = tr(Σ)/|G|²", "McCandlish et al. 2018, arXiv 1812.06162", MEASURED)
        note = "at the point of training where it was measured"
        yield Answer(CRITICAL, "noise_scale", setting.noise_scale_tokens, "tokens", *about, note=note)
    half = setting.tokens / 2  # at B_crit the run's tokens are twice D_min
    note = "the least tokens are half of the run's"
    power_lines = lambda: batch.power_lines_crit(least_tokens=half)  # noqa: E731
    yield _said(CRITICAL, "power_lines_crit", power_lines, note, least_tokens=half)
    for constants in ("kaplan", "trajectory"):
        if expected_loss is None:
            yield NotAsked(
                CRITICAL, f"{constants}_cbs", "needs the loss that is to be reached: none could be predicted"
            )
            continue
        note = f"at {expected_loss:.3g} nats"
        said = _said(CRITICAL, f"{constants}_cbs", _kaplan(expected_loss, constants), note, loss=expected_loss)
        if setting.loss is None and isinstance(said, Answer):
            chained = "its loss is that of chinchilla_loss, of another tokenizer"
            said = dataclasses.replace(said, outside=_joined(said.outside, chained), beyond=math.inf)
        yield said


def losses(setting: Setting, batch_tokens: float, critical_batch: TokenBatch | None) -> Iterator[Said]:
    """The loss at the end, nats a token. critical_batch: at which a loss takes twice its least tokens, for one law."""
    params, tokens = setting.params, setting.tokens
    told: list[Said] = []
    if critical_batch is not None:
        adjusted = lambda: loss.batch_adjusted(  # noqa: E731
            params=params, tokens=tokens, batch_tokens=batch_tokens, critical_batch=critical_batch
        )
        note = f"at {batch_tokens:.3g} tokens a batch, D/(1 + B/B_crit) in place of D"
        told.append(_said(LOSS, "chinchilla_loss", adjusted, note, params=params, tokens=tokens))
    plain, note = lambda: loss.chinchilla(params=params, tokens=tokens), "with a batch far below the critical one"
    told.append(_said(LOSS, "chinchilla_loss", plain, note, params=params, tokens=tokens))
    for name in loss.TRAJECTORY_LAWS:
        if setting.non_embedding_params is None:
            told.append(NotAsked(LOSS, name, "counts parameters without embeddings: non_embedding_params is not given"))
            continue
        size, updates = setting.non_embedding_params, setting.tokens / batch_tokens
        given = {"params": size, "steps": updates, "batch_tokens": batch_tokens}
        ask = partial(loss.kaplan, constants=name, **given)  # type: ignore[arg-type]
        told.append(_said(LOSS, name, ask, "a rate that does not decay", params=size))
    yield from (_of_data_parallel(setting, said) for said in told)
    yield _diloco(setting, LOSS, "diloco_loss", lambda **of: loss.diloco(params=setting.params, **of))


def rates(setting: Setting, batch_tokens: float) -> Iterator[Said]:
    """The peak learning rate at the batch."""
    base, rate, noise = setting.base_batch_tokens, setting.learning_rate, setting.noise_scale_tokens
    if setting.optimizer in ("adam", "adamw"):
        rule = law("diloco_learning_rate")

        def published(algorithm: batch.Algorithm = "data_parallel", replicas: int | None = None) -> float:
            return batch.diloco_law(rule, params=setting.params, replicas=replicas, algorithm=algorithm, fit="joint")

        yield _diloco(setting, RATE, rule.name, published, "for the batch of diloco_batch")
    if base is None or rate is None:
        yield NotAsked(
            RATE, ", ".join(MOVES[family(setting.optimizer)]), "need a learning rate and the batch it was tuned at"
        )
        return
    chosen = learning_rate.for_optimizer(setting.optimizer, rate, base, batch_tokens, noise_scale=noise)
    for name in MOVES[family(setting.optimizer)]:
        if noise is None and name in learning_rate.OF_NOISE:
            yield NotAsked(RATE, name, "needs the noise scale")
            continue
        formula, source, holds_where = learning_rate.reason(name)
        value = learning_rate.rescale(rate, base, batch_tokens, rule=name, noise_scale=noise)  # type: ignore[arg-type]
        note = f"for {setting.optimizer}: {chosen.why}" if name == chosen.rule else f"holds {holds_where}"
        above = noise is not None and name in ("linear", "sqrt") and batch_tokens > noise
        outside = "the batch is above the noise scale" if above else ""
        yield Answer(RATE, name, value, "", formula, source, CLOSED_FORM, outside, note)


def decays(setting: Setting, batch_tokens: float, rate: float | None, critical_tokens: float | None) -> Iterator[Said]:
    """The weights' best memory as a share of the run, and the decoupled weight decay that gives it."""
    rule, ratio, name = law("power_lines_timescale"), setting.tokens_per_parameter, "power_lines_timescale"
    outside = rule.outside(tokens_per_parameter=ratio)
    if critical_tokens is not None and batch_tokens > critical_tokens:
        above = f"the batch is above the critical one of {critical_tokens:.3g} tokens, where no weight decay helps"
        outside = _joined(outside, above)
    tau = rule["c"] * ratio ** rule["m"]
    about = (rule.formula, rule.source, rule.status, outside)
    said = Answer(MEMORY, name, tau, "of the run", *about, "B/(ηλD), the same at any batch below the critical one")
    yield said
    if decay_kind(setting.optimizer) != "decoupled":
        yield NotAsked(DECAY, name, f"holds for decoupled decay times the learning rate, not for {setting.optimizer}")
    elif rate is None:
        yield NotAsked(DECAY, name, "needs the learning rate")
    else:
        decay, note = batch_tokens / (rate * setting.tokens * tau), f"at a learning rate of {rate:.3g}"
        yield dataclasses.replace(said, question=DECAY, value=decay, unit="", formula="λ = B/(ηDτ)", note=note)


def steps(setting: Setting, batch_tokens: float) -> Iterator[Said]:
    """D/B."""
    yield Answer(STEPS, "tokens/batch", setting.tokens / batch_tokens, "updates", "S = D/B", "counting", CLOSED_FORM)


def _diloco(
    setting: Setting, question: str, name: str, ask: Callable[..., TokenBatch | LawLoss | float], note: str = ""
) -> Said:
    """A law of data-parallel training and of DiLoCo: of the one that is asked about."""
    if setting.replicas is None:
        return _at_twenty(setting, question, name, ask, _joined("data-parallel", note), params=setting.params)
    joint = lambda: ask(algorithm="diloco", replicas=setting.replicas)  # noqa: E731
    note = _joined(f"DiLoCo with {setting.replicas} replicas", note)
    return _at_twenty(setting, question, name, joint, note, params=setting.params)


def _of_data_parallel(setting: Setting, said: Said) -> Said:
    """Beside DiLoCo's own laws the others are of another way to train."""
    if setting.replicas is None or isinstance(said, NotAsked):
        return said
    outside = _joined(said.outside, "of data-parallel training, not of DiLoCo")
    return dataclasses.replace(said, outside=outside, beyond=math.inf)


def _kaplan(nats: float, constants: str) -> Callable[[], TokenBatch]:
    return lambda: batch.kaplan_cbs(loss=nats, constants=constants)  # type: ignore[arg-type]


def _at_twenty(setting: Setting, question: str, name: str, ask: Ask, note: str = "", **inputs: float) -> Said:
    """A law that holds at 20 tokens a parameter; not asked a factor of two away."""
    ratio = setting.tokens_per_parameter
    if not CHINCHILLA_RATIO / NEAR <= ratio <= CHINCHILLA_RATIO * NEAR:
        return NotAsked(question, name, f"holds at 20 tokens a parameter, here they are {ratio:.3g}")
    return _said(question, name, ask, note, **inputs)


def _said(question: str, name: str, ask: Ask, note: str = "", **inputs: float) -> Said:
    """The law's answer; what it refuses becomes the reason why it is not asked. inputs: those with a range."""
    rule = law(name)
    try:
        got = ask()
    except InputError as error:
        return NotAsked(question, name, str(error))
    outside = rule.outside(**inputs) if isinstance(got, float) else got.outside
    value, unit = (got.tokens, "tokens") if isinstance(got, TokenBatch) else (float(got), "")
    if isinstance(got, LawLoss):
        unit = "nats a token"
    about = (rule.formula, rule.source, rule.status, outside, note, rule.factor_outside(**inputs))
    return Answer(question, name, value, unit, *about)


def _joined(*said: str) -> str:
    return "; ".join(each for each in said if each)
