"""What a user should know before trusting a recipe at another batch size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from batchlab.core.facts import Estimate
from batchlab.planner.recipes.moves import Move
from batchlab.planner.recipes.optimizers import traits
from batchlab.planner.recipes.recipe import Recipe
from batchlab.rules import learning_rate as lr_rules
from batchlab.rules import tradeoff

DISAGREE, FAR, RISE, FEW_STEPS = 2.0, 16.0, 2.0, 100
NO_MEMORY = 0.5
LAST_BATCH = 0.9
SAME = 0.01


def cautions(move: Move, new: Recipe, rates: Mapping[str, float], noise: Estimate | float | None) -> tuple[str, ...]:
    """In plain sentences. rates: the learning rate by each rule. noise: as the caller gave it, with its interval.

    Thresholds, batchlab's own: rules apart by 2, the step of a usual sweep; a batch 16 times off; a rate more than
    doubled; fewer than 100 updates; averages, the weights among them, that keep less than half at an update.
    """
    found = (_rates(move, new, rates), _noise(move, noise), _run(move, new), _memory(move, new), _decay(move, new))
    return tuple(line for lines in (*found, _devices(move, new)) for line in lines)


def _rates(move: Move, new: Recipe, rates: Mapping[str, float]) -> Iterator[str]:
    spread = max(rates.values()) / min(rates.values())
    if spread > DISAGREE:
        each = ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items())
        yield f"the learning-rate rules lie a factor {spread:.3g} apart: {each}"
    if not 1 / FAR <= move.kappa <= FAR:
        yield (
            f"the batch moves by a factor {move.kappa:.4g} from one tuning: beyond {FAR:.0f} either way, try a few "
            "learning rates about the new one"
        )
    rise = new.learning_rate / move.old.learning_rate
    if rise > RISE:
        yield (
            f"the learning rate rises by a factor {rise:.3g}: the rules do not know the largest stable one "
            "(measure.lr_range finds it)"
        )


def _noise(move: Move, noise: Estimate | float | None) -> Iterator[str]:
    old, size, scale = move.old, move.to_batch, move.noise_scale
    if move.kappa == 1:
        return
    if isinstance(noise, Estimate) and scale is None:
        yield f"the noise scale is not known ({noise.method})"
    if scale is None:
        yield "without a noise scale the rules are those for batches far below it: measure it (measure.GradientNoise)"
    if isinstance(noise, Estimate) and scale is not None and move.rule is None:
        low, high = sorted(_rate_at(move, end) for end in (noise.low, noise.high))
        yield (
            f"over the noise scale's interval [{noise.low:.4g}, {noise.high:.4g}] the learning rate is {low:.4g} to "
            f"{high:.4g}"
        )
    if scale is not None and size > scale:
        more = tradeoff.examples(size, s_min=1, b_crit=scale) / tradeoff.examples(old.batch_size, s_min=1, b_crit=scale)
        yield (
            f"the batch is {size / scale:.3g} times the noise scale {scale:.4g}: the loss of the old run takes about "
            f"{more:.3g} times its {old.unit}, and this recipe keeps them"
        )
        if old.weight_decay and traits(old.optimizer).decay == "decoupled":
            yield "above the critical batch size, near the noise scale, no weight decay makes up for lost updates"
        if move.betas in ("half_life", "sde") and old.betas:
            yield "above the noise scale the first beta carries speed: moving it with the batch costs updates"
    if old.clip_norm is not None and scale is None:
        yield (
            f"clip_norm stays at {old.clip_norm:.4g}, while far below the noise scale the gradient's norm goes by "
            f"1/√κ = {move.kappa**-0.5:.3g}"
        )


def _rate_at(move: Move, noise_scale: float) -> float:
    """The learning rate that the optimizer's rule gives with another noise scale; with none at all it stays."""
    old = move.old
    if noise_scale <= 0:
        return old.learning_rate
    return lr_rules.for_optimizer(
        old.optimizer, old.learning_rate, old.batch_size, move.to_batch, noise_scale=noise_scale
    ).learning_rate


def _run(move: Move, new: Recipe) -> Iterator[str]:
    unit = new.unit
    if new.batch_size > new.total_examples:
        yield f"the batch of {new.batch_size} is larger than the whole run of {new.total_examples} {unit}"
    elif new.steps < FEW_STEPS:
        yield f"only {new.steps} updates are left: too few for warm-up, averages and schedule to mean what they did"
    if new.train_examples is not None and new.batch_size > new.train_examples:
        yield f"the batch of {new.batch_size} is larger than the data set of {new.train_examples} {unit}"
    if new.warmup_examples > new.total_examples:
        yield f"the warm-up of {new.warmup_examples} {unit} is longer than the run of {new.total_examples}"
    if new.optimizer == "lamb" and new.warmup_examples and move.warmup == "examples" and move.kappa != 1:
        yield 'LAMB\'s own recipe keeps the warm-up in updates (You et al. 2020): warmup="updates"'


def _memory(move: Move, new: Recipe) -> Iterator[str]:
    old = move.old
    for name, before, after in [
        *(
            (f"beta {place + 1}", *pair)
            for place, pair in enumerate(zip(old.betas or (), new.betas or (), strict=True))
        ),
        ("alpha", old.alpha, new.alpha),
    ]:
        if before is not None and after is not None and after < NO_MEMORY and after != before:
            yield f"{name} falls to {after:.3g}: below {NO_MEMORY:g} it averages over less than two updates"
    if old.ema_decay is not None and new.ema_decay is not None and new.ema_decay < NO_MEMORY < old.ema_decay:
        yield (
            f"the weights' average keeps {new.ema_decay:.3g} at an update, and has no memory left: its half-life of "
            f"{old.ema_half_life:.4g} {new.unit} is less than the {new.batch_size * new.ema_every} between its updates"
        )
    before, after = old.batchnorm_momentum, new.batchnorm_momentum
    if before is not None and after is not None and after > LAST_BATCH and after != before:
        passed = min(new.ghost_batch_size or new.share, new.micro_batch or new.share, new.share)
        yield (
            f"batchnorm_momentum rises to {after:.4g}: the running statistics rest on about "
            f"{passed * (2 - after) / after:.3g} {new.unit} of one device; take them anew after training "
            "(torch.optim.swa_utils.update_bn)"
        )


def _decay(move: Move, new: Recipe) -> Iterator[str]:
    old, decay = move.old, traits(move.old.optimizer).decay
    if not old.weight_decay or move.kappa == 1:
        return
    shrinks = new.learning_rate * (new.weight_decay or 0.0)
    if decay in ("decoupled", "l2") and shrinks > NO_MEMORY:
        yield f"an update shrinks the weights by {100 * shrinks:.3g} %: their timescale is less than two updates"
    if decay == "adaptive_l2":
        yield (
            f"{old.optimizer}'s weight decay is an L2 penalty divided by √v: no rule says how it moves, it stays at "
            f"{old.weight_decay:.4g} (adamw's has one)"
        )
    elif decay in ("normalised", "unknown"):
        yield f"weight_decay stays at {old.weight_decay:.4g}: no rule says how {old.optimizer}'s moves"
    elif decay == "l2" and abs((new.weight_decay or 0.0) / old.weight_decay - 1) > SAME:
        yield (
            f"the L2 penalty goes to {new.weight_decay:.4g} to keep its timescale, as the learning rate does not go as "
            "the batch does: the loss that is minimised changes with it"
        )


def _devices(move: Move, new: Recipe) -> Iterator[str]:
    old = move.old
    if new.micro_batch is not None and new.micro_batch > new.share:
        yield f"micro_batch {new.micro_batch} is larger than a device's share of {new.share}: one pass takes the share"
    if new.batch_size % new.devices:
        yield (
            f"{new.batch_size} {new.unit} do not spread evenly over {new.devices} devices: weigh each device's mean by "
            "its share"
        )
    each, before = new.batch_size / new.devices, old.batch_size / old.devices
    if not move.devices_given and each > before:
        yield f"{old.unit} per device rise from {before:.4g} to {each:.4g}: no whole number of devices keeps them"
