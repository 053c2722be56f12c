"""Which batch size, and what else must change with it? batchlab probes, plans, trains and shows.

This module only hands on the nouns and the verbs, each loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchlab.core.errors import BatchlabError as BatchlabError
    from batchlab.core.facts import Estimate as Estimate
    from batchlab.core.facts import Facts as Facts
    from batchlab.core.job import Job as Job
    from batchlab.core.job import Target as Target
    from batchlab.core.plan import Plan as Plan
    from batchlab.core.plan import Reason as Reason
    from batchlab.core.run import Run as Run
    from batchlab.core.study import Study as Study
    from batchlab.spine.plan import plan as plan
    from batchlab.spine.probe import probe as probe
    from batchlab.spine.report import report as report
    from batchlab.spine.sweep import sweep as sweep
    from batchlab.spine.train import train as train
    from batchlab.spine.tune import tune as tune

__version__ = "0.1.0"

_HOME = {
    "Job": "core.job",
    "Target": "core.job",
    "Facts": "core.facts",
    "Estimate": "core.facts",
    "Plan": "core.plan",
    "Reason": "core.plan",
    "Run": "core.run",
    "Study": "core.study",
    "BatchlabError": "core.errors",
    "probe": "spine.probe",
    "plan": "spine.plan",
    "train": "spine.train",
    "tune": "spine.tune",
    "sweep": "spine.sweep",
    "report": "spine.report",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'batchlab' has no attribute {name!r}")
    value = getattr(import_module(f"batchlab.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
