"""The loss-trajectory law from a table of checkpoints, as `rules.fit.fit` takes and gives it."""

from __future__ import annotations

from batchlab.core.checks import check_not_negative
from batchlab.core.errors import InputError
from batchlab.rules.fit.by_name import Fit, warnings_of
from batchlab.rules.fit.loss_runs import LossRun
from batchlab.rules.fit.table import RunTable
from batchlab.rules.fit.trajectory_fit import trajectory as _trajectory
from batchlab.rules.fit.trajectory_law import NAMES


def loss_runs_of(table: RunTable, *, warmup_steps: float = 0.0) -> list[LossRun]:
    """One run for each label of `run`, its rows the checkpoints: columns params, batch_tokens, steps and loss.

    warmup_steps: updates over which the learning rate rose, alike in all runs. Refuses a run whose rows differ in
    params or batch_tokens, or share a step.

    >>> rows = {"params": [1e6] * 2, "batch_tokens": [2**15] * 2, "steps": [20, 10], "loss": [4.0, 5.0]}
    >>> loss_runs_of(RunTable.of({**rows, "run": ["a", "a"]}))[0].losses
    (5.0, 4.0)
    """
    check_not_negative(warmup_steps=warmup_steps)
    table.need("params", "batch_tokens", "steps", "loss", law="trajectory")
    labels = table.texts["run"]
    found = []
    for label in dict.fromkeys(labels):
        rows = sorted((row for row, each in enumerate(labels) if each == label), key=lambda row: table["steps"][row])
        mine = table.take(rows)
        for name in ("params", "batch_tokens"):
            if len(set(mine.columns[name])) > 1:
                raise InputError(f"run {label!r} must have one {name}, got {sorted(set(mine.columns[name]))}")
        if len(set(mine.columns["steps"])) < len(rows):
            raise InputError(f"run {label!r} must have one row a step, got {mine.columns['steps']!r:.80}")
        size, batch = mine.columns["params"][0], mine.columns["batch_tokens"][0]
        found.append(LossRun(size, batch, mine.columns["steps"], mine.columns["loss"], warmup_steps=warmup_steps))
    return found


def trajectory(
    table: RunTable,
    *,
    warmup_steps: float = 0.0,
    degree: int | None = 6,
    draws: int = 200,
    seed: int = 0,
    coverage: float = 0.95,
) -> Fit:
    """loss = (N_c/N)^α_N + (S_c/S_min)^α_S, S_min = steps/(1 + B_*/(batch_tokens·loss^(1/α_B))).

    Final losses are extrapolated; where you have them as measured, `rules.fit.trajectory` takes them.
    """
    runs = loss_runs_of(table, warmup_steps=warmup_steps)
    law = _trajectory(runs, extrapolate=True, degree=degree, draws=draws, seed=seed, coverage=coverage)
    missed = {} if law.leave_one_out is None else {"loss": law.leave_one_out}
    return Fit(
        "trajectory",
        "loss = (N_c/N)^α_N + (S_c/S_min)^α_S, S_min = S/(1 + B_*/(B·loss^(1/α_B))), B in tokens",
        "Su et al. 2024, arXiv 2403.06563; Kaplan et al. 2020, arXiv 2001.08361",
        {name: getattr(law, name) for name in NAMES},
        missed,
        {},
        len(table),
        warnings_of(table, law.note),
    )
