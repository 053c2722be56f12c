"""A whole training recipe moved from one batch size to another: every number with its rule, and what to beware of.

What it keeps is what an example does: its weight in the updates and in the averages, whatever the batch. The length,
the warm-up and the schedule stay in examples. The learning rate goes by `rules.learning_rate`, the averages by their
half-life in examples, weight decay by its timescale in examples, clipping by the size of the gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from batchlab.core.checks import check_count, holds
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.core.plan import Reason
from batchlab.planner.recipes import moves
from batchlab.planner.recipes.cautions import cautions
from batchlab.planner.recipes.moves import Betas, Move, Warmup, Why
from batchlab.planner.recipes.recipe import Recipe, check_size, read_recipe
from batchlab.planner.recipes.settings import in_unit
from batchlab.planner.recipes.toml import write_toml


@dataclass(frozen=True)
class Rescaled(JsonNoun):
    """A recipe at another batch size. base, recipe: the old one and the new one.

    reasons: of every number that moved or was kept. learning_rates: by each rule that could be asked, for comparison.
    warnings: where rules disagree, extrapolate or are silent; plain sentences.
    """

    base: Recipe
    recipe: Recipe
    reasons: Mapping[str, Reason]
    learning_rates: Mapping[str, float]
    warnings: tuple[str, ...]

    @property
    def kappa(self) -> float:
        """κ, the new batch size over the old."""
        return self.recipe.batch_size / self.base.batch_size

    def table(self) -> str:
        """Plain text for a terminal: each number old and new with its rule and source, then the warnings."""
        rows = [("", "old", "new", "rule")]
        for name, reason in self.reasons.items():
            told = in_unit(name, self.recipe.unit == "tokens")
            old, new = (_short(getattr(recipe, name)) for recipe in (self.base, self.recipe))
            rows.append((told, old, new, f"{reason.rule} [{reason.source}]"))
        title = f"{self.recipe.optimizer}, from {self._step()}"
        return "\n".join([title, *_columns(rows), *(f"! {warning}" for warning in self.warnings)])

    def to_toml(self) -> str:
        """The new recipe as TOML, each number with its rule and what it was, the warnings first."""
        tokens = self.recipe.unit == "tokens"
        comments = {}
        for name, reason in self.reasons.items():
            old, new = getattr(self.base, name), getattr(self.recipe, name)
            was = "" if old == new else f"was {_short(old)}; "
            comments[in_unit(name, tokens)] = f"{was}{reason.rule} [{reason.source}]"
        new = self.recipe
        counts = f"updates: {new.steps}, in the warm-up: {new.warmup_steps}, passes of a device for each: "
        head = [f"moved from {self._step()}", f"{counts}{new.accumulation}", *self.warnings]
        return write_toml(new.settings(), comments=comments, head=head)

    def _step(self) -> str:
        return f"a batch of {self.base.batch_size} to {self.recipe.batch_size} {self.recipe.unit}, κ = {self.kappa:.6g}"


def recipe(
    recipe: Recipe,
    to_batch: int,
    *,
    devices: int | None = None,
    rule: str | None = None,
    exponent: float | None = None,
    noise_scale: float | Estimate | None = None,
    betas: Betas = "second",
    warmup: Warmup = "examples",
    ema_every: int | None = None,
) -> Rescaled:
    """The recipe for a batch of `to_batch`, in the recipe's own unit, over all devices.

    devices: None keeps the examples per device, so that devices grow with the batch; where that is no whole number
    the nearest that divides the batch is taken, or else the nearest, and said. Only where it is one is moving twice
    moving once, in all that depends on devices.
    rule: of the learning rate, by its name in `rules.learning_rate.rescale`; None for the one that fits the optimizer.
    exponent: of the rule "power" only.
    noise_scale: in the recipe's unit, or an `Estimate`, whose interval is then told of; None for the recipe's own.
    betas: "second" moves β₂ by its half-life in examples and keeps β₁; "half_life" both (Grendel-GS); "sde" both by
    1 - κ(1 - β), refused where that is negative; "keep" none, nor ε. SGD's momentum is kept in all of them.
    warmup: what is kept of it, "examples", or "updates" as LAMB's own recipe does.
    ema_every: updates between two of the weights' average; None as in the recipe.

    Batch normalisation's momentum goes by the examples, over all devices, between two updates of the statistics that a
    device keeps: of one pass, or of one ghost batch. With these and the devices kept it stays; with devices κ times as
    many it moves as the weights' average does.

    Not for a model that also changes, nor a way to reach the same loss beyond the noise scale: there the same examples
    in fewer updates give less, as a warning then says. Not for optimizers without a learning-rate rule.

    >>> base = Recipe(256, 1_281_167 * 90, "sgd", 0.1, momentum=0.9, weight_decay=1e-4, warmup_examples=5 * 1_281_167)
    >>> moved = recipe(base, 8192, rule="linear")
    >>> moved.recipe.learning_rate, moved.recipe.weight_decay, moved.recipe.devices, moved.recipe.steps
    (3.2, 0.0001, 32, 14076)
    """
    if not isinstance(recipe, Recipe):
        raise InputError(f"recipe must be a planner.Recipe, got {type(recipe).__name__}")
    check_size(to_batch=to_batch)
    _check_choice("betas", betas, get_args(Betas))
    _check_choice("warmup", warmup, get_args(Warmup))
    if ema_every is not None:
        check_count(ema_every=ema_every)
    if exponent is not None and rule != "power":
        raise InputError(f'exponent is for rule="power" alone, got {exponent!r} with rule={rule!r}')
    scale = _noise(recipe, noise_scale)
    count = _devices(recipe, int(to_batch), devices)
    every = None if ema_every is None else int(ema_every)
    move = Move(recipe, int(to_batch), count, devices is not None, scale, rule, exponent, betas, warmup, every)
    why = Why()
    new = _moved(why, move)
    rates = moves.side_by_side(move)
    return Rescaled(recipe, new, why.reasons, rates, cautions(move, new, rates, noise_scale))


def rescaled_toml(path: str | Path, to_batch: int, **options: Any) -> str:
    """The recipe in a file, moved as `recipe` does with these options, as TOML text with reasons and warnings."""
    return recipe(read_recipe(path), to_batch, **options).to_toml()


def _moved(why: Why, move: Move) -> Recipe:
    old = move.old
    fields = moves.layout(why, move) | moves.length(why, move)
    rate = moves.learning_rate(why, move)
    fields |= {"learning_rate": rate} | moves.optimizer_settings(why, move)
    if old.weight_decay is not None:
        fields["weight_decay"] = moves.weight_decay(why, move, rate)
    laid_out = dataclasses.replace(old, **fields)
    between = (laid_out.batch_size / laid_out.norm_updates) / (old.batch_size / old.norm_updates)
    fields |= moves.averages(why, move, between) | moves.clip_norm(why, move)
    if move.noise_scale is not None:
        source = moves.OURS if move.noise_scale == old.noise_scale else moves.USER
        fields["noise_scale"] = why.keep(
            "noise_scale", move.noise_scale, "kept: a property of the job, not of the batch", source
        )
    new = dataclasses.replace(old, **fields)
    moves.derived(why, new)
    return new


def _noise(recipe: Recipe, given: float | Estimate | None) -> float | None:
    """The noise scale to reason with; None where none is known."""
    if isinstance(given, Estimate):
        return given.value if given.value > 0 else None
    if given is None:
        return recipe.noise_scale
    if not holds(lambda value: value > 0, given):
        raise InputError(f"noise_scale must be > 0, got {given!r}")
    return float(given)


def _devices(recipe: Recipe, to_batch: int, given: int | None) -> int:
    if given is None:
        return moves.scaled_devices(recipe, to_batch)[0]
    check_count(devices=given)
    if given > to_batch:
        raise InputError(
            f"devices must be at most to_batch = {to_batch}, as every device needs a part of the batch, got {given}"
        )
    return int(given)


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    return [
        "  ".join([name.ljust(widths[0]), old.rjust(widths[1]), new.rjust(widths[2]), rule]).rstrip()
        for name, old, new, rule in rows
    ]


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_short, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else str(value)
