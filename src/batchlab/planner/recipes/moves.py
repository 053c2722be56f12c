"""How each number of a recipe moves with the batch size, by which rule, and why the others stay."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from batchlab.core.errors import InputError
from batchlab.core.plan import Reason
from batchlab.planner.recipes.optimizers import traits
from batchlab.planner.recipes.recipe import Recipe
from batchlab.rules import adam, ema, gradient_norm
from batchlab.rules import learning_rate as lr_rules
from batchlab.rules.optimizer_family import Decay
from batchlab.rules.weight_decay import scale_weight_decay

Betas = Literal["second", "half_life", "sde", "keep"]
Warmup = Literal["examples", "updates"]

GRENDEL, SDE = "Zhao et al. 2024, arXiv 2406.18533", "Malladi et al. 2022, arXiv 2205.10287"
SCALED_EMA, POWER_LINES = "Busbridge et al. 2023, arXiv 2307.13813", "Bergsma et al. 2025, arXiv 2505.13738"
MCCANDLISH, LAMB = "McCandlish et al. 2018, arXiv 1812.06162", "You et al. 2020, arXiv 1904.00962"
GHOST = "Hoffer et al. 2017, arXiv 1705.08741"
FARTHEST = 100_000  # numbers of devices tried to either side
OURS, USER = "batchlab", "user"


@dataclass(frozen=True)
class Move:
    """From `old` to a batch of `to_batch` on `devices`. noise_scale: in the recipe's unit; None if not known."""

    old: Recipe
    to_batch: int
    devices: int
    devices_given: bool = False
    noise_scale: float | None = None
    rule: str | None = None
    exponent: float | None = None
    betas: Betas = "second"
    warmup: Warmup = "examples"
    ema_every: int | None = None

    @property
    def kappa(self) -> float:
        """κ = B'/B."""
        return self.to_batch / self.old.batch_size


@dataclass
class Why:
    """Keeps each number with its reason, and hands the number on."""

    reasons: dict[str, Reason] = field(default_factory=dict)

    def keep(self, name: str, value: Any, rule: str, source: str, **inputs: Any) -> Any:
        """`value` itself."""
        self.reasons[name] = Reason(rule, source, inputs, list(value) if isinstance(value, tuple) else value)
        return value


def scaled_devices(old: Recipe, to_batch: int) -> tuple[int, bool]:
    """d·κ devices, which keep the examples per device, and whether that is a whole number.

    Else the nearest within a third that divides the batch, so that every device has as much; else the nearest, from 1.

    >>> scaled_devices(Recipe(256, 10**6, "sgd", 0.1, devices=2), 8192)
    (64, True)
    >>> scaled_devices(Recipe(256, 10**6, "sgd", 0.1, devices=8), 1000)  # of 31.25
    (25, False)
    """
    wanted = old.devices * to_batch
    nearest = max(1, (2 * wanted + old.batch_size) // (2 * old.batch_size))
    if wanted % old.batch_size == 0:
        return nearest, True
    for away in range(min(nearest // 3, FARTHEST) + 1):
        for count in (nearest + away, nearest - away):
            if to_batch % count == 0:
                return count, False
    return nearest, False


def layout(why: Why, move: Move) -> dict[str, Any]:
    """Batch size and devices, and what is normalised or passed through together on one of them."""
    old, sizes = move.old, {"base_batch_size": move.old.batch_size}
    rule, source = "given by the user", USER
    if not move.devices_given:
        whole = scaled_devices(old, move.to_batch)[1]
        even = "" if whole or move.to_batch % move.devices else ", by a number that divides the batch"
        rule, source = f"d·κ: {'' if whole else 'about '}as many {old.unit} a device as before{even}", OURS
    fields = {
        "batch_size": why.keep("batch_size", move.to_batch, "given by the user", USER, **sizes),
        "devices": why.keep("devices", move.devices, rule, source, **sizes, base_devices=old.devices),
    }
    if old.micro_batch is not None:
        rule = "kept: what fits a device does not depend on the batch"
        fields["micro_batch"] = why.keep("micro_batch", old.micro_batch, rule, OURS)
    if old.ghost_batch_size is not None:
        rule = "kept: normalisation's own batch size, whatever the batch"
        fields["ghost_batch_size"] = why.keep("ghost_batch_size", old.ghost_batch_size, rule, GHOST)
    return fields


def length(why: Why, move: Move) -> dict[str, Any]:
    """The run, its warm-up and its schedule, all in examples."""
    old = move.old
    kept = f"kept, in {old.unit}"
    fields = {"total_examples": why.keep("total_examples", old.total_examples, kept, SCALED_EMA)}
    if old.warmup_examples and move.warmup == "updates":
        exact = old.warmup_examples * move.to_batch
        value = (2 * exact + old.batch_size) // (2 * old.batch_size)
        rule = "κ·w: as many updates as before, so a share of the run that grows with the batch"
        fields["warmup_examples"] = why.keep("warmup_examples", value, rule, LAMB, kappa=move.kappa)
    else:
        fields["warmup_examples"] = why.keep("warmup_examples", old.warmup_examples, kept, SCALED_EMA)
    why.keep("schedule", old.schedule, f"kept, as a function of {old.unit} seen", SCALED_EMA)
    return fields


def learning_rate(why: Why, move: Move) -> float:
    """The peak, by the rule named, or by the one that fits the optimizer."""
    old, noise = move.old, move.noise_scale
    inputs: dict[str, Any] = {"base_learning_rate": old.learning_rate, "kappa": move.kappa}
    inputs |= {} if noise is None else {"noise_scale": noise}
    name: str
    if move.rule is None:
        choice = lr_rules.for_optimizer(
            old.optimizer, old.learning_rate, old.batch_size, move.to_batch, noise_scale=noise
        )
        value, name, formula, source = choice.learning_rate, choice.rule, choice.formula, choice.source
        inputs |= {"holds": choice.holds_where}
    else:
        name = move.rule
        value = _by_rule(move, name)
        formula, source = _formulas(move.exponent)[name]
    if move.kappa == 1:
        value = old.learning_rate
    return float(why.keep("learning_rate", value, f"{name}: {formula}", source, **inputs))


def side_by_side(move: Move) -> dict[str, float]:
    """The learning rate by linear and sqrt, with a finite noise scale by the rules that know it, and as chosen."""
    known = move.noise_scale is not None and math.isfinite(move.noise_scale)
    names: list[str] = ["linear", "sqrt", *(lr_rules.OF_NOISE if known else ())]
    names += [move.rule] if move.rule is not None and move.rule not in ("none", *names) else []
    return {name: move.old.learning_rate if move.kappa == 1 else _by_rule(move, name) for name in names}


def _by_rule(move: Move, name: str) -> float:
    rule: Any = name
    exponent = {"exponent": move.exponent} if name == "power" else {}
    return lr_rules.rescale(
        move.old.learning_rate, move.old.batch_size, move.to_batch, rule=rule, noise_scale=move.noise_scale, **exponent
    )


def _formulas(exponent: float | None) -> dict[str, tuple[str, str]]:
    """Formula and source of each rule; "none" and "power" are as the user has them."""
    known = {name: lr_rules.reason(name)[:2] for name in lr_rules.RULES}
    return known | {"none": ("η = η₀", USER), "power": (f"η = η₀·(B/B₀)^{exponent}", USER)}


def optimizer_settings(why: Why, move: Move) -> dict[str, Any]:
    """Momentum and betas, and ε, which goes with the betas."""
    old, known = move.old, traits(move.old.optimizer)
    fields: dict[str, Any] = {}
    if old.momentum is not None:
        rule = "kept: momentum carries speed from update to update"
        fields["momentum"] = why.keep("momentum", old.momentum, rule, SCALED_EMA)
    moved = False
    if old.betas is not None:
        which = {"keep": (), "second": known.second}.get(move.betas, tuple(range(len(old.betas))))
        fields["betas"] = _betas(why, move, which)
        moved = bool(which)
    if old.alpha is not None:
        moved = moved or move.betas != "keep"
        fields["alpha"] = _alpha(why, move)
    if old.eps is not None:
        fields["eps"] = _eps(why, move, moved=moved and known.eps_beside_root)
    return fields


_BETA_RULES: dict[str, tuple[str, str]] = {
    "second": ("β₂^κ, its half-life in {unit}; β₁ kept: near the noise scale it carries speed", f"{GRENDEL}; {OURS}"),
    "half_life": ("β^κ: the half-life in {unit}", GRENDEL),
    "sde": ("1 - κ(1 - β): β^κ to first order", SDE),
}


def _betas(why: Why, move: Move, which: tuple[int, ...]) -> tuple[float, ...]:
    old = move.old.betas or ()
    if not which:
        rule = "kept, as asked" if move.betas == "keep" else "kept: both average the gradient, none its square"
        kept: tuple[float, ...] = why.keep("betas", old, rule, USER if move.betas == "keep" else OURS)
        return kept
    value = tuple(_beta(move, beta) if place in which else beta for place, beta in enumerate(old))
    rule, source = _BETA_RULES[move.betas]
    moved: tuple[float, ...] = why.keep("betas", value, rule.format(unit=move.old.unit), source, kappa=move.kappa)
    return moved


def _beta(move: Move, beta: float) -> float:
    return adam.scale_beta(beta, move.kappa, beta_rule="sde" if move.betas == "sde" else "half_life")


def _alpha(why: Why, move: Move) -> float:
    alpha = move.old.alpha or 0.0
    if move.betas == "keep":
        return float(why.keep("alpha", alpha, "kept, as asked", USER))
    rule, source = _BETA_RULES["sde" if move.betas == "sde" else "half_life"]
    rule = rule.replace("β", "α").format(unit=move.old.unit)
    return float(why.keep("alpha", _beta(move, alpha), rule, source, kappa=move.kappa))


def _eps(why: Why, move: Move, *, moved: bool) -> float:
    """ε's share in √v + ε is kept where v follows the batch: √v is the size of a batch's gradient."""
    eps, noise = move.old.eps or 0.0, move.noise_scale
    if not moved:
        asked = move.betas == "keep"
        rule = "kept, as the averages are" if asked else "kept: it is not added to the root of averaged squares"
        return float(why.keep("eps", eps, rule, USER if asked else OURS))
    if noise is None:
        return float(why.keep("eps", adam.scale_eps(eps, move.kappa), "ε/√κ", GRENDEL, kappa=move.kappa))
    ratio = gradient_norm.norm_ratio(move.old.batch_size, move.to_batch, noise_scale=noise)
    rule = "ε·√((1 + Bn/B')/(1 + Bn/B)): ε/√κ far below the noise scale"
    return float(why.keep("eps", eps * ratio, rule, f"{GRENDEL}; {MCCANDLISH}", kappa=move.kappa, noise_scale=noise))


_KEPT_DECAY: dict[Decay, str] = {
    "adaptive_l2": "kept: no rule covers an L2 penalty that is divided by √v",
    "normalised": "kept: it joins before the step is rescaled to the weights' norm",
    "unknown": "kept: how this optimizer applies it is not known here",
}


def weight_decay(why: Why, move: Move, new_rate: float) -> float:
    """λ that keeps the averaging timescale B/(ηλ) in examples, where decay shrinks the weights by ηλ an update."""
    old, decay = move.old, traits(move.old.optimizer).decay
    value = old.weight_decay or 0.0
    if decay in _KEPT_DECAY or value == 0:
        return float(why.keep("weight_decay", value, _KEPT_DECAY[decay] if value else "none", OURS))
    rates = {"learning_rate": old.learning_rate, "new_learning_rate": new_rate}
    value = scale_weight_decay(value, move.kappa, **rates)
    rule = f"λ·κ·η/η': keeps B/(ηλ) in {old.unit}" + ("" if decay == "decoupled" else ", for an L2 penalty too")
    source = POWER_LINES if decay == "decoupled" else f"{POWER_LINES}; {SCALED_EMA}"
    return float(why.keep("weight_decay", value, rule, source, kappa=move.kappa, **rates))


def averages(why: Why, move: Move, norm_exponent: float) -> dict[str, Any]:
    """The weights' average and batch normalisation's. norm_exponent: examples between updates of the latter, over
    what they were."""
    old, fields = move.old, dict[str, Any]()
    if old.ema_decay is not None:
        every = old.ema_every if move.ema_every is None else move.ema_every
        kappa = move.kappa * every / old.ema_every
        power, given = ("κ", ("kept", OURS)) if every == old.ema_every else ("(κ·k'/k)", ("given by the user", USER))
        fields["ema_every"] = why.keep("ema_every", every, *given)
        rule, inputs = f"ρ^{power}: the half-life in {old.unit}", {"kappa": move.kappa, "ema_every": every}
        fields["ema_decay"] = why.keep("ema_decay", ema.scale_decay(old.ema_decay, kappa), rule, SCALED_EMA, **inputs)
    elif move.ema_every is not None:
        raise InputError(f"ema_every must be None for a recipe without ema_decay, got {move.ema_every!r}")
    if old.batchnorm_momentum is not None:
        value = ema.scale_momentum(old.batchnorm_momentum, norm_exponent)
        rule = f"1 - (1 - m)^k, k = {norm_exponent:.4g}: growth of the {old.unit} between updates of the statistics"
        if norm_exponent == 1:
            rule = f"kept: as many {old.unit} between updates of the statistics as before"
        fields["batchnorm_momentum"] = why.keep("batchnorm_momentum", value, rule, SCALED_EMA, exponent=norm_exponent)
    return fields


def clip_norm(why: Why, move: Move) -> dict[str, Any]:
    """The clipping threshold, which follows the size of the gradient that it sees."""
    old, noise = move.old, move.noise_scale
    if old.clip_norm is None:
        return {}
    if noise is None:
        rule = "kept: how the gradient's size moves is not known without the noise scale"
        return {"clip_norm": why.keep("clip_norm", old.clip_norm, rule, OURS)}
    value = gradient_norm.scale_clip_norm(old.clip_norm, old.batch_size, move.to_batch, noise_scale=noise)
    rule = "c·√((1 + Bn/B')/(1 + Bn/B)): E|g|² = |G|² + tr(Σ)/B"
    return {"clip_norm": why.keep("clip_norm", value, rule, MCCANDLISH, noise_scale=noise)}


def derived(why: Why, new: Recipe) -> None:
    """Reasons of the counts of updates and passes that follow from the rest."""
    why.keep("steps", new.steps, f"total_{new.unit}/batch_size, rounded up: the last update is smaller", OURS)
    if new.warmup_examples:
        why.keep("warmup_steps", new.warmup_steps, f"warmup_{new.unit}/batch_size, rounded up", OURS)
    why.keep("accumulation", new.accumulation, "passes of a device for an update: share/micro_batch, rounded up", OURS)
