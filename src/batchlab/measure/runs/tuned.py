"""The settings that won at each batch size, beside the linear and the square-root rule (Shallue et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.core.study import Study, chosen


@dataclass(frozen=True)
class TunedSetting(JsonNoun):
    """The winner of one batch size's search, beside two rules.

    momentum: None where it is not known, and then it counts as 0. effective_rate: η/(1 - m), the step that a constant
    gradient ends up taking. linear, square_root: the effective rate of the base batch times B/B_0 and √(B/B_0).
    at_edge: whether the winner lies in the outer 5 % of the rates tried: the space must be widened.
    """

    batch_size: float
    learning_rate: float
    momentum: float | None
    effective_rate: float
    linear: float
    square_root: float
    at_edge: bool


def tuned_settings(
    study: Study | Iterable[Mapping[str, Any]], *, base: float | None = None
) -> tuple[TunedSetting, ...]:
    """The winning settings of each batch size, ascending, beside the linear and the square-root rule from `base`.

    study: a `Study`; or mappings with `batch_size` and `learning_rate`, and `momentum` and `at_edge` if known, one a
    size. base: None for the smallest size. Sizes without a winner are left out. It shows what tuning found, and proves
    no rule: the source found that neither holds in general.

    >>> [s.linear for s in tuned_settings([{"batch_size": b, "learning_rate": 0.1} for b in (8, 16)])]
    [0.1, 0.2]
    """
    rows = _winners(study) if isinstance(study, Study) else [row for row in study if row["learning_rate"] is not None]
    rows = sorted(rows, key=lambda row: float(row["batch_size"]))
    if not rows:
        raise InputError("study must hold at least one batch size with a winner, got none")
    sizes = [row["batch_size"] for row in rows]
    chosen = sizes[0] if base is None else base
    if sizes.count(chosen) != 1:
        raise InputError(f"base must be one of the batch sizes {sizes}, once, got {chosen!r}")
    start = _effective(rows[sizes.index(chosen)])
    return tuple(
        TunedSetting(
            float(row["batch_size"]),
            float(row["learning_rate"]),
            None if row.get("momentum") is None else float(row["momentum"]),
            _effective(row),
            start * float(row["batch_size"] / chosen),
            start * math.sqrt(row["batch_size"] / chosen),
            bool(row.get("at_edge", False)),
        )
        for row in rows
    )


def _winners(study: Study) -> list[Mapping[str, Any]]:
    trials = study.trials()
    found: list[Mapping[str, Any]] = []
    for row in study.rows():
        best = chosen([trial for trial in trials if trial["batch_size"] == row["batch_size"]])
        if best is not None:
            found.append(dict(best) | {"at_edge": row["at_edge"]})
    return found


def _effective(row: Mapping[str, Any]) -> float:
    momentum = row.get("momentum") or 0.0
    if not 0 <= momentum < 1:
        raise InputError(f"momentum must lie in [0, 1), got {momentum!r}")
    return float(row["learning_rate"]) / (1 - momentum)
