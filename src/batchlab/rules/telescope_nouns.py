"""What a telescoping sweep gives out and takes, as plain numbers for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from batchlab.core.jsonio import JsonNoun


@dataclass(frozen=True)
class TelescopeState(JsonNoun):
    """A sweep as it is saved: its settings, and the losses of each width so far, None for runs still to come."""

    space: Mapping[str, tuple[float, float]]
    linear: tuple[str, ...]
    points: int
    widths: tuple[int, ...]
    odd: bool
    losses: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Suggestion(JsonNoun):
    """One run to make. stage, number: which it is. values: hyper-parameter -> value."""

    stage: int
    number: int
    width: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Stage(JsonNoun):
    """One width. points: of each axis. cost: of all its runs, in runs at the base width with the same tokens.

    mesh: the spacing of each axis, in ln for a logarithmic one. best, loss: of its best run. diverged: runs that did.
    at_edge: axes on which the best lies at an end of its grid, of three points or more.
    """

    width: int
    points: int
    runs: int
    cost: float
    mesh: Mapping[str, float]
    best: Mapping[str, float]
    loss: float
    diverged: int
    at_edge: tuple[str, ...]


@dataclass(frozen=True)
class Drift(JsonNoun):
    """How an optimum moves with width, x*(n) = x* - α/n: every α in [low, high] fits the meshes, alpha is the middle.

    In the axis's unit (ln for a logarithmic one) times width. The bounds are those of the spacing alone, for a loss
    that rises alike on both sides of its optimum and no noise; infinite where bests at edges of grids bound nothing.
    to_last: how far the optimum moves from the width of the last grid to the last width, which a width of one run
    cannot see. consistent: whether any α fits. alpha and to_last are NaN where none does, or it is not bounded.
    """

    alpha: float
    low: float
    high: float
    to_last: float
    consistent: bool


@dataclass(frozen=True)
class Telescoped(JsonNoun):
    """What a sweep found. best: the settings at `width`, the last that was swept.

    cost: of all runs, in runs at the base width with the same tokens. saved: the share of the cost of the full grid at
    the last width that was not spent. The two errors, apart: spacing, half the last grid's mesh; drift.
    notes: what the reader must know.
    """

    best: Mapping[str, float]
    width: int
    stages: tuple[Stage, ...]
    cost: float
    saved: float
    spacing: Mapping[str, float]
    drift: Mapping[str, Drift]
    notes: tuple[str, ...]
