"""Choices made from facts and rules: which batch, on how many devices, evaluated and saved how often.

This module only hands on the public names, each loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchlab.core.handing_on import hand_on

if TYPE_CHECKING:
    from batchlab.planner.advice.advise import advise as advise
    from batchlab.planner.advice.nouns import Advice as Advice
    from batchlab.planner.costs.attention import Attention as Attention
    from batchlab.planner.costs.cost_table import CostTable as CostTable
    from batchlab.planner.costs.cost_table import cost_table as cost_table
    from batchlab.planner.costs.loss_curve import LossCurve as LossCurve
    from batchlab.planner.costs.loss_curve import LossTable as LossTable
    from batchlab.planner.costs.loss_curve import loss_per_dollar as loss_per_dollar
    from batchlab.planner.costs.price import tokens_per_dollar as tokens_per_dollar
    from batchlab.planner.costs.run_cost import RunCost as RunCost
    from batchlab.planner.costs.run_cost import cost as cost
    from batchlab.planner.costs.sharding import StateBytes as StateBytes
    from batchlab.planner.costs.sharding import communication_bytes as communication_bytes
    from batchlab.planner.costs.sharding import state_bytes as state_bytes
    from batchlab.planner.costs.training import Training as Training
    from batchlab.planner.costs.update_time import Infeasible as Infeasible
    from batchlab.planner.fine_tune.calibration import Calibration as Calibration
    from batchlab.planner.fine_tune.calibration import calibrate as calibrate
    from batchlab.planner.fine_tune.fine_tune_cost import FineTuneCost as FineTuneCost
    from batchlab.planner.fine_tune.fine_tune_cost import fine_tune_cost as fine_tune_cost
    from batchlab.planner.fine_tune.linear_time import LinearTimeModel as LinearTimeModel
    from batchlab.planner.fine_tune.measured_batch import MeasuredBatch as MeasuredBatch
    from batchlab.planner.fine_tune.memory_model import BatchMemoryModel as BatchMemoryModel
    from batchlab.planner.fine_tune.throughput_model import ThroughputModel as ThroughputModel
    from batchlab.planner.frontier_rows import frontier as frontier
    from batchlab.planner.hardware import Cluster as Cluster
    from batchlab.planner.hardware import Device as Device
    from batchlab.planner.layouts.activations import Block as Block
    from batchlab.planner.layouts.calibration import fit_efficiency as fit_efficiency
    from batchlab.planner.layouts.rows import Layout as Layout
    from batchlab.planner.layouts.rows import Layouts as Layouts
    from batchlab.planner.layouts.rows import Measured as Measured
    from batchlab.planner.layouts.search import layout as layout
    from batchlab.planner.layouts.shape import ModelShape as ModelShape
    from batchlab.planner.layouts.step_time import Efficiency as Efficiency
    from batchlab.planner.optimizer_overhead import least_accumulation as least_accumulation
    from batchlab.planner.optimizer_overhead import least_batch as least_batch
    from batchlab.planner.optimizer_overhead import optimizer_share as optimizer_share
    from batchlab.planner.optimizer_overhead import state_elements as state_elements
    from batchlab.planner.recipes.recipe import Recipe as Recipe
    from batchlab.planner.recipes.recipe import read_recipe as read_recipe
    from batchlab.planner.recipes.rescale import Rescaled as Rescaled
    from batchlab.planner.recipes.rescale import recipe as recipe
    from batchlab.planner.recipes.rescale import rescaled_toml as rescaled_toml

_HOME = {
    "Advice": "advice.nouns",
    "advise": "advice.advise",
    "frontier": "frontier_rows",
    "Block": "layouts.activations",
    "Cluster": "hardware",
    "Device": "hardware",
    "Efficiency": "layouts.step_time",
    "Layout": "layouts.rows",
    "Layouts": "layouts.rows",
    "Measured": "layouts.rows",
    "ModelShape": "layouts.shape",
    "fit_efficiency": "layouts.calibration",
    "layout": "layouts.search",
    "Recipe": "recipes.recipe",
    "Rescaled": "recipes.rescale",
    "read_recipe": "recipes.recipe",
    "recipe": "recipes.rescale",
    "rescaled_toml": "recipes.rescale",
    "Attention": "costs.attention",
    "CostTable": "costs.cost_table",
    "cost_table": "costs.cost_table",
    "LossCurve": "costs.loss_curve",
    "LossTable": "costs.loss_curve",
    "loss_per_dollar": "costs.loss_curve",
    "tokens_per_dollar": "costs.price",
    "RunCost": "costs.run_cost",
    "cost": "costs.run_cost",
    "StateBytes": "costs.sharding",
    "communication_bytes": "costs.sharding",
    "state_bytes": "costs.sharding",
    "Training": "costs.training",
    "Infeasible": "costs.update_time",
    "Calibration": "fine_tune.calibration",
    "calibrate": "fine_tune.calibration",
    "FineTuneCost": "fine_tune.fine_tune_cost",
    "fine_tune_cost": "fine_tune.fine_tune_cost",
    "LinearTimeModel": "fine_tune.linear_time",
    "MeasuredBatch": "fine_tune.measured_batch",
    "BatchMemoryModel": "fine_tune.memory_model",
    "ThroughputModel": "fine_tune.throughput_model",
    "least_accumulation": "optimizer_overhead",
    "least_batch": "optimizer_overhead",
    "optimizer_share": "optimizer_overhead",
    "state_elements": "optimizer_overhead",
}

__all__ = [*_HOME]

__getattr__, __dir__ = hand_on(__name__, _HOME)
