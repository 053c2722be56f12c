"""The loss that a run will have, from its size, its updates and its batch: three published forms.

`kaplan`, `trajectory` and their inverses (Kaplan et al. 2020, arXiv 2001.08361, equations 5.1 to 5.6; Su et al. 2024,
arXiv 2403.06563): N non-embedding parameters, S updates, B tokens each,

  (a) L(N) = (N_c/N)^α_N                                   unlimited updates
  (b) B_crit(L) = B_*/L^(1/α_B)                            tokens
  (c) S_min = S/(1 + B_crit(L)/B)                          the updates that an unlimited batch would have taken
  (e) L = L(N) + (S_c/S_min)^α_S                           implicit in L, with one root

`chinchilla` and `batch_adjusted` (Hoffmann et al. 2022; Shuai et al. 2024, arXiv 2412.01505) count tokens in place of
updates; `diloco` (Charles et al. 2025, arXiv 2503.09799) holds at 20 tokens a parameter.

Losses are nats a token, by the law's own tokenizer: every constant changes with tokenizer, data, context length and
architecture. The six constants of (e) have no default; the published ones are examples, and `rules.fit.trajectory`
finds yours. Trust (e) after the warm-up, at a rate that does not decay, on data that do not repeat. Beyond the range of
a published law `outside` says so; plain numbers of updates and tokens cannot: ask `least_loss` and `critical_batch`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from numpy.typing import ArrayLike

from batchlab.core.checks import check_count, check_positive, holds
from batchlab.core.errors import InputError
from batchlab.rules.batch import Algorithm, diloco_law
from batchlab.rules.law_loss import ChinchillaConstants, LawLoss, LossCurve, TrajectoryConstants
from batchlab.rules.published import law, laws
from batchlab.rules.token_batch import TokenBatch

TRAJECTORY_LAWS = {"kaplan_loss": "kaplan_cbs", "trajectory_loss": "trajectory_cbs"}
TWICE_THE_LEAST = ("", "power_lines_crit", *TRAJECTORY_LAWS.values())
CONTEXT = 1024  # tokens of a sequence in both sources: no batch of theirs was less
_LARGEST = 709.0  # e^709 is the largest that a float holds
_MOST_STEPS = 240  # a third of them halve, and 60 halvings are enough


class BalancedRun(NamedTuple):
    """A run at the critical batch: twice the least updates and twice the least tokens to its loss."""

    batch: TokenBatch
    steps: float
    tokens: float


Constants = TrajectoryConstants | Literal["kaplan_loss", "trajectory_loss"]
OfTokens = ChinchillaConstants | tuple[float, float, float, float, float] | Literal["chinchilla_loss"]


def published_constants(name: str) -> TrajectoryConstants:
    """The six of a published law, `"kaplan_loss"` or `"trajectory_loss"`; α_B and B_* stand with its critical batch.

    >>> published_constants("kaplan_loss").B_star
    200000000.0
    """
    if name not in TRAJECTORY_LAWS:
        raise InputError(f"name must be one of {', '.join(TRAJECTORY_LAWS)}, got {name!r}")
    return TrajectoryConstants(**law(name).constants, **law(TRAJECTORY_LAWS[name]).constants)


def least_loss(*, params: float, constants: Constants) -> LawLoss:
    """L(N) = (N_c/N)^α_N: what N parameters reach with unlimited updates on unlimited data.

    params: N, without embeddings. constants: the name of a published law, or your own.

    >>> round(least_loss(params=6e7, constants="trajectory_loss").nats, 4)
    3.0637
    """
    c, name, outside = _resolved(constants, params=params)
    return _loss(_least(c, params), name, outside)


def kaplan(*, params: float, steps: float, batch_tokens: float, constants: Constants) -> LawLoss:
    """The root L of (e): the loss after S updates of B tokens.

    params: N, without embeddings. steps: S. batch_tokens: B, over all devices. constants: the name of a published law,
    `"kaplan_loss"` or `"trajectory_loss"`, or your own. As B grows, S_min tends to S; as S grows, L to L(N).

    >>> round(kaplan(params=6e7, steps=1e4, batch_tokens=5e5, constants="trajectory_loss").nats, 4)
    3.6271
    """
    check_positive(steps=steps)
    c, name, outside = _resolved(constants, params=params, batch_tokens=batch_tokens)
    return _loss(_least(c, params) + _excess(c, params, steps, batch_tokens), name, outside)


def trajectory(*, params: float, steps: ArrayLike, batch_tokens: float, constants: Constants) -> LossCurve:
    """`kaplan` at each of `steps`, a one-dimensional array of any order: the whole loss curve at one batch size.

    >>> curve = trajectory(params=6e7, steps=[1e3, 1e4, 1e5], batch_tokens=2e6, constants="trajectory_loss")
    >>> [round(loss, 4) for loss in curve.losses]
    [5.0023, 3.5178, 3.1674]
    """
    import numpy as np

    try:
        at = np.asarray(steps, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"steps must be a list of numbers, got {steps!r}") from None
    if at.ndim != 1 or not at.size:
        raise InputError(f"steps must be a list of at least one number, got an array of shape {at.shape}")
    for step in at.tolist():
        check_positive(steps=step)
    c, name, outside = _resolved(constants, params=params, batch_tokens=batch_tokens)
    least = _least(c, params)
    losses = [_loss(least + _excess(c, params, step, batch_tokens), name, outside) for step in at.tolist()]
    said = max((each.outside for each in losses), key=len)
    return LossCurve(tuple(at.tolist()), tuple(each.nats for each in losses), name, said)


def critical_batch(*, loss: float, constants: Constants) -> TokenBatch:
    """B_crit = B_*/L^(1/α_B): at which a loss takes twice the least updates and twice the least tokens.

    It follows the loss alone in this law; `rules.batch.power_lines_crit` and `data_cbs` follow tokens. Compare them.

    >>> round(critical_batch(loss=3.0, constants="kaplan_loss").tokens)
    1069114
    """
    check_positive(loss=loss)
    c, name, _ = _resolved(constants)
    outside = law(TRAJECTORY_LAWS[name]).outside(loss=loss) if name else ""
    return TokenBatch(_exp(_log_critical(c, loss), "a critical batch"), TRAJECTORY_LAWS.get(name, ""), outside)


def least_steps(*, loss: float, params: float, constants: Constants) -> float:
    """S_min = S_c·(L - L(N))^(-1/α_S): updates to a loss with an unlimited batch. The loss must exceed L(N).

    >>> round(least_steps(loss=3.2, params=6e7, constants="trajectory_loss"))
    50895
    """
    c, name, _ = _resolved(constants, params=params)
    check_positive(loss=loss)
    excess = loss - _least(c, params)
    if not excess > 0:
        raise InputError(
            f"loss must exceed {_least(c, params):.6g} nats a token, the least that {params:.6g} parameters reach with "
            f"any number of steps under {name or 'your constants'}, got {loss!r}"
        )
    return _exp(math.log(c.S_c) - math.log(excess) / c.alpha_S, "a number of steps")


def least_tokens(*, loss: float, params: float, constants: Constants) -> float:
    """E_min = B_crit(L)·S_min: tokens to a loss with a vanishing batch."""
    return critical_batch(loss=loss, constants=constants).tokens * least_steps(
        loss=loss, params=params, constants=constants
    )


def steps_to_loss(*, loss: float, params: float, batch_tokens: float, constants: Constants) -> float:
    """S = S_min·(1 + B_crit(L)/B): updates of B tokens to a loss; the inverse of `kaplan` in S.

    >>> round(steps_to_loss(loss=3.6271, params=6e7, batch_tokens=5e5, constants="trajectory_loss"), -1)
    10000.0
    """
    least = least_steps(loss=loss, params=params, constants=constants)
    c, _, _ = _resolved(constants, params=params, batch_tokens=batch_tokens)
    ratio = _exp(_log_critical(c, loss) - math.log(batch_tokens), "a ratio of batches")
    return least * (1 + ratio)


def balanced_run(*, loss: float, params: float, constants: Constants) -> BalancedRun:
    """B = B_crit(L), S = 2·S_min, E = 2·E_min: the run that weighs time and compute alike (equation 5.2).

    For a given compute the best N ends such a run at L = (1 + α_N/α_S)·L(N), about 10 % above L(N) (equation B.5).

    >>> run = balanced_run(loss=3.2, params=6e7, constants="trajectory_loss")
    >>> round(run.batch.tokens), round(run.steps), round(run.tokens / run.steps / run.batch.tokens, 9)
    (583852, 101790, 1.0)
    """
    batch = critical_batch(loss=loss, constants=constants)
    steps = 2 * least_steps(loss=loss, params=params, constants=constants)
    return BalancedRun(batch, steps, steps * batch.tokens)


def chinchilla(*, params: float, tokens: float, constants: OfTokens = "chinchilla_loss") -> LawLoss:
    """L = E + A/N^α + B/D^β: the loss of N parameters after D tokens, at a batch below the critical one.

    params: N. tokens: D. constants: by default those of Hoffmann et al. 2022 (unverified), of their data and tokenizer;
    or your own, also as (E, A, α, B, β), as `rules.fit.chinchilla` finds them.

    >>> round(chinchilla(params=7e10, tokens=1.4e12).nats, 3)
    1.937
    """
    check_positive(params=params, tokens=tokens)
    c, name = _of_tokens(constants)
    outside = law(name).outside(params=params, tokens=tokens) if name else ""
    return LawLoss(_chinchilla(c, params, tokens), name, outside)


def batch_adjusted(
    *,
    params: float,
    tokens: float,
    batch_tokens: float,
    critical_batch: TokenBatch,
    constants: OfTokens = "chinchilla_loss",
) -> LawLoss:
    """`chinchilla` at D_eff = D/(1 + B/B_crit): what a batch near the critical one costs (Shuai et al. 2024).

    batch_tokens: B. critical_batch: B_crit, at which a loss takes twice the least tokens: from `rules.batch.
    power_lines_crit`, `kaplan_cbs`, a fit, or `TokenBatch(tokens)`. A batch of another meaning, such as that of Zhang
    et al., which costs 20 % more tokens, is refused.

    >>> round(batch_adjusted(params=7e10, tokens=1.4e12, batch_tokens=2e6, critical_batch=TokenBatch(2e6)).nats, 3)
    1.972
    """
    if not isinstance(critical_batch, TokenBatch):
        raise InputError(f"critical_batch must be a TokenBatch, as in TokenBatch(1e6), got {critical_batch!r}")
    if critical_batch.law not in TWICE_THE_LEAST:
        known = laws().get(critical_batch.law)
        what = f" of {known.name}: {known.gives}" if known else f" of {critical_batch.law}"
        raise InputError(
            f"critical_batch must be one at which a loss takes twice the least tokens (power_lines_crit, kaplan_cbs, "
            f"rules.fit.critical_batch_law or your own), got that{what}"
        )
    check_positive(tokens=tokens, batch_tokens=batch_tokens)
    if batch_tokens > tokens:
        raise InputError(f"tokens must be at least one batch of {batch_tokens:.6g}, got {tokens:.6g}")
    at_small = chinchilla(params=params, tokens=tokens, constants=constants)
    slowed = tokens / (1 + batch_tokens / critical_batch.tokens)
    said = "; ".join(each for each in (at_small.outside, critical_batch.outside) if each)
    return LawLoss(_chinchilla(_of_tokens(constants)[0], params, slowed), at_small.law, said)


def diloco(
    *,
    params: float,
    replicas: int | None = None,
    algorithm: Algorithm = "data_parallel",
    fit: Literal["joint", "independent"] = "joint",
) -> LawLoss:
    """L = A·N^α·M^β, or A·N^α for data-parallel and for each M, at 20 tokens a parameter (Charles et al. 2025).

    Arguments as in `rules.batch.diloco_opt`. Beyond its range it is too low: runs of 4e9 reached 2.219, 2.220 and 2.230
    with 1, 2 and 4 replicas, 0.7 to 1.8 % above it, and runs of 1e10 3.5 to 4.6 %.

    >>> [round(diloco(params=4e9, algorithm="diloco", replicas=m).nats, 2) for m in (1, 2, 4)]
    [2.18, 2.2, 2.21]
    """
    rule = law("diloco_loss")
    value = diloco_law(rule, params=params, replicas=replicas, algorithm=algorithm, fit=fit)
    outside = rule.outside(params=params, **({} if replicas is None else {"replicas": replicas}))
    return LawLoss(value, rule.name, outside)


def diloco_parametric(
    *, params: float, replicas: int, A: float, alpha: float, beta: float, C: float, params_unit: float = 1.0
) -> LawLoss:
    """L = A·N^(α + βM) + C: of four forms the one that foretold the held-out 2.4B best (Charles et al. 2025).

    replicas: M. The source prints no constants for it: `rules.fit.parametric` finds them from runs. params_unit: what
    one of N is, in parameters. alpha and beta are signed: losses fall with N where α + βM < 0.

    >>> round(diloco_parametric(params=1e9, replicas=2, A=40.0, alpha=-0.16, beta=0.001, C=1.0).nats, 3)
    2.514
    """
    check_positive(params=params, A=A, params_unit=params_unit)
    check_count(replicas=replicas)
    for name, value in (("alpha", alpha), ("beta", beta), ("C", C)):
        if not holds(math.isfinite, value):
            raise InputError(f"{name} must be finite, got {value!r}")
    by_size = _exp(math.log(A) + (alpha + beta * replicas) * math.log(params / params_unit), "a loss")
    return LawLoss(by_size + C)


def _resolved(constants: Constants, **given: float) -> tuple[TrajectoryConstants, str, str]:
    """The six numbers, the law's name, and what lies beyond its range."""
    check_positive(**given)
    if isinstance(constants, TrajectoryConstants):
        return constants, "", ""
    if not isinstance(constants, str) or constants not in TRAJECTORY_LAWS:
        names = ", ".join(f'"{name}"' for name in TRAJECTORY_LAWS)
        raise InputError(f"constants must be {names} or TrajectoryConstants, got {constants!r}")
    rule = law(constants)
    if given.get("batch_tokens", CONTEXT) < CONTEXT:
        raise InputError(
            f"batch_tokens must be tokens, at least one sequence of {CONTEXT} under {rule.name}, "
            f"got {given['batch_tokens']!r}: are these sequences?"
        )
    outside = rule.outside(params=given["params"]) if "params" in given else ""
    return published_constants(constants), rule.name, outside


def _loss(nats: float, name: str, outside: str) -> LawLoss:
    """With a word where the critical batch was not fitted at such a loss."""
    if name:
        low, high = law(TRAJECTORY_LAWS[name]).range["loss"]
        if not low <= nats <= high:
            said = f"a loss of {nats:.3g} lies beyond {low:.3g} to {high:.3g}, where {name} was fitted"
            outside = f"{outside}; {said}" if outside else said
    return LawLoss(nats, name, outside)


def _least(c: TrajectoryConstants, params: float) -> float:
    return _exp(c.alpha_N * (math.log(c.N_c) - math.log(params)), "a least loss")


def _log_critical(c: TrajectoryConstants, loss: float) -> float:
    return math.log(c.B_star) - math.log(loss) / c.alpha_B


def _excess(c: TrajectoryConstants, params: float, steps: float, batch_tokens: float) -> float:
    """x = L - L(N), solved for ln x: rhs(x) falls and lies above its limit at B = ∞, so it brackets the root.

    Newton's steps, with a halving at every third or where one leaves the bracket. SciPy's root finders take half a
    second to import, far more than all of `advise`.
    """
    least, log_batch = _least(c, params), math.log(batch_tokens)

    def log_right(log_x: float) -> tuple[float, float]:
        """ln of the right side's excess, and minus its slope."""
        excess = _exp(log_x, "a loss")
        ratio = _log_critical(c, least + excess) - log_batch
        slower = ratio + math.log1p(math.exp(-ratio)) if ratio > 0 else math.log1p(math.exp(ratio))
        share = 1 / (1 + math.exp(-ratio)) if ratio > -_LARGEST else 0.0
        slope = c.alpha_S / c.alpha_B * share * excess / (least + excess)
        return c.alpha_S * (math.log(c.S_c) - math.log(steps) + slower), slope

    low = log_x = c.alpha_S * (math.log(c.S_c) - math.log(steps))
    high = log_right(low)[0]
    for count in range(_MOST_STEPS):
        right, slope = log_right(log_x)
        low, high = max(low, min(log_x, right)), min(high, max(log_x, right))  # the root lies between x and rhs(x)
        newton = log_x + (right - log_x) / (1 + slope)
        if abs(newton - log_x) <= 4e-16 * max(1.0, abs(log_x)):
            break
        log_x = newton if low < newton < high and count % 3 else (low + high) / 2
    return _exp(newton, "a loss")


def _of_tokens(constants: OfTokens) -> tuple[ChinchillaConstants, str]:
    """The five numbers and the law's name."""
    if isinstance(constants, ChinchillaConstants):
        return constants, ""
    if constants == "chinchilla_loss":
        return ChinchillaConstants(**law("chinchilla_loss").constants), "chinchilla_loss"
    if isinstance(constants, tuple) and len(constants) == 5:
        return ChinchillaConstants(*constants), ""
    raise InputError(f'constants must be "chinchilla_loss", ChinchillaConstants or (E, A, α, B, β), got {constants!r}')


def _chinchilla(c: ChinchillaConstants, params: float, tokens: float) -> float:
    by_size = _exp(math.log(c.A) - c.alpha * math.log(params), "a loss")
    return c.E + by_size + _exp(math.log(c.B) - c.beta * math.log(tokens), "a loss")


def _exp(log_value: float, what: str) -> float:
    if log_value > _LARGEST:
        raise InputError(f"the constants give {what} of e^{log_value:.4g}, beyond what a float holds")
    return math.exp(log_value)
