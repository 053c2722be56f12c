"""A recipe's settings by name: the forms a user may give them in, and the one form that a `Recipe` keeps."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from batchlab.core.checks import check_count, check_positive, check_share
from batchlab.core.errors import InputError

NEEDED = ("batch_size", "optimizer", "learning_rate")
LENGTHS = ("steps", "epochs", "total_examples")
WARMUPS = ("warmup_steps", "warmup_epochs", "warmup_share", "warmup_examples")
_COUNTS = (
    *("batch_size", "devices", "micro_batch", "ema_every", "ghost_batch_size", "train_examples"),
    *("steps", "total_examples", "warmup_steps", "warmup_examples"),
)
_FREE = ("unit", "momentum", "betas", "alpha", "eps", "weight_decay", "schedule", "ema_decay", "clip_norm")
KNOWN = tuple(dict.fromkeys((*NEEDED, *LENGTHS, *WARMUPS, *_COUNTS, *_FREE, "batchnorm_momentum", "noise_scale")))
_MEANT = {
    "lr": "learning_rate",
    "batch": "batch_size",
    "bs": "batch_size",
    "gpus": "devices",
    "world_size": "devices",
    "wd": "weight_decay",
    "epsilon": "eps",
    "beta1": "betas",
    "beta2": "betas",
    "ema": "ema_decay",
    "max_grad_norm": "clip_norm",
    "bn_momentum": "batchnorm_momentum",
}


def from_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Recipe` from settings in any of their forms; `InputError` naming what is wrong.

    >>> from_settings({"batch_size": 32, "optimizer": "sgd", "learning_rate": 0.1, "steps": 10})["total_examples"]
    320
    """
    unit = settings.get("unit") or "examples"
    if unit not in ("examples", "tokens"):
        raise InputError(f'unit must be "examples" or "tokens", got {unit!r}')
    given = {_in_examples(name, unit): value for name, value in settings.items() if value is not None}
    if missing := [name for name in NEEDED if name not in given]:
        raise InputError(f"a recipe needs {', '.join(NEEDED)}: {missing[0]} is not given")
    given |= {name: _whole(given[name]) for name in _COUNTS if name in given}
    if isinstance(given.get("betas"), list):
        given["betas"] = tuple(given["betas"])
    total = _total(given, unit)
    warmup = _warmup(given, total, unit)
    fields = {name: value for name, value in given.items() if name not in (*LENGTHS, *WARMUPS)}
    return fields | {"total_examples": total, "warmup_examples": warmup}


def to_settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that give these fields back: no None, and counts named by the unit."""
    tokens = fields["unit"] == "tokens"
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return {in_unit(name, tokens): value for name, value in plain.items() if value is not None}


def in_unit(name: str, tokens: bool) -> str:
    """A field's name as settings spell it.

    >>> in_unit("total_examples", True)
    'total_tokens'
    """
    return name.removesuffix("_examples") + "_tokens" if tokens and name.endswith("_examples") else name


def _in_examples(name: str, unit: str) -> str:
    """The field's name; a count named by the other unit is refused, for it would be misread."""
    stem = name.removesuffix("_examples").removesuffix("_tokens")
    field = f"{stem}_examples" if stem != name else name
    right = in_unit(field, unit == "tokens")
    if field not in KNOWN:
        raise InputError(f"a recipe has no setting {name!r}: {_instead(name, unit == 'tokens')}")
    if right != name:
        raise InputError(f"{name} is not in the recipe's unit, which is {unit!r}: give {right}")
    return field


def _instead(name: str, tokens: bool) -> str:
    """The setting that an unknown name seems to mean, or all there are."""
    near = [_MEANT[name]] if name in _MEANT else difflib.get_close_matches(name, KNOWN, n=1)
    if near:
        return f"did you mean {in_unit(near[0], tokens)!r}?"
    return f"it has {', '.join(in_unit(known, tokens) for known in KNOWN)}"


def _whole(value: Any) -> Any:
    """A whole float, as 1e9 is, as an integer; anything else as it is, for the checks to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _one_of(given: Mapping[str, Any], names: tuple[str, ...], unit: str, least: int) -> str | None:
    found = [name for name in names if name in given]
    if not least <= len(found) <= 1:
        how, spelled = "exactly one" if least else "at most one", (in_unit(name, unit == "tokens") for name in names)
        said = " and ".join(in_unit(name, unit == "tokens") for name in found) or "none"
        raise InputError(f"give {how} of {', '.join(spelled)}, got {said}")
    return found[0] if found else None


def _total(given: Mapping[str, Any], unit: str) -> Any:
    form = _one_of(given, LENGTHS, unit, 1)
    if form == "total_examples":
        return given[form]
    if form == "steps":
        check_count(steps=given["steps"], batch_size=given["batch_size"])
        return given["steps"] * given["batch_size"]
    check_positive(epochs=given["epochs"])
    return _of_epochs("epochs", given, unit)


def _warmup(given: Mapping[str, Any], total: Any, unit: str) -> Any:
    form = _one_of(given, WARMUPS, unit, 0)
    if form is None:
        return 0
    if form == "warmup_examples":
        return given[form]
    if form == "warmup_steps":
        check_count(0, warmup_steps=given[form])
        check_count(batch_size=given["batch_size"])
        return given[form] * given["batch_size"]
    if form == "warmup_share":
        check_share(warmup_share=given[form])
        check_count(total_examples=total)
        return _nearest(_exact(given[form]) * total)
    if given[form] == 0:
        return 0
    check_positive(warmup_epochs=given[form])
    return _of_epochs(form, given, unit)


def _of_epochs(form: str, given: Mapping[str, Any], unit: str) -> int:
    if "train_examples" not in given:
        raise InputError(f"{form} needs {in_unit('train_examples', unit == 'tokens')}, the size of the data set")
    check_count(train_examples=given["train_examples"])
    return _nearest(_exact(given[form]) * given["train_examples"])


def _exact(number: Any) -> Fraction:
    """The decimal number that the float was written as: 0.1 is a tenth."""
    return Fraction(str(number if isinstance(number, int) else float(number)))


def _nearest(exact: Fraction) -> int:
    return math.floor(exact + Fraction(1, 2))
