"""What a recipe has to know of an optimizer: its settings, what each average is of, and how weight decay enters.

As torch 2.13 has it for its own (from sgd to muon below), and the reference code for the others; how weight decay
enters is said by `rules.optimizer_family`. A name that has a learning-rate rule but no row here may have any setting:
its betas are taken as Adam's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from batchlab.rules import optimizer_family
from batchlab.rules.optimizer_family import Decay, decay_kind

SETTINGS = ("momentum", "betas", "alpha", "eps", "weight_decay")


@dataclass(frozen=True)
class Traits:
    """Of one optimizer.

    takes: the settings that a recipe may give. betas: how many they are; None where two or three may be meant. second:
    which of them average squares (or curvature) and not the gradient itself. eps_beside_root: whether ε is added to the
    root of an average of squared gradients. defaults: torch's own, where torch has the optimizer.
    decay: how weight decay enters, as `rules.optimizer_family.decay_kind` has it.
    """

    takes: tuple[str, ...]
    betas: int | None = 2
    second: tuple[int, ...] = ()
    eps_beside_root: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    decay: Decay = "unknown"


_ADAM = ("betas", "eps", "weight_decay")
_ADAM_DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_RMSPROP_DEFAULTS = {"momentum": 0.0, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0}

_TRAITS = {
    "sgd": Traits(("momentum", "weight_decay"), defaults={"momentum": 0.0, "weight_decay": 0.0}),
    "adam": Traits(_ADAM, 2, (1,), True, _ADAM_DEFAULTS),
    "adamw": Traits(_ADAM, 2, (1,), True, _ADAM_DEFAULTS | {"weight_decay": 0.01}),
    "adamax": Traits(_ADAM, 2, (1,), True, _ADAM_DEFAULTS),
    "nadam": Traits(_ADAM, 2, (1,), True, _ADAM_DEFAULTS),
    "radam": Traits(_ADAM, 2, (1,), True, _ADAM_DEFAULTS),
    "rmsprop": Traits(("momentum", "alpha", "eps", "weight_decay"), 2, (), True, _RMSPROP_DEFAULTS),
    "adagrad": Traits(("eps", "weight_decay"), defaults={"eps": 1e-10, "weight_decay": 0.0}),
    "adafactor": Traits(("weight_decay",), defaults={"weight_decay": 0.0}),
    "muon": Traits(("momentum", "weight_decay"), defaults={"momentum": 0.95, "weight_decay": 0.1}),
    "nag": Traits(("momentum", "weight_decay")),
    "sgdw": Traits(("momentum", "weight_decay")),
    "lion": Traits(("betas", "weight_decay")),
    "signum": Traits(("momentum", "weight_decay")),
    "lamb": Traits(_ADAM, 2, (1,), True),
    "lars": Traits(("momentum", "weight_decay")),
    "came": Traits(("betas", "weight_decay"), 3, (1, 2)),
    "sophia": Traits(_ADAM, 2, (1,)),
    "adan": Traits(_ADAM, 3, (2,), True),
    "ademamix": Traits(_ADAM, 3, (1,), True),
    "mars": Traits(_ADAM, 2, (1,), True),
    "dmuon": Traits(("momentum", "weight_decay")),
    "mkor": Traits(("momentum", "weight_decay")),
    "vrsgd": Traits(("momentum", "weight_decay")),
    "vradam": Traits(_ADAM, 2, (1,), True),
    "vrlars": Traits(("momentum", "weight_decay")),
    "vrlamb": Traits(_ADAM, 2, (1,), True),
    "mtadamw": Traits(_ADAM, 2, (1,), True),
    "adagradnorm": Traits(("weight_decay",)),
}
_ANY = Traits(SETTINGS, None, (1,), True)


def traits(optimizer: str) -> Traits:
    """Of an optimizer by its name, which must be one that `rules.learning_rate` knows.

    >>> traits("adamw").decay, traits("Adam").decay
    ('decoupled', 'adaptive_l2')
    """
    name = plain_name(optimizer)
    return replace(_TRAITS.get(name, _ANY), decay=decay_kind(name))


def plain_name(optimizer: str) -> str:
    """The name in small letters without hyphens and underscores; refused where no learning-rate rule is known."""
    name = optimizer_family.plain_name(optimizer)
    optimizer_family.kind(optimizer)
    return name
