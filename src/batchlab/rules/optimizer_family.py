"""How an optimizer's step depends on the size of its gradient, which decides how its learning rate moves with batch.

Far below the noise scale the gradient of B examples is μ + σξ/√B with |μ| far below σ/√B. What a family's step does
with the factor 1/√B is all that counts there, for equal progress along μ an example:

  "sgd"      the step is in proportion to the gradient:              η ∝ B
  "adam"     the gradient's size is divided out, update by update:   η ∝ √B
  "adagrad"  divided by the root of a sum over all updates so far:   η as it is, for fewer updates make the sum smaller

Momentum changes none of it. Tests measure this of every optimizer that torch has. Which family an optimizer belongs to
follows from its formula; `why` says what was also published about its learning rate against batch size, if anything.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from batchlab.core.errors import InputError

Family = Literal["sgd", "adam", "adagrad"]


class Kind(NamedTuple):
    """family: which rules hold. why: how the step depends on the gradient, and what was published, for the reader."""

    family: Family
    why: str


_UNTESTED = "its learning rate against batch size has no published test that we know"
_MOMENTS = "its step is divided by the root of an average of squared gradients"
_SIGN = "it steps by the sign of its momentum, the case in which the square root and its peak were derived"
_LAYER = "each layer's step is normalised"
_SDE = "square root derived and tested by Malladi et al. 2022, arXiv 2205.10287"
_LINEAR = "its step is in proportion to the gradient"

_KINDS: dict[str, Kind] = {
    "sgd": Kind("sgd", f"{_LINEAR}; linear by Goyal et al. 2017, arXiv 1706.02677, for ImageNet up to batch 8192"),
    "nag": Kind("sgd", f"{_LINEAR}, with Nesterov's momentum as without"),
    "sgdw": Kind("sgd", f"{_LINEAR}; decoupled decay has a rule of its own"),
    "asgd": Kind("sgd", f"{_LINEAR}; averaging the weights changes no step"),
    "sgdschedulefree": Kind("sgd", f"{_LINEAR}; {_UNTESTED}"),
    "kfac": Kind("sgd", f"{_LINEAR}: Fisher factors are those of single examples; {_UNTESTED}"),
    "adam": Kind("adam", f"{_MOMENTS}; {_SDE}"),
    "adamw": Kind("adam", f"{_MOMENTS}; {_SDE}, the decay apart"),
    "rmsprop": Kind("adam", f"{_MOMENTS}; {_SDE}"),
    "nadam": Kind("adam", f"{_MOMENTS}, as Adam's; {_UNTESTED}"),
    "radam": Kind("adam", f"{_MOMENTS}, as Adam's, but for its first updates, which are SGD's; {_UNTESTED}"),
    "adamax": Kind("adam", f"its step is divided by a running maximum of |gradient|; {_UNTESTED}"),
    "adabelief": Kind("adam", f"its step is divided by the gradient's own spread, and so no peak follows; {_UNTESTED}"),
    "yogi": Kind("adam", f"{_MOMENTS}; {_UNTESTED}"),
    "adan": Kind("adam", f"{_MOMENTS} and their differences; {_UNTESTED}"),
    "ademamix": Kind("adam", f"{_MOMENTS}, as Adam's with two momenta; {_UNTESTED}"),
    "adopt": Kind("adam", f"{_MOMENTS} before; {_UNTESTED}"),
    "mars": Kind("adam", f"{_MOMENTS}, of gradients with their variance reduced; {_UNTESTED}"),
    "sparseadam": Kind("adam", f"{_MOMENTS}, as Adam's in the rows that have a gradient; {_UNTESTED}"),
    "adamwschedulefree": Kind("adam", f"{_MOMENTS}, as Adam's; {_UNTESTED}"),
    "adafactor": Kind(
        "adam",
        f"{_MOMENTS}, factored, if the learning rate is given and not its own relative step; "
        "named as sign-like by Li et al. 2024, arXiv 2405.14578",
    ),
    "came": Kind("adam", f"{_MOMENTS}, factored as Adafactor's; {_UNTESTED}"),
    "novograd": Kind("adam", f"{_LAYER} by an average of its gradient's norm; {_UNTESTED}"),
    "soap": Kind("adam", f"{_MOMENTS} in a rotated basis; {_UNTESTED}"),
    "sophia": Kind(
        "adam",
        "most of its coordinates are clipped to one size, and step by their sign; the rest step in proportion to the "
        f"gradient, for which this rises too slowly; {_UNTESTED}",
    ),
    "signsgd": Kind("adam", "it steps by the sign of the gradient; square root and peak by Li et al. 2024"),
    "signum": Kind("adam", f"{_SIGN}, without momentum, by Li et al. 2024, arXiv 2405.14578"),
    "lion": Kind("adam", f"{_SIGN}, without momentum, by Li et al. 2024, arXiv 2405.14578, which names Lion"),
    "lamb": Kind(
        "adam", f"{_LAYER} to its weights' norm; square root by You et al. 2020, arXiv 1904.00962, batch 512 to 32768"
    ),
    "lars": Kind(
        "adam",
        f"{_LAYER} to its weights' norm; the best rates of You et al. 2017, arXiv 1708.03888, grow as B to the 0.48, "
        "0.49 and 0.61 on three networks, batch 256 to 32768",
    ),
    "muon": Kind(
        "adam",
        "its step has singular values of about 1 whatever the gradient's size, by orthogonalised momentum; "
        f"{_UNTESTED}. Its other tensors go by their own optimizer",
    ),
    "adagrad": Kind(
        "adagrad",
        "its step is divided by the root of the sum of all squared gradients: a k times larger batch sums k times "
        f"fewer of k times smaller ones, and so makes k times fewer, k times larger steps. Derived here; {_UNTESTED}",
    ),
}

_WITHOUT: dict[str, str] = {
    "adadelta": "it makes its step from the size of its own last steps",
    "prodigy": "it finds its learning rate by itself, and the one given is a factor of that",
    "dadaptadam": "it finds its learning rate by itself, and the one given is a factor of that",
    "dadaptsgd": "it finds its learning rate by itself, and the one given is a factor of that",
    "rprop": "it is for gradients of all examples, and takes noise for turns",
    "lbfgs": "it is for gradients of all examples, with a line search",
    "shampoo": 'with averaged statistics it goes as "soap", with summed ones as "adagrad": name the one it is',
}

FAMILY: dict[str, Family] = {name: kind.family for name, kind in _KINDS.items()}


def kind(optimizer: str) -> Kind:
    """The family of an optimizer and why. Case, hyphens and underscores in its name do not count.

    Raises `InputError` for a name without a rule, saying why where that is known: none is guessed.

    >>> kind("AdamW").family, kind("adagrad").family
    ('adam', 'adagrad')
    """
    name = optimizer.lower().replace("-", "").replace("_", "") if isinstance(optimizer, str) else optimizer
    if isinstance(name, str) and name in _WITHOUT:
        raise InputError(f"optimizer {optimizer!r} has no learning-rate rule: {_WITHOUT[name]}")
    if not isinstance(name, str) or name not in _KINDS:
        raise InputError(f"optimizer must be one of {sorted(_KINDS)}, got {optimizer!r}: no learning-rate rule for it")
    return _KINDS[name]


def family(optimizer: str) -> Family:
    """How an optimizer's step depends on its gradient's size: "sgd", "adam" or "adagrad".

    >>> family("adamw")
    'adam'
    """
    return kind(optimizer).family
