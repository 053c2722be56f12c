"""`Recipe`: how a model is trained, with all that depends on the batch size counted in examples."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from batchlab.core.checks import check_count, check_positive, check_share, holds
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun, dumps, loads
from batchlab.planner.recipes.optimizers import SETTINGS, plain_name, traits
from batchlab.planner.recipes.settings import from_settings, to_settings
from batchlab.planner.recipes.toml import read_toml, write_toml
from batchlab.rules import ema

Unit = Literal["examples", "tokens"]
LARGEST = 2**63


@dataclass(frozen=True)
class Recipe(JsonNoun):
    """How a model is trained. Frozen; JSON and TOML both ways, exactly.

    All counts are in `unit`, which a batch is counted in, and over all devices but for the two that say otherwise.
    batch_size: of one update. total_examples: length of the run; the last update may be smaller. warmup_examples: of
        the learning rate's rise. train_examples: in the data set, where it is known.
    optimizer: a name that `rules.learning_rate` knows; kept in small letters, as "adamw". learning_rate: the peak.
    schedule: the name of what follows the warm-up, as a function of examples seen; any name.
    momentum, betas, alpha, eps, weight_decay: by torch's names; what the optimizer has and the recipe does not give is
        torch's default, and is written out. For an optimizer that torch lacks it stays unknown.
    devices: over which a batch is spread evenly. micro_batch: of one pass on one device; None for a device's share.
    ema_decay: kept by the weights' average at each of its own updates, one in `ema_every` of the optimizer's.
    clip_norm: limit on the gradient's norm. ghost_batch_size: normalised together, on one device; None for a pass.
    batchnorm_momentum: torch's, the weight of the new statistics. noise_scale: of the gradient, > 0; inf if unbounded.

    `Recipe.of` takes the length and the warm-up in other forms too.

    >>> recipe = Recipe(256, 1_281_167 * 90, "sgd", 0.1, momentum=0.9, weight_decay=1e-4)
    >>> recipe.steps, Recipe.from_toml(recipe.to_toml()) == recipe
    (450411, True)
    """

    batch_size: int
    total_examples: int
    optimizer: str
    learning_rate: float
    unit: Unit = "examples"
    devices: int = 1
    micro_batch: int | None = None
    momentum: float | None = None
    betas: tuple[float, ...] | None = None
    alpha: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    warmup_examples: int = 0
    train_examples: int | None = None
    schedule: str = "constant"
    ema_decay: float | None = None
    ema_every: int = 1
    clip_norm: float | None = None
    ghost_batch_size: int | None = None
    batchnorm_momentum: float | None = None
    noise_scale: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", plain_name(self.optimizer))
        known = traits(self.optimizer)
        for name in SETTINGS:
            if getattr(self, name) is None:
                object.__setattr__(self, name, known.defaults.get(name))
            elif name not in known.takes:
                raise InputError(f"{self.optimizer} takes no {name}, got {getattr(self, name)!r}")
        _check_counts(self)
        _check_numbers(self)
        _make_plain(self)

    @classmethod
    def of(cls, **settings: Any) -> Recipe:
        """A recipe from settings by name, as a file gives them; a value of None counts as not given.

        The length, exactly one of: steps; epochs (with train_examples); total_examples. The warm-up, at most one of:
        warmup_steps; warmup_epochs; warmup_share, of the whole length; warmup_examples. They are converted once, in
        exact decimal arithmetic, to the nearest whole example. With unit = "tokens" the names end in _tokens.

        An unknown name is refused, and the nearest known one named.

        >>> Recipe.of(batch_size=512, optimizer="adamw", learning_rate=1e-3, steps=1000, warmup_share=0.1).warmup_steps
        100
        """
        return cls(**from_settings(settings))

    @property
    def steps(self) -> int:
        """Updates: total_examples/batch_size, rounded up."""
        return -(-self.total_examples // self.batch_size)

    @property
    def warmup_steps(self) -> int:
        """Updates that begin within the warm-up."""
        return -(-self.warmup_examples // self.batch_size)

    @property
    def epochs(self) -> float | None:
        """Passes over the data, where their number of examples is known."""
        return None if self.train_examples is None else self.total_examples / self.train_examples

    @property
    def share(self) -> int:
        """The largest part of a batch on one device."""
        return -(-self.batch_size // self.devices)

    @property
    def accumulation(self) -> int:
        """Passes on one device for one update, the last one possibly smaller."""
        return -(-self.share // (self.micro_batch or self.share))

    @property
    def norm_updates(self) -> int:
        """Updates of batch normalisation's running statistics on one device for one of the optimizer's: one a ghost
        batch, or one a pass."""
        piece = min(self.micro_batch or self.share, self.share)
        whole, rest = divmod(self.share, piece)
        ghost = self.ghost_batch_size or piece
        return whole * -(-piece // ghost) + -(-rest // ghost)

    @property
    def ema_half_life(self) -> float | None:
        """After so many examples a weight counts half as much in the average; None without one that forgets."""
        if self.ema_decay is None or not 0 < self.ema_decay < 1:
            return None
        return ema.half_life_examples(self.ema_decay, self.batch_size * self.ema_every)

    def settings(self) -> dict[str, Any]:
        """All that is set, by the names that `of` takes; what is None is left out."""
        return to_settings({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    def to_json(self, *, indent: int | None = 2) -> str:
        """Strict JSON text of `settings`."""
        return dumps(self.settings(), indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "JSON") -> Recipe:
        """What `to_json` wrote, or settings as `of` takes them; `InputError` naming `source`."""
        settings = loads(text, source=source)
        if isinstance(settings, dict) and settings.get("noise_scale") == "inf":
            settings["noise_scale"] = math.inf
        return _named(source, settings)

    def to_toml(self) -> str:
        """TOML text of `settings`."""
        return write_toml(self.settings())

    @classmethod
    def from_toml(cls, text: str, *, source: str = "TOML") -> Recipe:
        """What `to_toml` wrote, or settings as `of` takes them; `InputError` naming `source`."""
        return _named(source, read_toml(text, source=source))


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a file, JSON if its name ends so in any case, else TOML; UTF-8, with or without a mark before."""
    found = Path(path).expanduser()
    try:
        text = found.read_text("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read the recipe {path}: {error}") from None
    return (Recipe.from_json if found.suffix.lower() == ".json" else Recipe.from_toml)(text, source=str(path))


def _named(source: str, settings: Any) -> Recipe:
    if not isinstance(settings, dict):
        raise InputError(f"{source}: a recipe must be a table of settings, got {type(settings).__name__}")
    try:
        return Recipe(**from_settings(settings))
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


_COUNTS = ("batch_size", "total_examples", "devices", "ema_every")
_OPTIONAL_COUNTS = ("micro_batch", "train_examples", "ghost_batch_size")
_FLOATS = ("learning_rate", "momentum", "alpha", "eps", "weight_decay", "ema_decay", "clip_norm", "batchnorm_momentum")


def check_size(least: int = 1, /, **counts: int) -> None:
    """Each must be an integer of at least `least` and below 2^63, as TOML's are."""
    check_count(least, **counts)
    for name, count in counts.items():
        if count >= LARGEST:
            raise InputError(f"{name} must be below 2^63, got {count!r}")


def _check_counts(recipe: Recipe) -> None:
    check_size(**{name: getattr(recipe, name) for name in _COUNTS})
    check_size(**{name: getattr(recipe, name) for name in _OPTIONAL_COUNTS if getattr(recipe, name) is not None})
    check_size(0, warmup_examples=recipe.warmup_examples)
    if recipe.unit not in ("examples", "tokens"):
        raise InputError(f'unit must be "examples" or "tokens", got {recipe.unit!r}')
    if not isinstance(recipe.schedule, str) or not recipe.schedule:
        raise InputError(f"schedule must be a name, got {recipe.schedule!r}")
    if recipe.devices > recipe.batch_size:
        raise InputError(
            f"devices must be at most batch_size = {recipe.batch_size}, as every device needs a part of the batch, "
            f"got {recipe.devices}"
        )


def _check_numbers(recipe: Recipe) -> None:
    for name in (*_FLOATS, "noise_scale"):
        if isinstance(getattr(recipe, name), bool):
            raise InputError(f"{name} must be a number, got {getattr(recipe, name)!r}")
    check_positive(learning_rate=recipe.learning_rate)
    if recipe.clip_norm is not None:
        check_positive(clip_norm=recipe.clip_norm)
    for name in ("ema_decay", "batchnorm_momentum"):
        if getattr(recipe, name) is not None:
            check_share(**{name: getattr(recipe, name)})
    for name in ("momentum", "alpha"):
        if getattr(recipe, name) is not None and not holds(lambda v: 0 <= v < 1, getattr(recipe, name)):
            raise InputError(f"{name} must lie in [0, 1), got {getattr(recipe, name)!r}")
    for name in ("eps", "weight_decay"):
        if getattr(recipe, name) is not None and not holds(lambda v: 0 <= v < math.inf, getattr(recipe, name)):
            raise InputError(f"{name} must be finite and >= 0, got {getattr(recipe, name)!r}")
    if recipe.noise_scale is not None and not holds(lambda v: v > 0, recipe.noise_scale):
        raise InputError(f"noise_scale must be > 0, got {recipe.noise_scale!r}")
    betas, count = recipe.betas, traits(recipe.optimizer).betas
    counts = (2, 3) if count is None else (count,)
    if betas is not None and not holds(lambda v: len(v) in counts and all(0 <= beta < 1 for beta in v), betas):
        said = " or ".join({2: "two", 3: "three"}[each] for each in counts)
        raise InputError(f"betas must be {said} numbers in [0, 1) for {recipe.optimizer}, got {betas!r}")


def _make_plain(recipe: Recipe) -> None:
    """NumPy's numbers as Python's own, so that equality, JSON and TOML are exact."""
    for name in (*_COUNTS, *_OPTIONAL_COUNTS, "warmup_examples"):
        value = getattr(recipe, name)
        object.__setattr__(recipe, name, None if value is None else int(value))
    for name in (*_FLOATS, "noise_scale"):
        value = getattr(recipe, name)
        object.__setattr__(recipe, name, None if value is None else float(value))
    if recipe.betas is not None:
        object.__setattr__(recipe, "betas", tuple(float(beta) for beta in recipe.betas))
