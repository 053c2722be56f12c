"""The learning rate that goes with a batch size, from one that was tuned at another.

Every rule takes (η₀, B₀, B) and gives η, in the unit of η₀; B₀, B and the noise scale count one unit, examples or
tokens. Every rule is η₀·f(B)/f(B₀) for some f > 0: moving a -> b -> c gives what a -> c gives, and a -> a changes
nothing. All hold for the peak learning rate, with all else that moves with the batch moved too.

None of them knows the largest stable learning rate: a rise by more than the range over which η₀ was tuned is a guess.
`rmt_max` is such a ceiling, from the curvature of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from batchlab.core.checks import check_positive, holds
from batchlab.core.errors import InputError
from batchlab.curves.spike_law import effective_batch, mean_square_edge, spike_edge, stable_rate
from batchlab.rules.optimizer_family import FAMILY as FAMILY
from batchlab.rules.optimizer_family import Family as Family
from batchlab.rules.optimizer_family import family as family
from batchlab.rules.optimizer_family import kind

Rule = Literal["none", "sqrt", "linear", "power", "surge", "saturating", "saturating_sqrt"]
OF_NOISE: tuple[Rule, ...] = ("surge", "saturating", "saturating_sqrt")


def linear(learning_rate: float, base_batch_size: float, batch_size: float) -> float:
    """η = η₀·B/B₀ (Goyal et al. 2017, arXiv 1706.02677). SGD, far below the noise scale.

    >>> linear(0.1, 256, 1024)
    0.4
    """
    check_positive(learning_rate=learning_rate, base_batch_size=base_batch_size, batch_size=batch_size)
    return learning_rate * (batch_size / base_batch_size)


def sqrt(learning_rate: float, base_batch_size: float, batch_size: float) -> float:
    """η = η₀·√(B/B₀) (Malladi et al. 2022, arXiv 2205.10287). Adam and its like, far below the noise scale.

    >>> sqrt(0.1, 256, 1024)
    0.2
    """
    check_positive(learning_rate=learning_rate, base_batch_size=base_batch_size, batch_size=batch_size)
    return learning_rate * math.sqrt(batch_size / base_batch_size)


def power(learning_rate: float, base_batch_size: float, batch_size: float, *, exponent: float) -> float:
    """η = η₀·(B/B₀)^p, p as measured: 1 is `linear`, 0.5 is `sqrt`, 0 changes nothing.

    exponent: p >= 0, of a fit to learning rates tuned at several batch sizes, with B and B₀ inside its range. For
    language models of 125M to 2.6B parameters with batches tuned beside it, Shuai et al. 2024 (arXiv 2412.01505) find p
    in [0.75, 1], as a summary of the paper has it: a range of fitted slopes, not a constant, and steeper than Adam's
    square root. Past the noise scale no such p goes on.

    >>> round(power(0.001, 256, 512, exponent=0.75) / 0.001, 3)
    1.682
    """
    check_positive(learning_rate=learning_rate, base_batch_size=base_batch_size, batch_size=batch_size)
    if not holds(lambda p: 0 <= p < math.inf, exponent):
        raise InputError(f"exponent must be finite and >= 0, got {exponent!r}")
    return learning_rate * _powered(batch_size / base_batch_size, exponent, base_batch_size, batch_size)


def saturating(
    learning_rate: float, base_batch_size: float, batch_size: float, *, noise_scale: float, exponent: float = 1.0
) -> float:
    """η ∝ 1/(1 + B_noise/B)^α (McCandlish et al. 2018, arXiv 1812.06162): linear at first, then flat.

    exponent: α, 1 for SGD; 0.5 to 1 was reported for Adam and RMSProp. B_noise may be infinite: then it is the
    power law (B/B₀)^α.

    >>> round(saturating(0.1, 64, 64e9, noise_scale=64), 6)
    0.2
    """
    check_positive(learning_rate=learning_rate, base_batch_size=base_batch_size, batch_size=batch_size)
    check_positive(exponent=exponent)
    _check_noise_scale(noise_scale)
    if math.isinf(noise_scale):
        ratio = batch_size / base_batch_size
    else:
        ratio = (1 + noise_scale / base_batch_size) / (1 + noise_scale / batch_size)
    return learning_rate * _powered(ratio, exponent, base_batch_size, batch_size)


def saturating_sqrt(learning_rate: float, base_batch_size: float, batch_size: float, *, noise_scale: float) -> float:
    """η ∝ 1/√(1 + B_noise/B): `saturating` at α = ½, as √B at first, then flat.

    What `for_optimizer` takes where the noise scale is known. On three small jobs, each with AdamW and SGD, moved from
    a tuned rate to 4, 16 and 64 times the batch, it has the least median regret of all rules here (docs/rules.md). For
    SGD far below the noise scale theory says linear; but a rate tuned there is often near the largest stable one
    already, and `linear` and `saturating` then diverge.

    >>> round(saturating_sqrt(0.1, 64, 64e9, noise_scale=64), 6)
    0.141421
    """
    return saturating(learning_rate, base_batch_size, batch_size, noise_scale=noise_scale, exponent=0.5)


def _powered(ratio: float, exponent: float, base_batch_size: float, batch_size: float) -> float:
    """In Python's own floats, of which none overflows or vanishes unsaid."""
    try:
        value = float(float(ratio) ** float(exponent))
    except OverflowError:
        value = math.inf
    if not 0 < value < math.inf:
        raise InputError(f"exponent is too large for {batch_size!r}/{base_batch_size!r}, got {exponent!r}")
    return value


def surge(
    learning_rate: float,
    base_batch_size: float,
    batch_size: float,
    *,
    noise_scale: float,
    beyond_peak: Literal["hold", "fall"] = "hold",
) -> float:
    """η ∝ 1/(√(B_noise/B) + √(B/B_noise)) (Li et al. 2024, arXiv 2405.14578): Adam and its like.

    Rises as √B, to its peak at B = B_noise. Past it the law falls like 1/√B, and that branch is an expansion for
    small batches: the true optimum tends to a constant. So by default the peak is held for all B >= B_noise;
    "fall" gives the law as written. B_noise may be infinite: then it is the square-root rule.

    The law's B_noise weighs coordinates by the sign of their gradient; the gradient noise scale stands in for it.

    >>> surge(0.001, 64, 256, noise_scale=256), surge(0.001, 64, 4096, noise_scale=256)
    (0.00125, 0.00125)
    """
    check_positive(learning_rate=learning_rate, base_batch_size=base_batch_size, batch_size=batch_size)
    _check_noise_scale(noise_scale)
    if beyond_peak not in ("hold", "fall"):
        raise InputError(f'beyond_peak must be "hold" or "fall", got {beyond_peak!r}')
    if beyond_peak == "hold":
        base_batch_size, batch_size = min(base_batch_size, noise_scale), min(batch_size, noise_scale)
    if math.isinf(noise_scale):
        return sqrt(learning_rate, base_batch_size, batch_size)
    return learning_rate * _surge_shape(batch_size / noise_scale) / _surge_shape(base_batch_size / noise_scale)


def _surge_shape(relative: float) -> float:
    return 2 * math.sqrt(relative) / (1 + relative)


def _check_noise_scale(noise_scale: float) -> None:
    if not holds(lambda scale: scale > 0, noise_scale):
        raise InputError(f"noise_scale must be > 0, got {noise_scale!r}")


def rmt_max(
    batch_size: float,
    *,
    eigenvalue: float,
    kappa_sq: float,
    examples: float = math.inf,
    momentum: float = 0.0,
    batches: Literal["fresh", "fixed"] = "fresh",
) -> float:
    """α_max(b) = 2(1 + μ)/λ', the largest stable learning rate of SGD (Granziol et al. 2022, arXiv 2006.09092).

    batch_size: b. examples: N, of which b are drawn without replacement; infinite where every example is new.
    eigenvalue, kappa_sq: λ₁ > 0 of the mean loss over all N, and κ², as `measure.curvature` fits them to the largest
    eigenvalues of batches (never κ² by the noise's norm, which is hundreds of times too small for this).
    momentum: heavy ball's μ, without dampening. 𝔟 = b/(1 - b/N) is the effective batch.
    batches: "fresh" ones at each step, λ' = λ₁ + (1 + μ)/(1 - μ)·κ²/(𝔟λ₁): beyond it the mean square along λ₁ grows.
    Linear in 𝔟 up to the knee at 𝔟 = κ²/λ₁²·(1 + μ)/(1 - μ), flat above. Or one "fixed" batch repeated, λ' its own
    largest eigenvalue: λ₁ + κ²/(𝔟λ₁), and below 𝔟 = κ²/λ₁², where λ₁ is hidden in the noise, 2κ/√𝔟: there the
    ceiling goes as √𝔟. The source states the visible branch for both and for all 𝔟, and leaves (1 + μ)/(1 - μ) out,
    which for μ = 0.9 and small b is ten times too high.

    A ceiling and a diagnosis of these weights, not a rate to train with: the best rate is lower, curvature moves in
    training, and a run may survive above it. Not for Adam and its like: `rmt_max_adaptive`.

    >>> [rmt_max(b, eigenvalue=2.0, kappa_sq=400.0, examples=100) for b in (50, 100)]
    [0.5, 1.0]
    """
    check_positive(batch_size=batch_size, eigenvalue=eigenvalue)
    if batches not in ("fresh", "fixed"):
        raise InputError(f'batches must be "fresh" or "fixed", got {batches!r}')
    effective = _effective(batch_size, examples)
    if batches == "fixed":
        return stable_rate(spike_edge(eigenvalue, kappa_sq, effective), momentum)
    return stable_rate(mean_square_edge(eigenvalue, kappa_sq, effective, momentum), momentum)


def rmt_max_adaptive(
    max_learning_rate: float, base_batch_size: float, batch_size: float, *, examples: float = math.inf
) -> float:
    """α_max = α₀·√(𝔟/𝔟₀): how a ceiling α₀ that was found at B₀ moves for Adam and its like (Granziol et al. 2022).

    A statement about a regime, no equality: it holds while the learning rate and the damping ε are small and noise, of
    size κ/√𝔟, makes the curvature that flat directions feel. There is no formula for α₀ itself: find it by a run at B₀.
    Sizes and examples as in `rmt_max`; refused at B = N, where there is no noise and the regime has ended.

    >>> rmt_max_adaptive(0.01, 64, 256), round(rmt_max_adaptive(0.01, 64, 256, examples=512), 6)
    (0.02, 0.026458)
    """
    check_positive(max_learning_rate=max_learning_rate, base_batch_size=base_batch_size, batch_size=batch_size)
    base, effective = _effective(base_batch_size, examples), _effective(batch_size, examples)
    for name, size, each in (("base_batch_size", base_batch_size, base), ("batch_size", batch_size, effective)):
        if math.isinf(each):
            raise InputError(f"{name} must be below examples, where there is noise, got {size!r} of {examples!r}")
    return max_learning_rate * math.sqrt(effective / base)


def _effective(batch_size: float, examples: float) -> float:
    return float(batch_size) if examples == math.inf else effective_batch(batch_size, examples)


class Choice(NamedTuple):
    """A learning rate and why. rule: the function's name. formula, source: for the reader.

    holds_where: the rule's range. why: what of the optimizer makes it the one, and what is known of that optimizer.
    """

    learning_rate: float
    rule: Rule
    formula: str
    source: str
    holds_where: str
    why: str


_FAR_BELOW = "for batches far below the noise scale, with all else that moves with the batch moved too"
_WITHIN = "while the noise scale is about the one given; it is one number for a run along which it grows"
_REASONS: dict[str, tuple[str, str, str]] = {
    "none": ("η = η₀", "derived from the update, batchlab", _FAR_BELOW),
    "linear": ("η = η₀·B/B₀", "Goyal et al. 2017, arXiv 1706.02677", _FAR_BELOW),
    "sqrt": ("η = η₀·√(B/B₀)", "Malladi et al. 2022, arXiv 2205.10287", _FAR_BELOW),
    "power": (
        "η = η₀·(B/B₀)^p",
        "Shuai et al. 2024, arXiv 2412.01505, with p of 0.75 to 1",
        "over the batch sizes that p was fitted on",
    ),
    "saturating": ("η = η₀·(1 + Bn/B₀)/(1 + Bn/B)", "McCandlish et al. 2018, arXiv 1812.06162", _WITHIN),
    "saturating_sqrt": (
        "η = η₀·√((1 + Bn/B₀)/(1 + Bn/B))",
        "McCandlish et al. 2018, arXiv 1812.06162, with α = ½ as measured by batchlab (benchmarks/rule_regret.py)",
        _WITHIN,
    ),
    "surge": (
        "η = η₀·(√(Bn/B₀) + √(B₀/Bn))/(√(Bn/B) + √(B/Bn)), held at its peak for B >= Bn",
        "Li et al. 2024, arXiv 2405.14578",
        f"{_WITHIN}; past the peak it is held, as the law's fall is an expansion for small batches",
    ),
}
_SQRT_OF_SGD = "Hoffer et al. 2017, arXiv 1705.08741, and as measured by batchlab (benchmarks/rule_regret.py)"
_NOT_LINEAR = (
    "linear holds far below both the noise scale and the largest stable rate, of which neither is known here: of 18 "
    "moves of a tuned rate to 4 to 64 times the batch it arrived in 6, the square root in 11"
)


RULES = tuple(_REASONS)


def reason(rule: str) -> tuple[str, str, str]:
    """A rule's formula, its source, and where it holds.

    >>> reason("sqrt")[0]
    'η = η₀·√(B/B₀)'
    """
    if rule not in _REASONS:
        raise InputError(f"rule must be one of {sorted(_REASONS)}, got {rule!r}")
    return _REASONS[rule]


def for_optimizer(
    optimizer: str,
    learning_rate: float,
    base_batch_size: float,
    batch_size: float,
    *,
    noise_scale: float | None = None,
) -> Choice:
    """The rule that fits an optimizer, applied, with its name, its source, where it holds and why it is the one.

    optimizer: its name, as of `FAMILY`; a name without a rule is refused, never guessed.
    noise_scale: in the unit of the batch sizes. With it, both the "sgd" and the "adam" family go by `saturating_sqrt`.
    None or infinite if it is not known or not bounded: then both batches count as far below it, and both families go
    by `sqrt`. For SGD theory says `linear` there, and that is what to name where the rate is known to be far below the
    largest stable one; a tuned rate seldom is (docs/rules.md). The "adagrad" family keeps its learning rate.

    >>> for_optimizer("adamw", 0.001, 64, 256, noise_scale=256).rule
    'saturating_sqrt'
    >>> choice = for_optimizer("lion", 0.001, 64, 256)
    >>> choice.learning_rate, choice.holds_where.split(",")[0]
    (0.002, 'for batches far below the noise scale')
    """
    if noise_scale is not None:
        _check_noise_scale(noise_scale)
    found = kind(optimizer)
    rule: Rule = "none" if found.family == "adagrad" else "sqrt"
    if noise_scale is not None and not math.isinf(noise_scale) and found.family != "adagrad":
        rule = "saturating_sqrt"
    value = rescale(learning_rate, base_batch_size, batch_size, rule=rule, noise_scale=noise_scale)
    formula, source, holds_where = _REASONS[rule]
    if (found.family, rule) == ("sgd", "sqrt"):
        return Choice(value, rule, formula, _SQRT_OF_SGD, holds_where, f"{found.why}; {_NOT_LINEAR}")
    return Choice(value, rule, formula, source, holds_where, found.why)


def rescale(
    learning_rate: float,
    base_batch_size: float,
    batch_size: float,
    *,
    rule: Rule,
    noise_scale: float | None = None,
    exponent: float | None = None,
) -> float:
    """The learning rate at `batch_size` by the rule named; "none" leaves it as it is.

    noise_scale: for "surge" and the "saturating" ones. exponent: for "power".

    >>> rescale(0.1, 32, 128, rule="sqrt")
    0.2
    """
    if rule == "none":
        check_positive(learning_rate=learning_rate, base_batch_size=base_batch_size, batch_size=batch_size)
        return learning_rate
    if rule in ("linear", "sqrt"):
        return (linear if rule == "linear" else sqrt)(learning_rate, base_batch_size, batch_size)
    if rule == "power":
        if exponent is None:
            raise InputError(
                "the rule 'power' needs its exponent: what a fit to learning rates tuned at several batches gave"
            )
        return power(learning_rate, base_batch_size, batch_size, exponent=exponent)
    if rule not in OF_NOISE:
        raise InputError(f"rule must be one of {sorted(get_args(Rule))}, got {rule!r}")
    if noise_scale is None:
        raise InputError(f"the rule {rule!r} needs noise_scale, got None")
    laws: dict[str, Callable[..., float]] = {"surge": surge, "saturating": saturating}
    law = laws.get(rule, saturating_sqrt)
    return law(learning_rate, base_batch_size, batch_size, noise_scale=noise_scale)
