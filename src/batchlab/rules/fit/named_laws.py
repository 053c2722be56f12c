"""The laws as `fit` calls them: a table and options in, a `Fit` out. `law_names` says what each gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.curves.data_overhead import critical_batch as _critical_batch
from batchlab.rules.fit.bowl import WITHIN, Optimum, optimum
from batchlab.rules.fit.budgets_law import budgets as _budgets
from batchlab.rules.fit.by_name import Fit, warnings_of
from batchlab.rules.fit.chinchilla_law import DELTA
from batchlab.rules.fit.chinchilla_law import chinchilla as _chinchilla
from batchlab.rules.fit.critical_batches import critical_batch_law
from batchlab.rules.fit.frontier import CELLS
from batchlab.rules.fit.power_laws import PowerLaw
from batchlab.rules.fit.power_laws import power_law as _power_law
from batchlab.rules.fit.replicas import ReplicaLaw
from batchlab.rules.fit.replicas import diloco as _diloco
from batchlab.rules.fit.surge_runs import Form
from batchlab.rules.fit.surge_runs import surge as _surge
from batchlab.rules.fit.table import RunTable
from batchlab.rules.fit.timescales import timescale as _timescale
from batchlab.rules.fit.trajectory_table import trajectory
from batchlab.rules.fit.tuning import edge_note, least_losses, tuned_rows

_STUDY = "Shuai et al. 2024, arXiv 2412.01505"
_LINES = "Bergsma et al. 2025, arXiv 2505.13738"


def power_law(table: RunTable, *, x: str, y: str, coverage: float = 0.95, widest: float = 1.0) -> Fit:
    """y = a·x^b between any two columns."""
    table.need(x, y, law="power_law")
    law = _power_law(table[x], table[y], x_name=x, y_name=y, coverage=coverage, widest=widest)
    return Fit(
        "power_law",
        f"{y} = a·{x}^b",
        "least squares on logarithms",
        {"a": law.a, "b": law.exponent},
        {y: law.leave_one_out},
        {y: law.residuals},
        len(table),
        warnings_of(table, law.note),
    )


def batch_optimum(table: RunTable, *, within: float = WITHIN, coverage: float = 0.95) -> Fit:
    """The batch of least loss, for one model and number of tokens."""
    name, batches = table.batch("batch_optimum")
    _one(table, "batch_optimum", "params", "tokens")
    kept = tuned_rows(table, name)
    found = optimum(batches[kept], table["loss"][kept], name=name, within=within, coverage=coverage)
    return _of_optimum("batch_optimum", found, table, _STUDY, edge_note(table, kept, name))


def learning_rate_optimum(table: RunTable, *, within: float = WITHIN, coverage: float = 0.95) -> Fit:
    """The learning rate of least loss, for one model, batch and number of tokens."""
    table.need("learning_rate", "loss", law="learning_rate_optimum")
    _one(table, "learning_rate_optimum", "params", "tokens", "batch_tokens", "batch_examples")
    found = optimum(table["learning_rate"], table["loss"], name="learning_rate", within=within, coverage=coverage)
    return _of_optimum("learning_rate_optimum", found, table, "a parabola in ln learning_rate", "")


def chinchilla(
    table: RunTable, *, delta: float = DELTA, draws: int = 200, seed: int = 0, coverage: float = 0.95
) -> Fit:
    """loss = E + A/N^α + B/D^β."""
    table.need("params", "tokens", "loss", law="chinchilla")
    params, tokens, losses, runs = least_losses(table)
    law = _chinchilla(params, tokens, losses, runs=runs, delta=delta, draws=draws, seed=seed, coverage=coverage)
    names = ("E", "A", "alpha", "B", "beta", "params_exponent", "tokens_exponent")
    return Fit(
        "chinchilla",
        "loss = E + A/N^α + B/D^β; N_opt ∝ C^params_exponent, D_opt ∝ C^tokens_exponent",
        "Hoffmann et al. 2022, arXiv 2203.15556, approach 3",
        {name: getattr(law, name) for name in names},
        {"loss": law.leave_one_out},
        {"loss": law.residuals},
        len(table),
        warnings_of(table, law.note),
    )


def budgets(
    table: RunTable,
    *,
    within: float = WITHIN,
    warmup_steps: float = 0,
    cells: int = CELLS,
    draws: int = 200,
    seed: int = 0,
    coverage: float = 0.95,
) -> Fit:
    """N, D, steps and batch for a compute; the batch for a number of tokens; the learning rate for a batch."""
    found = _budgets(
        table, within=within, warmup_steps=warmup_steps, cells=cells, draws=draws, seed=seed, coverage=coverage
    )
    constants: dict[str, Estimate] = {}
    errors: dict[str, float] = {}
    residuals: dict[str, tuple[float, ...]] = {}
    if (laws := found.compute) is not None:
        for law in (laws.params, laws.tokens, laws.steps, laws.batch):
            constants[f"compute: {law.y_name} exponent"] = law.exponent
            constants[f"compute: {law.y_name} at {law.x_middle:.3g} FLOP"] = law.middle
            _add(law, f"compute: {law.y_name}", errors, residuals)
    if (data := found.data) is not None:
        constants |= {"data: a": data.law.a, "data: p": data.law.exponent, "data: p by bootstrap": data.by_bootstrap}
        _add(data.law, "data: batch_tokens", errors, residuals)
    if (rate := found.rate) is not None:
        constants["rate: gamma"] = rate.gamma
        residuals["rate: learning_rate"] = rate.residuals
    if (loss := found.loss) is not None:
        constants |= {f"loss: {name}": getattr(loss, name) for name in ("E", "A", "alpha", "B", "beta")}
        constants["loss: params exponent"] = loss.params_exponent
        errors["loss: loss"], residuals["loss: loss"] = loss.leave_one_out, loss.residuals
    formula = "N, D, S, B ∝ C^exponent with C = 6ND; batch_tokens = a·tokens^p; learning_rate ∝ batch_tokens^gamma"
    warnings = warnings_of(table, *found.notes)
    return Fit("budgets", formula, _STUDY, constants, errors, residuals, len(table), warnings)


def timescale(table: RunTable, *, within: float = WITHIN, coverage: float = 0.95) -> Fit:
    """tau_opt = c·(D/N)^m, from sweeps of weight decay."""
    found = _timescale(table, within=within, coverage=coverage)
    return Fit(
        "timescale",
        "tau = batch_tokens/(learning_rate·weight_decay·tokens) = c·(tokens/params)^m",
        _LINES,
        {"c": found.law.a, "m": found.law.exponent},
        {"tau": found.law.leave_one_out},
        {"tau": found.law.residuals},
        len(table),
        warnings_of(table, found.note),
    )


def critical_batch_growth(
    table: RunTable, *, target_losses: float | tuple[float, ...] | None = None, coverage: float = 0.95
) -> Fit:
    """The critical batch against the least tokens, a·D_min^p, from finished runs of several lengths."""
    found = critical_batch_law(table, target_losses=target_losses, coverage=coverage)
    constants = {
        f"B_crit at loss {target:.4g}, params {params:.4g}": fit.b_crit
        for params, target, fit in zip(found.params, found.target_losses, found.tradeoffs, strict=True)
    }
    errors: dict[str, float] = {}
    residuals = {"loss": tuple(error for curve in found.curves for error in curve.residuals)}
    if found.law is not None:
        constants |= {"a": found.law.a, "p": found.law.exponent}
        _add(found.law, "batch_tokens", errors, residuals)
    formula = "batch_tokens = a·least_tokens^p, where a loss takes twice its least tokens"
    warnings = warnings_of(table, found.note)
    return Fit("critical_batch_growth", formula, _LINES, constants, errors, residuals, len(table), warnings)


def critical_batch(
    table: RunTable,
    *,
    by: str | None = None,
    overhead: float = 0.2,
    base: float | None = None,
    coverage: float = 0.95,
) -> Fit:
    """The batch that costs 20 % more data, from steps to a target; by="params" or "tokens" also its growth."""
    table.need("steps_to_target", *([] if by is None else [by]), law="critical_batch")
    name, batches = table.batch("critical_batch")
    steps, constants, points, notes = table["steps_to_target"], {}, [], []
    residuals: dict[str, tuple[float, ...]] = {}
    groups = [((), np.arange(len(table)))] if by is None else table.groups(by)
    for key, rows in groups:
        where = f" at {by} {key[0]:.4g}" if key else ""
        found = _critical_batch(batches[rows].tolist(), steps[rows].tolist(), overhead, base, coverage=coverage)
        constants[f"B*{where}"], residuals[f"steps_to_target{where}"] = found.size, found.fit.residuals
        if by is None:
            constants |= {"s_min": found.fit.s_min, "e_min": found.fit.e_min, "b_crit": found.fit.b_crit}
        notes += [f"B*{where}: {found.note}"] if found.note else []
        points += [(key[0], found.size.value)] if key else []
    errors: dict[str, float] = {}
    if by is not None:
        law = _power_law(*zip(*points, strict=True), x_name=by, y_name=name, coverage=coverage)
        constants |= {"d": law.a, "beta": law.exponent}
        _add(law, name, errors, residuals)
    formula = f"{name} B* = (1 + {overhead:g})·base + {overhead:g}·b/a with steps = a + b/B"
    formula += f"; B* = d·{by}^beta" if by else ""
    source = "Zhang et al. 2024, arXiv 2410.21676"
    return Fit("critical_batch", formula, source, constants, errors, residuals, len(table), warnings_of(table, *notes))


def diloco(table: RunTable, *, within: float = WITHIN, starts: int = 32, seed: int = 0, coverage: float = 0.95) -> Fit:
    """Loss, learning rate and batch against model size and replicas, A·N^α·M^β."""
    found = _diloco(table, within=within, starts=starts, seed=seed, coverage=coverage)
    constants: dict[str, Estimate] = {}
    errors: dict[str, float] = {}
    residuals: dict[str, tuple[float, ...]] = {}
    notes = [found.note]
    for name, law in (("loss", found.loss), ("learning_rate", found.learning_rate), ("batch_tokens", found.batch)):
        if law is not None:
            _add_replicas(law, name, constants, errors, residuals)
            notes.append(f"{name}: {law.note}" if law.note else "")
    for form in found.parametric:
        errors[f"loss by {form.formula}, largest size"] = form.blind
    formula = "loss, learning_rate, batch_tokens = A·params^alpha·replicas^beta"
    source = "Charles et al. 2025, arXiv 2503.09799"
    return Fit("diloco", formula, source, constants, errors, residuals, len(table), warnings_of(table, *notes))


def _add_replicas(
    law: ReplicaLaw,
    name: str,
    constants: dict[str, Estimate],
    errors: dict[str, float],
    residuals: dict[str, tuple[float, ...]],
) -> None:
    if law.joint is not None:
        joint = law.joint
        constants |= {f"{name}: A": joint.A, f"{name}: alpha": joint.alpha, f"{name}: beta": joint.beta}
        errors[f"{name} (joint)"], residuals[f"{name} (joint)"] = joint.leave_one_out, joint.residuals
    for series, own in law.independent.items():
        constants |= {f"{name}, {series}: A": own.a, f"{name}, {series}: alpha": own.exponent}
        _add(own, f"{name}, {series}", errors, residuals)


def surge(table: RunTable, *, form: Form = "log", coverage: float = 0.95) -> Fit:
    """The learning rate's rise and peak with the batch, ε_max and B_noise, beside its SGD-like rivals."""
    table.need("steps_to_target", "learning_rate", law="surge")
    name, batches = table.batch("surge")
    edge = table["learning_rate_at_edge"] > 0 if "learning_rate_at_edge" in table else None
    rates = table["learning_rate"]
    found = _surge(batches, table["steps_to_target"], rates, at_edge=edge, form=form, coverage=coverage)
    curves = {"surge": found.surge_errors, "saturating, α = 1": found.linear_errors, "α = ½": found.root_errors}
    return Fit(
        "surge",
        f"learning_rate = ε_max/(½(√(B_noise/B) + √(B/B_noise))), B in {name.removeprefix('batch_')}",
        "Li et al. 2024, arXiv 2405.14578",
        {
            "B_noise": found.noise_scale,
            "ε_max": found.peak,
            "ε_max, saturating, α = 1": found.linear,
            "ε_max, saturating, α = ½": found.root,
        },
        {f"learning_rate by {curve}": float(np.mean(np.abs(errors))) for curve, errors in curves.items()},
        {f"learning_rate by {curve}, left out": errors for curve, errors in curves.items()},
        len(table),
        warnings_of(table, found.note),
    )


def _of_optimum(law: str, found: Optimum, table: RunTable, source: str, why: str) -> Fit:
    constants = {f"{found.name}_opt": found.at}
    formula = f"loss = least + ½·curvature·(ln {found.name}/{found.name}_opt)²"
    warnings = warnings_of(table, found.note, why)
    return Fit(law, formula, source, constants, {}, {"loss": found.residuals}, len(table), warnings)


def _one(table: RunTable, law: str, *names: str) -> None:
    for name in names:
        if name in table and len(values := np.unique(table[name])) > 1:
            raise InputError(
                f"{law} is for runs of one {name}, got {len(values)} different ones: fit each alone, or budgets"
            )


def _add(law: PowerLaw, name: str, errors: dict[str, float], residuals: dict[str, tuple[float, ...]]) -> None:
    residuals[name] = law.residuals
    if not math.isnan(law.leave_one_out):
        errors[name] = law.leave_one_out


LAWS: Mapping[str, Callable[..., Fit]] = {
    law.__name__: law
    for law in (
        power_law,
        batch_optimum,
        learning_rate_optimum,
        chinchilla,
        budgets,
        timescale,
        critical_batch,
        critical_batch_growth,
        diloco,
        surge,
        trajectory,
    )
}
