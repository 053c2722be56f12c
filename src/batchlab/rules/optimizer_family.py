"""How an optimizer's step depends on the size of its gradient, which decides how its learning rate moves with batch.

Far below the noise scale the gradient of B examples is μ + σξ/√B with |μ| far below σ/√B. What a family's step does
with the factor 1/√B is all that counts there, for equal progress along μ an example:

  "sgd"      the step is in proportion to the gradient:              η ∝ B
  "adam"     the gradient's size is divided out, update by update:   η ∝ √B
  "adagrad"  divided by the root of a sum over all updates so far:   η as it is, for fewer updates make the sum smaller

Momentum changes none of it. Tests measure this of every optimizer that torch has. Which family an optimizer belongs to
follows from its formula; `why` says what was also published about its learning rate against batch size, if anything.

How weight decay enters a step is another matter, and `decay_kind` is the one place that says it: as torch 2.13 has it
for its own optimizers, and the reference code for the others.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from batchlab.core.errors import InputError

Family = Literal["sgd", "adam", "adagrad"]
Decay = Literal["decoupled", "l2", "adaptive_l2", "normalised", "unknown"]


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
    "mkor": Kind("sgd", f"{_LINEAR}, in length, before SGD; its factors are of mean vectors; {_UNTESTED}"),
    "vrsgd": Kind("sgd", f"{_LINEAR}, times a share that agreement gives; its paper mostly takes √B"),
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
    "vradam": Kind("adam", f"{_MOMENTS}, as Adam's; its paper, arXiv 2309.13681, mostly takes √B"),
    "vrlamb": Kind("adam", f"{_LAYER} to its weights' norm; its paper, arXiv 2309.13681, mostly takes √B"),
    "vrlars": Kind("adam", f"{_LAYER} to its weights' norm; its paper, arXiv 2309.13681, mostly takes √B"),
    "mtadamw": Kind("adam", f"each task's gradient is of one length, and {_MOMENTS}; {_UNTESTED}"),
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
    "smallfclopt": Kind("adam", f"a learned step from features divided by their own size; {_UNTESTED}"),
    "dmuon": Kind(
        "adam",
        "its step has singular values of about 1 whatever the gradient's size, by orthogonalised momentum; "
        f"{_UNTESTED}. Its other tensors go by AdamW",
    ),
    "adagrad": Kind(
        "adagrad",
        "its step is divided by the root of the sum of all squared gradients: a k times larger batch sums k times "
        f"fewer of k times smaller ones, and so makes k times fewer, k times larger steps. Derived here; {_UNTESTED}",
    ),
    "adagradnorm": Kind("adagrad", f"as Adagrad's, with one sum over all coordinates. Derived here; {_UNTESTED}"),
}

_WITHOUT: dict[str, str] = {
    "egn": "its step solves for the batch's own curvature, and its damping moves it more than its rate",
    "agvm": "it gives factors to the rates of another optimizer: name that one",
    "diloco": "its inner optimizer has one, and its own is rules.batch.diloco_law",
    "adadelta": "it makes its step from the size of its own last steps",
    "prodigy": "it finds its learning rate by itself, and the one given is a factor of that",
    "dadaptadam": "it finds its learning rate by itself, and the one given is a factor of that",
    "dadaptsgd": "it finds its learning rate by itself, and the one given is a factor of that",
    "rprop": "it is for gradients of all examples, and takes noise for turns",
    "lbfgs": "it is for gradients of all examples, with a line search",
    "shampoo": 'with averaged statistics it goes as "soap", with summed ones as "adagrad": name the one it is',
}

FAMILY: dict[str, Family] = {name: kind.family for name, kind in _KINDS.items()}

_DECAYS: dict[Decay, tuple[str, ...]] = {
    "decoupled": (
        *("adamw", "sgdw", "lion", "muon", "adafactor", "came", "sophia", "ademamix"),
        *("dmuon", "signum", "mars", "vradam", "mtadamw", "adagradnorm"),
    ),
    "l2": ("sgd", "nag", "vrsgd", "mkor"),
    "adaptive_l2": ("adam", "adamax", "nadam", "radam", "rmsprop", "adagrad", "adadelta"),
    "normalised": ("lamb", "lars", "vrlamb", "vrlars"),
}
DECAY: dict[str, Decay] = {name: decay for decay, names in _DECAYS.items() for name in names}


def kind(optimizer: str) -> Kind:
    """The family of an optimizer and why. Case, hyphens and underscores in its name do not count.

    Raises `InputError` for a name without a rule, saying why where that is known: none is guessed.

    >>> kind("AdamW").family, kind("adagrad").family
    ('adam', 'adagrad')
    """
    name = plain_name(optimizer) if isinstance(optimizer, str) else ""
    if name in _WITHOUT:
        raise InputError(f"optimizer {optimizer!r} has no learning-rate rule: {_WITHOUT[name]}")
    if name not in _KINDS:
        raise InputError(f"optimizer must be one of {sorted(_KINDS)}, got {optimizer!r}: no learning-rate rule for it")
    return _KINDS[name]


def family(optimizer: str) -> Family:
    """How an optimizer's step depends on its gradient's size: "sgd", "adam" or "adagrad".

    >>> family("adamw")
    'adam'
    """
    return kind(optimizer).family


def plain_name(optimizer: str) -> str:
    """An optimizer's name in small letters, without hyphens and underscores, whether or not it is known.

    >>> plain_name("Adam-W")
    'adamw'
    """
    if not isinstance(optimizer, str):
        raise InputError(f"optimizer must be a name, got {optimizer!r}")
    return optimizer.lower().replace("-", "").replace("_", "")


def decay_kind(optimizer: str) -> Decay:
    """How an optimizer's weight decay enters its step. Case, hyphens and underscores in its name do not count.

    "decoupled": w <- w - ηλw beside the step, the one kind that has a timescale 1/(ηλ) by itself. "l2": λw joins the
    gradient of a plain step. "adaptive_l2": it joins a gradient that is then divided by √v. "normalised": it joins
    before the step is rescaled to the weights' norm. "unknown": it has none, or implementations differ, or it was not
    looked up; no rule may lean on it. Raises `InputError` for a name that is not known at all.

    >>> decay_kind("AdamW"), decay_kind("adam"), decay_kind("lamb"), decay_kind("yogi")
    ('decoupled', 'adaptive_l2', 'normalised', 'unknown')
    """
    name = plain_name(optimizer)
    if name not in _KINDS and name not in _WITHOUT:
        known = sorted({*_KINDS, *_WITHOUT})
        raise InputError(f"optimizer must be one of {known}, got {optimizer!r}: how its weight decay enters is unknown")
    return DECAY.get(name, "unknown")
