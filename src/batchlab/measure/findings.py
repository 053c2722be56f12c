"""`Findings`: single facts of a job at some weights, each measured because it was asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.measure.energy.energy_use import EnergyUse
from batchlab.measure.hessian.curvature import Curvature
from batchlab.measure.surface.landscape import Landscape

SCHEMA = 1
KINDS = ("noise", "memory", "curvature", "energy", "landscape")
FINDINGS_FILE = "findings.json"


@dataclass(frozen=True)
class NoiseFinding(JsonNoun):
    """The noise scale at fixed weights, in examples. batch_size, steps: of the batches that it was measured on.

    trace, grad_sq: the means of tr(Σ) and of |G|², in the loss's unit per weight, squared.
    """

    noise_scale: Estimate
    trace: float
    grad_sq: float
    batch_size: int
    steps: int


@dataclass(frozen=True)
class MemoryFinding(JsonNoun):
    """The largest micro-batch to use, and why the search ended there.

    tries: (examples, whether it fits, the phase that ran out or "", bytes at most or -1) in the order tried.
    """

    size: int
    why: str
    tries: tuple[tuple[int, bool, str, int], ...]


@dataclass(frozen=True)
class EnergyFinding(JsonNoun):
    """What training steps used. steps: optimizer steps, each with `batch_size` examples."""

    use: EnergyUse
    steps: int
    batch_size: int


@dataclass(frozen=True)
class LandscapeFinding(JsonNoun):
    """The loss along random directions. level: the rise, in the loss's unit, at which `width` was taken."""

    landscape: Landscape
    level: float
    width: Estimate


@dataclass(frozen=True)
class Findings(JsonNoun):
    """What was asked for and measured; None for what was not. weights: where in weight space, in words.

    notes: how it came about, in sentences.
    """

    job: str
    device: str
    machine: Mapping[str, Any]
    weights: str
    seed: int
    noise: NoiseFinding | None = None
    memory: MemoryFinding | None = None
    curvature: Curvature | None = None
    energy: EnergyFinding | None = None
    landscape: LandscapeFinding | None = None
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema > SCHEMA:
            raise InputError(f"findings of schema {self.schema} come from a newer batchlab; this one reads {SCHEMA}")

    def over(self, older: Findings) -> Findings:
        """These, and what only `older` has of the same job at the same weights on the same device."""
        same = all(getattr(self, name) == getattr(older, name) for name in ("job", "device", "weights", "seed"))
        kept = {kind: getattr(older, kind) for kind in KINDS if same and getattr(self, kind) is None}
        notes = tuple(dict.fromkeys([*(older.notes if same else ()), *self.notes]))
        return dataclasses.replace(self, notes=notes, **kept)
