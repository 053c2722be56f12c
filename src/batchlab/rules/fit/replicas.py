"""How loss, learning rate and batch move with model size N and DiLoCo's replicas M (Charles et al. 2025).

For each (N, M) the best run gives the loss and the inner learning rate; the batch is the vertex of a parabola of the
loss in log B over the batches, each at its best rate, and may lie between those tried. Then A·N^α for each M alone, and
A·N^α·M^β for all M ≥ 1 together, which the source recommends (arXiv 2503.09799). Data-parallel training is a series of
its own. The batch is the global one, over all replicas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.rules.fit.bowl import WITHIN, check_bowl, optimum
from batchlab.rules.fit.joint_laws import JointLaw, joint_law
from batchlab.rules.fit.parametric import ParametricLaw, parametric_laws
from batchlab.rules.fit.power_laws import PowerLaw, Values, checked, plain, power_law
from batchlab.rules.fit.table import Rows, RunTable
from batchlab.rules.fit.tuning import tuned_rows

Array = NDArray[np.float64]
DATA_PARALLEL = "data_parallel"


@dataclass(frozen=True)
class ReplicaLaw(JsonNoun):
    """One quantity by its separate laws and by its joint one.

    independent: A·N^α of each series, "data_parallel" or "M=4". joint: A·N^α·M^β, of M ≥ 1; None where it cannot be
    told. note: what was left out, and why.
    """

    independent: Mapping[str, PowerLaw]
    joint: JointLaw | None
    note: str = ""

    def value(self, *, params: float, replicas: int | None) -> float:
        """By the joint law; replicas None for data-parallel training, by its own."""
        if replicas is not None and self.joint is not None:
            return self.joint.value(params=params, replicas=replicas)
        name = series(0 if replicas is None else replicas)
        if name not in self.independent:
            raise InputError(f"replicas must be one of {sorted(self.independent)}, got {name!r}")
        return self.independent[name].value(params)


@dataclass(frozen=True)
class DilocoLaws(JsonNoun):
    """loss: nats a token. learning_rate: the inner optimizer's; None without that column. batch: global, tokens.

    parametric: four forms of the loss, the least error at the largest size first; () where the sizes are too few.
    """

    loss: ReplicaLaw
    learning_rate: ReplicaLaw | None
    batch: ReplicaLaw | None
    parametric: tuple[ParametricLaw, ...] = ()
    note: str = ""


def series(replicas: float) -> str:
    """The name of a series: 0 is data-parallel training."""
    return DATA_PARALLEL if replicas == 0 else f"M={replicas:g}"


def replica_law(
    params: Values, replicas: Values, y: Values, *, y_name: str = "y", coverage: float = 0.95
) -> ReplicaLaw:
    """Separate and joint laws of one quantity, from its best value at each (N, M), M = 0 for data-parallel training.

    A series with fewer than three sizes, or whose points tell no exponent, is left out and noted.

    >>> sizes, counts = [1e8, 3e8, 1e9] * 2, [1, 1, 1, 4, 4, 4]
    >>> law = replica_law(sizes, counts, [2e5 * (n / 1e8) ** 0.5 * m**0.3 for n, m in zip(sizes, counts)])
    >>> round(law.joint.alpha.value, 6), round(law.joint.beta.value, 6), sorted(law.independent)
    (0.5, 0.3, ['M=1', 'M=4'])
    """
    sizes, values = map(np.array, checked(params, y, "params", y_name))
    counts = np.asarray(plain(replicas, "replicas"), dtype=np.float64)
    if counts.shape != sizes.shape or not (counts >= 0).all():
        raise InputError(f"replicas must be >= 0, 0 for data-parallel training, one a value of {y_name}")
    independent, notes = {}, []
    for count in np.unique(counts):
        taken = counts == count
        try:
            independent[series(count)] = power_law(
                sizes[taken], values[taken], x_name="params", y_name=y_name, coverage=coverage
            )
        except InputError as error:
            notes.append(f"{series(count)} has no law of its own: {error}")
    joint, many = None, counts > 0
    try:
        joint = joint_law(sizes[many], counts[many], values[many], y_name=y_name, coverage=coverage)
    except InputError as error:
        notes.append(f"no joint law: {error}")
    if not independent and joint is None:
        raise InputError(f"{y_name} has no law: {'; '.join(notes)}")
    return ReplicaLaw(independent, joint, "; ".join(notes))


def diloco(
    table: RunTable, *, within: float = WITHIN, starts: int = 32, seed: int = 0, coverage: float = 0.95
) -> DilocoLaws:
    """All three laws from runs with params, replicas, batch_tokens and loss, and learning_rate where it was swept.

    replicas: M of DiLoCo, blank or 0 for data-parallel training. within: of the parabola in the batch, a factor.
    starts, seed: of the parametric forms. A batch or rate that is best at the edge of its sweep is left out and noted:
    the source widens its grids until none is.

    Raises `InputError` where even the loss has no law. Not for runs of different tokens a parameter: the laws hold
    along one, 20 in the source.
    """
    check_bowl(within, coverage)
    check_count(starts=starts)
    check_count(0, seed=seed)
    table.need("params", "replicas", "batch_tokens", "loss", law="diloco")
    rated = "learning_rate" in table
    rows: list[tuple[float, float, float]] = []
    rates: list[tuple[float, float, float]] = []
    batches: list[tuple[float, float, float]] = []
    notes: list[str] = []
    chosen = table.take(tuned_rows(table, "params", "replicas", "batch_tokens"))
    for (params, replicas), found in chosen.groups("params", "replicas"):
        where = f"params {params:.4g}, {series(replicas)}"
        sizes, means = _mean_losses(chosen, found)
        rows.append((params, replicas, float(means.min())))
        if rated:
            best = found[int(np.argmax(chosen["batch_tokens"][found] == sizes[means.argmin()]))]
            rate, why = _best_rate(table, float(chosen["learning_rate"][best]), params, replicas, sizes[means.argmin()])
            notes += [f"{where}: {why}"] if why else []
            rates += [] if why else [(params, replicas, rate)]
        batch, why = _best_batch(sizes, means, within, coverage)
        notes += [f"{where}: {why}"] if why else []
        batches += [] if why else [(params, replicas, batch)]
    loss = replica_law(*zip(*rows, strict=True), y_name="loss", coverage=coverage)
    forms: tuple[ParametricLaw, ...] = ()
    many = [row for row in rows if row[1] > 0]
    try:
        forms = parametric_laws(*zip(*many, strict=True), starts=starts, seed=seed, y_name="loss") if many else ()
    except InputError as error:
        notes.append(f"no parametric forms: {error}")
    rate_law = _optional(rates, "learning_rate", coverage, notes) if rated else None
    return DilocoLaws(loss, rate_law, _optional(batches, "batch_tokens", coverage, notes), forms, "; ".join(notes))


def _mean_losses(table: RunTable, found: Rows) -> tuple[Array, Array]:
    """The batches of those rows, ascending, and the mean loss of each."""
    sizes, which = np.unique(table["batch_tokens"][found], return_inverse=True)
    return sizes, np.bincount(which, table["loss"][found]) / np.bincount(which)


def _best_rate(table: RunTable, rate: float, params: float, replicas: float, batch: float) -> tuple[float, str]:
    """The rate, and why it does not count: at the edge of several tried at its batch."""
    same = (table["params"] == params) & (table["replicas"] == replicas) & (table["batch_tokens"] == batch)
    tried = table["learning_rate"][same]
    edge = len(np.unique(tried)) > 1 and rate in (tried.min(), tried.max())
    return rate, f"the best learning rate, {rate:.3g}, is at the edge of those tried" if edge else ""


def _best_batch(sizes: Array, means: Array, within: float, coverage: float) -> tuple[float, str]:
    try:
        found = optimum(sizes, means, name="batch_tokens", within=within, coverage=coverage)
    except InputError as error:
        return 0.0, str(error)
    return found.at.value, found.note


def _optional(
    rows: Sequence[tuple[float, float, float]], name: str, coverage: float, notes: list[str]
) -> ReplicaLaw | None:
    try:
        if not rows:
            raise InputError("no optimum is bracketed")
        return replica_law(*zip(*rows, strict=True), y_name=name, coverage=coverage)
    except InputError as error:
        notes.append(f"no law of {name}: {error}")
        return None
