"""Parallel layouts of a transformer's training: shape, memory, time, and the search over them."""

from batchlab.planner.layouts.activations import Block, activation_bytes
from batchlab.planner.layouts.calibration import FittedEfficiency, fit_efficiency
from batchlab.planner.layouts.memory import PRECISIONS, Memory, Precision
from batchlab.planner.layouts.rows import Layout, Layouts, Measured
from batchlab.planner.layouts.search import layout
from batchlab.planner.layouts.shape import ModelShape
from batchlab.planner.layouts.step_time import Efficiency, StepTime, bubble_share, mfu

__all__ = [
    "PRECISIONS",
    "Block",
    "Efficiency",
    "FittedEfficiency",
    "Layout",
    "Layouts",
    "Measured",
    "Memory",
    "ModelShape",
    "Precision",
    "StepTime",
    "activation_bytes",
    "bubble_share",
    "fit_efficiency",
    "layout",
    "mfu",
]
