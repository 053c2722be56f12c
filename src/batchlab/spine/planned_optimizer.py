"""A plan's optimizer: its rate and weight decay at the plan's batch, and what stays as in the reference run."""

from __future__ import annotations

from typing import Any

from batchlab.core.facts import Facts
from batchlab.core.plan import OURS, FrontierRow
from batchlab.optim.by_name import defaults, is_torchs
from batchlab.planner.prediction import Prediction
from batchlab.rules import learning_rate as lr_rules
from batchlab.rules import weight_decay as decay_rules
from batchlab.rules.optimizer_family import decay_kind
from batchlab.spine.reasons import Reasons

AVERAGE = "Shamir and Zhang 2013, arXiv 1212.1824"
ADEMAMIX = "Pagliardini et al. 2024, arXiv 2409.03137"
POWER_LINES = "Bergsma et al. 2025, arXiv 2505.13738"
TORCH = "torch default"
KEPT = {"betas": "kept as in the reference run: beta^k holds only far below the noise scale (rules.adam)"}


def planned_optimizer(
    why: Reasons, facts: Facts, prediction: Prediction, chosen: FrontierRow, steps: int
) -> dict[str, Any]:
    """The plan's fields of the optimizer, each number kept in `why`. steps: the most updates of the run."""
    base, size, rate = facts.base_batch_size, chosen.batch_size, facts.base_learning_rate
    noise = {"noise_scale": prediction.b_crit} if prediction.noise_known else {}
    choice = lr_rules.for_optimizer(facts.optimizer, rate, base, size, **noise)
    inputs = {"base_learning_rate": rate, "base_batch_size": base, "batch_size": size, **noise}
    why.keep("learning_rate", choice.learning_rate, f"{choice.rule}: {choice.formula}", choice.source, **inputs)
    why.keep("learning_rate_rule", choice.rule, "the optimizer's, as for the rate itself", choice.source)
    warmup, power = facts.reference.warmup_examples, facts.reference.average_power
    why.keep("warmup_examples", warmup, "as many examples as in the reference run", OURS)
    if power is not None:
        why.keep("average_power", power, "as in the reference run: it means the same at any batch size", AVERAGE)
    settings, of_torch = defaults(facts.optimizer), is_torchs(facts.optimizer)
    for name, value in settings.items():
        why.keep(name, value, KEPT.get(name, "kept as in the reference run"), TORCH if of_torch else OURS)
    for name in ("alpha_warmup", "beta3_warmup"):
        if name in settings:
            settings[name] = why.keep(name, steps, "the whole run, as in the papers", ADEMAMIX, steps=steps)
    if decay_kind(facts.optimizer) == "decoupled" and settings.get("weight_decay"):
        settings["weight_decay"] = _weight_decay(
            why, facts, prediction, chosen, choice.learning_rate, settings["weight_decay"]
        )
    return {
        "optimizer": facts.optimizer,
        "learning_rate": choice.learning_rate,
        "learning_rate_rule": choice.rule,
        "warmup_examples": warmup,
        "average_power": power,
        "hyperparameters": settings,
    }


def _weight_decay(
    why: Reasons, facts: Facts, prediction: Prediction, chosen: FrontierRow, learning_rate: float, base_decay: float
) -> float:
    """Decoupled decay that lets the weights remember the same fraction of the run as in the reference."""
    base, size = facts.base_batch_size, chosen.batch_size
    tau = decay_rules.timescale(
        batch_size=base,
        learning_rate=facts.base_learning_rate,
        weight_decay=base_decay,
        total_examples=prediction.steps(base) * base,
    )
    run = chosen.steps * size
    decay = decay_rules.from_timescale(tau, batch_size=size, learning_rate=learning_rate, total_examples=run)
    rule = "λ = B/(η·D·τ) with the reference's τ = B₀/(η₀·λ₀·D₀)"
    inputs = {"tau": tau, "base_weight_decay": base_decay, "total_examples": run}
    why.keep("weight_decay", decay, rule, POWER_LINES, **inputs, batch_size=size, learning_rate=learning_rate)
    return decay
