"""Facts about a batch size: what a gradient, a batch, a machine and a set of runs tell, each with its uncertainty.

This module only hands on the public names, each loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchlab.measure.adam_stability import AdamStability as AdamStability
    from batchlab.measure.adam_update import expected_variance as expected_variance
    from batchlab.measure.buckets import MicroBatchTable as MicroBatchTable
    from batchlab.measure.cauchy import cauchy_learning_rate as cauchy_learning_rate
    from batchlab.measure.contraction import max_stable_lr as max_stable_lr
    from batchlab.measure.convexity import HessianMap as HessianMap
    from batchlab.measure.convexity import hessian_map as hessian_map
    from batchlab.measure.curvature_probe import Curvature as Curvature
    from batchlab.measure.curvature_probe import curvature as curvature
    from batchlab.measure.data_overhead import CriticalBatch as CriticalBatch
    from batchlab.measure.data_overhead import Growth as Growth
    from batchlab.measure.data_overhead import critical_batch as critical_batch
    from batchlab.measure.data_overhead import fit_growth as fit_growth
    from batchlab.measure.diffusion import Diffusion as Diffusion
    from batchlab.measure.directions import random_direction as random_direction
    from batchlab.measure.dual_norm import DualNormNoise as DualNormNoise
    from batchlab.measure.dual_norm import dual_norm_noise as dual_norm_noise
    from batchlab.measure.dual_norm import group_gradients as group_gradients
    from batchlab.measure.energy import Energy as Energy
    from batchlab.measure.energy_meters import MachineMeter as MachineMeter
    from batchlab.measure.energy_study import EnergyStudy as EnergyStudy
    from batchlab.measure.energy_study import TrainResult as TrainResult
    from batchlab.measure.energy_study import compare_energy as compare_energy
    from batchlab.measure.energy_use import EnergyUse as EnergyUse
    from batchlab.measure.findings import Findings as Findings
    from batchlab.measure.gradient_signal import GradientSignal as GradientSignal
    from batchlab.measure.interpolation import interpolate as interpolate
    from batchlab.measure.learning_rate import Cycle as Cycle
    from batchlab.measure.learning_rate import RangeTest as RangeTest
    from batchlab.measure.learning_rate import lr_range as lr_range
    from batchlab.measure.memory import find_micro_batch as find_micro_batch
    from batchlab.measure.noise import GradientNoise as GradientNoise
    from batchlab.measure.noise_pair import noise_scale as noise_scale
    from batchlab.measure.noise_pair import unbiased_pair as unbiased_pair
    from batchlab.measure.per_example import ExampleSqNorms as ExampleSqNorms
    from batchlab.measure.per_example import per_example_sq_norms as per_example_sq_norms
    from batchlab.measure.scaling_regimes import ScalingRegimes as ScalingRegimes
    from batchlab.measure.scaling_regimes import perfect_scaling_limit as perfect_scaling_limit
    from batchlab.measure.sfo import SfoComplexity as SfoComplexity
    from batchlab.measure.sfo import joint_critical_batch as joint_critical_batch
    from batchlab.measure.sfo import sfo_complexity as sfo_complexity
    from batchlab.measure.signal_to_noise import Gsnr as Gsnr
    from batchlab.measure.signal_to_noise import gsnr as gsnr
    from batchlab.measure.size_finder import MicroBatch as MicroBatch
    from batchlab.measure.stability_limit import SpikeFit as SpikeFit
    from batchlab.measure.stability_limit import fit_spike as fit_spike
    from batchlab.measure.stability_limit import rate_ceiling as rate_ceiling
    from batchlab.measure.step_time import Throughput as Throughput
    from batchlab.measure.step_time import throughput as throughput
    from batchlab.measure.steps_to_result import StepsToTarget as StepsToTarget
    from batchlab.measure.steps_to_result import fewest_steps as fewest_steps
    from batchlab.measure.steps_to_result import measurements as measurements
    from batchlab.measure.steps_to_result import steps_to_target as steps_to_target
    from batchlab.measure.surface import Landscape as Landscape
    from batchlab.measure.surface import landscape as landscape
    from batchlab.measure.tradeoff import Tradeoff as Tradeoff
    from batchlab.measure.tradeoff import fit_tradeoff as fit_tradeoff
    from batchlab.measure.trajectory import pca_trajectory as pca_trajectory
    from batchlab.measure.trajectory import project_trajectory as project_trajectory
    from batchlab.measure.tuned import tuned_settings as tuned_settings
    from batchlab.measure.weight_distance import WeightDistance as WeightDistance

_HOME = {
    "GradientNoise": "noise",
    "noise_scale": "noise_pair",
    "unbiased_pair": "noise_pair",
    "per_example_sq_norms": "per_example",
    "ExampleSqNorms": "per_example",
    "gsnr": "signal_to_noise",
    "Gsnr": "signal_to_noise",
    "GradientSignal": "gradient_signal",
    "dual_norm_noise": "dual_norm",
    "DualNormNoise": "dual_norm",
    "group_gradients": "dual_norm",
    "fit_tradeoff": "tradeoff",
    "Tradeoff": "tradeoff",
    "critical_batch": "data_overhead",
    "CriticalBatch": "data_overhead",
    "fit_growth": "data_overhead",
    "Growth": "data_overhead",
    "steps_to_target": "steps_to_result",
    "StepsToTarget": "steps_to_result",
    "fewest_steps": "steps_to_result",
    "measurements": "steps_to_result",
    "perfect_scaling_limit": "scaling_regimes",
    "ScalingRegimes": "scaling_regimes",
    "tuned_settings": "tuned",
    "sfo_complexity": "sfo",
    "SfoComplexity": "sfo",
    "joint_critical_batch": "sfo",
    "curvature": "curvature_probe",
    "Curvature": "curvature_probe",
    "cauchy_learning_rate": "cauchy",
    "fit_spike": "stability_limit",
    "SpikeFit": "stability_limit",
    "rate_ceiling": "stability_limit",
    "max_stable_lr": "contraction",
    "lr_range": "learning_rate",
    "RangeTest": "learning_rate",
    "Cycle": "learning_rate",
    "find_micro_batch": "memory",
    "MicroBatch": "size_finder",
    "MicroBatchTable": "buckets",
    "throughput": "step_time",
    "Throughput": "step_time",
    "Energy": "energy",
    "EnergyUse": "energy_use",
    "compare_energy": "energy_study",
    "EnergyStudy": "energy_study",
    "TrainResult": "energy_study",
    "MachineMeter": "energy_meters",
    "AdamStability": "adam_stability",
    "expected_variance": "adam_update",
    "WeightDistance": "weight_distance",
    "Diffusion": "diffusion",
    "landscape": "surface",
    "Landscape": "surface",
    "random_direction": "directions",
    "interpolate": "interpolation",
    "pca_trajectory": "trajectory",
    "project_trajectory": "trajectory",
    "hessian_map": "convexity",
    "HessianMap": "convexity",
    "Findings": "findings",
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
