"""Facts about a batch size: what a gradient, a batch, a machine and a set of runs tell, each with its uncertainty.

This module only hands on the public names, each loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchlab.measure.learning_rate import RangeTest as RangeTest
    from batchlab.measure.learning_rate import lr_range as lr_range
    from batchlab.measure.memory import MicroBatch as MicroBatch
    from batchlab.measure.memory import find_micro_batch as find_micro_batch
    from batchlab.measure.noise import GradientNoise as GradientNoise
    from batchlab.measure.noise import noise_scale as noise_scale
    from batchlab.measure.noise import unbiased_pair as unbiased_pair
    from batchlab.measure.step_time import Throughput as Throughput
    from batchlab.measure.step_time import throughput as throughput
    from batchlab.measure.tradeoff import Tradeoff as Tradeoff
    from batchlab.measure.tradeoff import fit_tradeoff as fit_tradeoff

_HOME = {
    "GradientNoise": "noise",
    "noise_scale": "noise",
    "unbiased_pair": "noise",
    "fit_tradeoff": "tradeoff",
    "Tradeoff": "tradeoff",
    "find_micro_batch": "memory",
    "MicroBatch": "memory",
    "throughput": "step_time",
    "Throughput": "step_time",
    "lr_range": "learning_rate",
    "RangeTest": "learning_rate",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'batchlab.measure' has no attribute {name!r}")
    value = getattr(import_module(f"batchlab.measure.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
