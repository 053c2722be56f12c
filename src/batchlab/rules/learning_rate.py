"""The learning rate that goes with a batch size, from one that was tuned at another.

Every rule takes (η₀, B₀, B) and gives η, in the unit of η₀; B₀, B and the noise scale count one unit, examples or
tokens. Every rule is η₀·f(B)/f(B₀) for some f > 0: moving a -> b -> c gives what a -> c gives, and a -> a changes
nothing. All hold for the peak learning rate, with all else that moves with the batch moved too.

None of them knows the largest stable learning rate: a rise by more than the range over which η₀ was tuned is a guess.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from batchlab.core.checks import check_positive
from batchlab.core.errors import InputError

Family = Literal["sgd", "adam"]
Rule = Literal["none", "sqrt", "linear", "surge", "saturating"]

FAMILY: dict[str, Family] = {"sgd": "sgd", "adam": "adam", "adamw": "adam", "rmsprop": "adam"}


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
        return learning_rate * float((batch_size / base_batch_size) ** exponent)
    ratio = (1 + noise_scale / base_batch_size) / (1 + noise_scale / batch_size)
    return learning_rate * float(ratio**exponent)


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
    if not noise_scale > 0:
        raise InputError(f"noise_scale must be > 0, got {noise_scale!r}")


class Choice(NamedTuple):
    """A learning rate and why. rule: the function's name. formula, source: for the reader."""

    learning_rate: float
    rule: Rule
    formula: str
    source: str


_REASONS: dict[Rule, tuple[str, str]] = {
    "linear": ("η = η₀·B/B₀", "Goyal et al. 2017, arXiv 1706.02677"),
    "sqrt": ("η = η₀·√(B/B₀)", "Malladi et al. 2022, arXiv 2205.10287"),
    "saturating": ("η = η₀·(1 + Bn/B₀)/(1 + Bn/B)", "McCandlish et al. 2018, arXiv 1812.06162"),
    "surge": (
        "η = η₀·(√(Bn/B₀) + √(B₀/Bn))/(√(Bn/B) + √(B/Bn)), held at its peak for B >= Bn",
        "Li et al. 2024, arXiv 2405.14578",
    ),
}


def family(optimizer: str) -> Family:
    """Whether an optimizer steps by the gradient ("sgd") or by something like its sign ("adam").

    >>> family("adamw")
    'adam'
    """
    if optimizer not in FAMILY:
        raise InputError(f"optimizer must be one of {sorted(FAMILY)}, got {optimizer!r}: no learning-rate rule for it")
    return FAMILY[optimizer]


def for_optimizer(
    optimizer: str,
    learning_rate: float,
    base_batch_size: float,
    batch_size: float,
    *,
    noise_scale: float | None = None,
) -> Choice:
    """The rule that fits an optimizer, applied, with its name and source.

    noise_scale: in the unit of the batch sizes; None or infinite if it is not known or not bounded. With it, SGD
    goes by `saturating` and Adam-like optimizers by `surge`; without it, by their limits, `linear` and `sqrt`.

    >>> for_optimizer("adamw", 0.001, 64, 256, noise_scale=256).rule
    'surge'
    """
    known = noise_scale is not None and not math.isinf(noise_scale)
    rules: dict[Family, tuple[Rule, Rule]] = {"sgd": ("linear", "saturating"), "adam": ("sqrt", "surge")}
    rule = rules[family(optimizer)][known]
    value = rescale(learning_rate, base_batch_size, batch_size, rule=rule, noise_scale=noise_scale)
    return Choice(value, rule, *_REASONS[rule])


def rescale(
    learning_rate: float,
    base_batch_size: float,
    batch_size: float,
    *,
    rule: Rule,
    noise_scale: float | None = None,
) -> float:
    """The learning rate at `batch_size` by the rule named; "none" leaves it as it is.

    >>> rescale(0.1, 32, 128, rule="sqrt")
    0.2
    """
    if rule == "none":
        check_positive(learning_rate=learning_rate, base_batch_size=base_batch_size, batch_size=batch_size)
        return learning_rate
    if rule in ("linear", "sqrt"):
        return (linear if rule == "linear" else sqrt)(learning_rate, base_batch_size, batch_size)
    if rule not in ("surge", "saturating"):
        raise InputError(f"rule must be one of {sorted([*_REASONS, 'none'])}, got {rule!r}")
    if noise_scale is None:
        raise InputError(f"the rule {rule!r} needs noise_scale, got None")
    law = surge if rule == "surge" else saturating
    return law(learning_rate, base_batch_size, batch_size, noise_scale=noise_scale)
