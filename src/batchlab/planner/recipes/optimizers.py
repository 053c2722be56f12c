"""What a recipe has to know of an optimizer: its settings, what each average is of, and how weight decay enters.

As torch 2.13 has it for its own (from sgd to muon below), and the reference code for the others. A name that has a
learning-rate rule but no row here may have any setting: its betas are taken as Adam's, its decay is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from batchlab.core.errors import InputError
from batchlab.rules import learning_rate as lr_rules

Decay = Literal["decoupled", "l2", "adaptive_l2", "normalised", "unknown"]
SETTINGS = ("momentum", "betas", "alpha", "eps", "weight_decay")


@dataclass(frozen=True)
class Traits:
    """Of one optimizer.

    decay: "decoupled": w ← w - ηλw beside the step; "l2": λw joins the gradient of a plain step; "adaptive_l2": it
        joins a gradient that is then divided by √v; "normalised": it joins before the step is rescaled to |w|.
    takes: the settings that a recipe may give. second: which of `betas` average squares (or curvature) and not the
    gradient itself. eps_beside_root: whether ε is added to the root of an average of squared gradients.
    defaults: torch's own, where torch has the optimizer.
    """

    decay: Decay
    takes: tuple[str, ...]
    second: tuple[int, ...] = ()
    eps_beside_root: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_ADAM = ("betas", "eps", "weight_decay")
_ADAM_DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_RMSPROP_DEFAULTS = {"momentum": 0.0, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0}

_TRAITS = {
    "sgd": Traits("l2", ("momentum", "weight_decay"), defaults={"momentum": 0.0, "weight_decay": 0.0}),
    "adam": Traits("adaptive_l2", _ADAM, (1,), True, _ADAM_DEFAULTS),
    "adamw": Traits("decoupled", _ADAM, (1,), True, _ADAM_DEFAULTS | {"weight_decay": 0.01}),
    "adamax": Traits("adaptive_l2", _ADAM, (1,), True, _ADAM_DEFAULTS),
    "nadam": Traits("adaptive_l2", _ADAM, (1,), True, _ADAM_DEFAULTS),
    "radam": Traits("adaptive_l2", _ADAM, (1,), True, _ADAM_DEFAULTS),
    "rmsprop": Traits("adaptive_l2", ("momentum", "alpha", "eps", "weight_decay"), (), True, _RMSPROP_DEFAULTS),
    "adagrad": Traits("adaptive_l2", ("eps", "weight_decay"), defaults={"eps": 1e-10, "weight_decay": 0.0}),
    "adafactor": Traits("decoupled", ("weight_decay",), defaults={"weight_decay": 0.0}),
    "muon": Traits("decoupled", ("momentum", "weight_decay"), defaults={"momentum": 0.95, "weight_decay": 0.1}),
    "nag": Traits("l2", ("momentum", "weight_decay")),
    "sgdw": Traits("decoupled", ("momentum", "weight_decay")),
    "lion": Traits("decoupled", ("betas", "weight_decay")),
    "signum": Traits("unknown", ("momentum", "weight_decay")),
    "lamb": Traits("normalised", _ADAM, (1,), True),
    "lars": Traits("normalised", ("momentum", "weight_decay")),
    "came": Traits("decoupled", ("betas", "weight_decay"), (1, 2)),
    "sophia": Traits("decoupled", _ADAM, (1,)),
    "adan": Traits("unknown", _ADAM, (2,), True),
    "ademamix": Traits("decoupled", _ADAM, (1,), True),
}
_ANY = Traits("unknown", SETTINGS, (1,), True)


def traits(optimizer: str) -> Traits:
    """Of an optimizer by its name, which must be one that `rules.learning_rate` knows.

    >>> traits("adamw").decay, traits("Adam").decay
    ('decoupled', 'adaptive_l2')
    """
    return _TRAITS.get(plain_name(optimizer), _ANY)


def plain_name(optimizer: str) -> str:
    """The name in small letters without hyphens and underscores; refused where no learning-rate rule is known."""
    if not isinstance(optimizer, str):
        raise InputError(f"optimizer must be a name, got {optimizer!r}")
    lr_rules.family(optimizer)
    return optimizer.lower().replace("-", "").replace("_", "")
