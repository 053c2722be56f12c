"""Each rule, asked of a setting: an `Answer`, or why it has none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from batchlab.core.errors import InputError
from batchlab.planner.advice.nouns import (
    CHEAP,
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
from batchlab.rules.published import law
from batchlab.rules.token_batch import TokenBatch

Said = Answer | NotAsked

CHINCHILLA_RATIO, NEAR = 20.0, 2.0
OVERHEAD, SMALL_BATCH = 0.2, 256 * 512.0  # of the definition of Zhang et al. 2024; tokens
MEASURED, CLOSED_FORM = "measured", "closed form"


def least_loss(setting: Setting) -> Iterator[Said]:
    """The batch that ends with the least loss after D tokens."""
    yield _said(LEAST_LOSS, "power_lines_opt", lambda: batch.power_lines_opt(tokens=setting.tokens))
    yield _said(LEAST_LOSS, "data_budget", lambda: batch.data_budget(tokens=setting.tokens))
    yield _at_twenty(setting, LEAST_LOSS, "diloco_batch", lambda: batch.diloco_opt(params=setting.params))
    if setting.replicas is not None:
        joint = lambda: batch.diloco_opt(params=setting.params, algorithm="diloco", replicas=setting.replicas)  # noqa: E731
        yield _at_twenty(setting, LEAST_LOSS, "diloco_batch", joint, note=f"DiLoCo with {setting.replicas} replicas")


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
    data = _said(CHEAP, "data_cbs", lambda: batch.data_cbs(tokens=setting.tokens))
    size = _at_twenty(setting, CHEAP, "chinchilla_cbs", lambda: batch.chinchilla_cbs(params=setting.params))
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
    power_lines = lambda: batch.power_lines_crit(least_tokens=half)  # noqa: E731
    yield _said(CRITICAL, "power_lines_crit", power_lines, "the least tokens are half of the run's")
    for constants in ("kaplan", "trajectory"):
        if expected_loss is None:
            yield NotAsked(
                CRITICAL, f"{constants}_cbs", "needs the loss that is to be reached: none could be predicted"
            )
            continue
        said = _said(CRITICAL, f"{constants}_cbs", _kaplan(expected_loss, constants), f"at {expected_loss:.3g} nats")
        if setting.loss is None and isinstance(said, Answer):
            chained = "its loss is that of chinchilla_loss, of another tokenizer"
            said = dataclasses.replace(said, outside=_joined(said.outside, chained))
        yield said


def _joined(*said: str) -> str:
    return "; ".join(each for each in said if each)


def losses(setting: Setting, batch_tokens: float, critical_batch: TokenBatch | None) -> Iterator[Said]:
    """The loss at the end, nats a token. critical_batch: at which a loss takes twice its least tokens, for one law."""
    params, tokens = setting.params, setting.tokens
    if critical_batch is not None:
        adjusted = lambda: loss.batch_adjusted(  # noqa: E731
            params=params, tokens=tokens, batch_tokens=batch_tokens, critical_batch=critical_batch
        )
        note = f"at {batch_tokens:.3g} tokens a batch, D/(1 + B/B_crit) in place of D"
        yield _said(LOSS, "chinchilla_loss", adjusted, note)
    plain = lambda: loss.chinchilla(params=params, tokens=tokens)  # noqa: E731
    yield _said(LOSS, "chinchilla_loss", plain, "with a batch far below the critical one")
    note = "non-embedding parameters; a rate that does not decay"
    for name in loss.TRAJECTORY_LAWS:
        yield _said(LOSS, name, _kaplan_loss(setting, batch_tokens, name), note)
    yield _at_twenty(setting, LOSS, "diloco_loss", lambda: loss.diloco(params=params), note="data-parallel")


def rates(setting: Setting, batch_tokens: float) -> Iterator[Said]:
    """The peak learning rate at the batch."""
    base, rate = setting.base_batch_tokens, setting.learning_rate
    if setting.optimizer in ("adam", "adamw"):
        rule = law("diloco_learning_rate")
        published = lambda: batch.diloco_law(  # noqa: E731
            rule, params=setting.params, replicas=None, algorithm="data_parallel", fit="joint"
        )
        note = f"for its own batch, not for {batch_tokens:.3g} tokens"
        yield _at_twenty(setting, RATE, rule.name, published, note=note)
    if base is None or rate is None:
        yield NotAsked(RATE, "linear, sqrt, saturating, surge", "need a learning rate and the batch it was tuned at")
        return
    noise = setting.noise_scale_tokens
    chosen = learning_rate.for_optimizer(setting.optimizer, rate, base, batch_tokens, noise_scale=noise)
    for name in ("none", "sqrt", "linear", "surge", "saturating"):
        if noise is None and name in ("surge", "saturating"):
            yield NotAsked(RATE, name, "needs the noise scale")
            continue
        formula, source, holds_where = learning_rate.reason(name)
        value = learning_rate.rescale(rate, base, batch_tokens, rule=name, noise_scale=noise)
        note = f"for {setting.optimizer}: {chosen.why}" if name == chosen.rule else f"holds {holds_where}"
        yield Answer(RATE, name, value, "", formula, source, CLOSED_FORM, note=note)


def decays(setting: Setting, batch_tokens: float, rate: float | None) -> Iterator[Said]:
    """The weights' best memory as a share of the run, and the decoupled weight decay that gives it."""
    rule, name = law("power_lines_timescale"), "power_lines_timescale"
    try:
        outside = rule.outside(tokens_per_parameter=setting.tokens_per_parameter)
    except InputError as error:
        yield NotAsked(MEMORY, name, str(error))
        return
    tau = rule["c"] * setting.tokens_per_parameter ** rule["m"]
    about = (rule.formula, rule.source, rule.status, outside)
    yield Answer(MEMORY, name, tau, "of the run", *about, "B/(ηλD), the same at any batch below the critical one")
    if setting.optimizer not in ("adamw", "lion", "muon", "lamb"):
        yield NotAsked(DECAY, name, f"holds for decoupled decay times the learning rate, not for {setting.optimizer}")
    elif rate is None:
        yield NotAsked(DECAY, name, "needs the learning rate")
    else:
        decay = batch_tokens / (rate * setting.tokens * tau)
        yield Answer(DECAY, name, decay, "", "λ = B/(ηDτ)", *about[1:], f"at a learning rate of {rate:.3g}")


def steps(setting: Setting, batch_tokens: float) -> Iterator[Said]:
    """D/B."""
    yield Answer(STEPS, "tokens/batch", setting.tokens / batch_tokens, "updates", "S = D/B", "counting", CLOSED_FORM)


def _kaplan(nats: float, constants: str) -> Callable[[], TokenBatch]:
    return lambda: batch.kaplan_cbs(loss=nats, constants=constants)  # type: ignore[arg-type]


def _kaplan_loss(setting: Setting, batch_tokens: float, name: str) -> Callable[[], LawLoss]:
    updates = setting.tokens / batch_tokens
    return lambda: loss.kaplan(params=setting.params, steps=updates, batch_tokens=batch_tokens, constants=name)  # type: ignore[arg-type]


def _at_twenty(
    setting: Setting, question: str, name: str, ask: Callable[[], TokenBatch | LawLoss | float], *, note: str = ""
) -> Said:
    """A law that holds at 20 tokens a parameter; not asked a factor of two away."""
    ratio = setting.tokens_per_parameter
    if not CHINCHILLA_RATIO / NEAR <= ratio <= CHINCHILLA_RATIO * NEAR:
        return NotAsked(question, name, f"holds at 20 tokens a parameter, here they are {ratio:.3g}")
    return _said(question, name, ask, note)


def _said(question: str, name: str, ask: Callable[[], TokenBatch | LawLoss | float], note: str = "") -> Said:
    """The law's answer; what it refuses becomes the reason why it is not asked."""
    rule = law(name)
    try:
        got = ask()
    except InputError as error:
        return NotAsked(question, name, str(error))
    outside = "" if isinstance(got, float) else got.outside
    value, unit = (got.tokens, "tokens") if isinstance(got, TokenBatch) else (float(got), "")
    if isinstance(got, LawLoss):
        unit = "nats a token"
    return Answer(question, name, value, unit, rule.formula, rule.source, rule.status, outside, note)
