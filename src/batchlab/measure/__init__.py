"""Facts about a batch size: what a gradient, a batch, a machine and a set of runs tell, each with its uncertainty.

This module only hands on the public names, each loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchlab.core.handing_on import hand_on

if TYPE_CHECKING:
    from batchlab.measure.course.adam_stability import AdamStability as AdamStability
    from batchlab.measure.course.adam_update import expected_variance as expected_variance
    from batchlab.measure.course.contraction import max_stable_lr as max_stable_lr
    from batchlab.measure.course.coordinate_check import CoordinateCheck as CoordinateCheck
    from batchlab.measure.course.coordinate_check import coordinate_check as coordinate_check
    from batchlab.measure.course.decay_grid import DecayChoice as DecayChoice
    from batchlab.measure.course.decay_grid import weight_decay_grid as weight_decay_grid
    from batchlab.measure.course.diffusion import Diffusion as Diffusion
    from batchlab.measure.course.learning_rate import Cycle as Cycle
    from batchlab.measure.course.learning_rate import RangeTest as RangeTest
    from batchlab.measure.course.learning_rate import lr_range as lr_range
    from batchlab.measure.course.weight_distance import WeightDistance as WeightDistance
    from batchlab.measure.energy.energy import Energy as Energy
    from batchlab.measure.energy.energy_meters import MachineMeter as MachineMeter
    from batchlab.measure.energy.energy_study import EnergyStudy as EnergyStudy
    from batchlab.measure.energy.energy_study import TrainResult as TrainResult
    from batchlab.measure.energy.energy_study import compare_energy as compare_energy
    from batchlab.measure.energy.energy_use import EnergyUse as EnergyUse
    from batchlab.measure.examples.example_norms import ExampleNorms as ExampleNorms
    from batchlab.measure.examples.per_example import ExampleSqNorms as ExampleSqNorms
    from batchlab.measure.examples.per_example import per_example_sq_norms as per_example_sq_norms
    from batchlab.measure.findings import Findings as Findings
    from batchlab.measure.hessian.cauchy import cauchy_learning_rate as cauchy_learning_rate
    from batchlab.measure.hessian.curvature import Curvature as Curvature
    from batchlab.measure.hessian.curvature import curvature as curvature
    from batchlab.measure.hessian.stability_limit import SpikeFit as SpikeFit
    from batchlab.measure.hessian.stability_limit import fit_spike as fit_spike
    from batchlab.measure.hessian.stability_limit import rate_ceiling as rate_ceiling
    from batchlab.measure.memory.buckets import MicroBatchTable as MicroBatchTable
    from batchlab.measure.memory.micro_batch import find_micro_batch as find_micro_batch
    from batchlab.measure.memory.size_finder import MicroBatch as MicroBatch
    from batchlab.measure.noise.batch_tests import BatchTest as BatchTest
    from batchlab.measure.noise.batch_tests import augmented_inner_product_test as augmented_inner_product_test
    from batchlab.measure.noise.batch_tests import inner_product_test as inner_product_test
    from batchlab.measure.noise.batch_tests import norm_test as norm_test
    from batchlab.measure.noise.batch_tests import orthogonality_test as orthogonality_test
    from batchlab.measure.noise.batch_tests import pooled_variance as pooled_variance
    from batchlab.measure.noise.dual_norm import DualNormNoise as DualNormNoise
    from batchlab.measure.noise.dual_norm import dual_norm_noise as dual_norm_noise
    from batchlab.measure.noise.dual_norm import group_gradients as group_gradients
    from batchlab.measure.noise.gradient_noise import GradientNoise as GradientNoise
    from batchlab.measure.noise.gradient_signal import GradientSignal as GradientSignal
    from batchlab.measure.noise.independence import IndependenceCurve as IndependenceCurve
    from batchlab.measure.noise.independence import gradient_independence_curve as gradient_independence_curve
    from batchlab.measure.noise.noise_pair import noise_scale as noise_scale
    from batchlab.measure.noise.noise_pair import unbiased_pair as unbiased_pair
    from batchlab.measure.noise.signal_to_noise import Gsnr as Gsnr
    from batchlab.measure.noise.signal_to_noise import gsnr as gsnr
    from batchlab.measure.runs.data_overhead import CriticalBatch as CriticalBatch
    from batchlab.measure.runs.data_overhead import Growth as Growth
    from batchlab.measure.runs.data_overhead import critical_batch as critical_batch
    from batchlab.measure.runs.data_overhead import fit_growth as fit_growth
    from batchlab.measure.runs.scaling_regimes import ScalingRegimes as ScalingRegimes
    from batchlab.measure.runs.scaling_regimes import perfect_scaling_limit as perfect_scaling_limit
    from batchlab.measure.runs.sfo import SfoComplexity as SfoComplexity
    from batchlab.measure.runs.sfo import joint_critical_batch as joint_critical_batch
    from batchlab.measure.runs.sfo import sfo_complexity as sfo_complexity
    from batchlab.measure.runs.steps_to_result import StepsToTarget as StepsToTarget
    from batchlab.measure.runs.steps_to_result import fewest_steps as fewest_steps
    from batchlab.measure.runs.steps_to_result import measurements as measurements
    from batchlab.measure.runs.steps_to_result import steps_to_target as steps_to_target
    from batchlab.measure.runs.token_ratio import TokenRatio as TokenRatio
    from batchlab.measure.runs.token_ratio import pareto as pareto
    from batchlab.measure.runs.token_ratio import token_ratio as token_ratio
    from batchlab.measure.runs.token_ratio import tokens_to_loss as tokens_to_loss
    from batchlab.measure.runs.tradeoff import Tradeoff as Tradeoff
    from batchlab.measure.runs.tradeoff import fit_tradeoff as fit_tradeoff
    from batchlab.measure.runs.tuned import tuned_settings as tuned_settings
    from batchlab.measure.speed.step_time import Throughput as Throughput
    from batchlab.measure.speed.step_time import throughput as throughput
    from batchlab.measure.surface.convexity import HessianMap as HessianMap
    from batchlab.measure.surface.convexity import hessian_map as hessian_map
    from batchlab.measure.surface.directions import random_direction as random_direction
    from batchlab.measure.surface.interpolation import interpolate as interpolate
    from batchlab.measure.surface.landscape import Landscape as Landscape
    from batchlab.measure.surface.landscape import landscape as landscape
    from batchlab.measure.surface.trajectory import pca_trajectory as pca_trajectory
    from batchlab.measure.surface.trajectory import project_trajectory as project_trajectory

_HOME = {
    "GradientNoise": "noise.gradient_noise",
    "noise_scale": "noise.noise_pair",
    "unbiased_pair": "noise.noise_pair",
    "per_example_sq_norms": "examples.per_example",
    "ExampleSqNorms": "examples.per_example",
    "ExampleNorms": "examples.example_norms",
    "gsnr": "noise.signal_to_noise",
    "Gsnr": "noise.signal_to_noise",
    "GradientSignal": "noise.gradient_signal",
    "dual_norm_noise": "noise.dual_norm",
    "DualNormNoise": "noise.dual_norm",
    "group_gradients": "noise.dual_norm",
    "gradient_independence_curve": "noise.independence",
    "IndependenceCurve": "noise.independence",
    "fit_tradeoff": "runs.tradeoff",
    "Tradeoff": "runs.tradeoff",
    "critical_batch": "runs.data_overhead",
    "CriticalBatch": "runs.data_overhead",
    "fit_growth": "runs.data_overhead",
    "Growth": "runs.data_overhead",
    "steps_to_target": "runs.steps_to_result",
    "StepsToTarget": "runs.steps_to_result",
    "fewest_steps": "runs.steps_to_result",
    "measurements": "runs.steps_to_result",
    "perfect_scaling_limit": "runs.scaling_regimes",
    "ScalingRegimes": "runs.scaling_regimes",
    "tuned_settings": "runs.tuned",
    "token_ratio": "runs.token_ratio",
    "TokenRatio": "runs.token_ratio",
    "tokens_to_loss": "runs.token_ratio",
    "pareto": "runs.token_ratio",
    "sfo_complexity": "runs.sfo",
    "BatchTest": "noise.batch_tests",
    "augmented_inner_product_test": "noise.batch_tests",
    "inner_product_test": "noise.batch_tests",
    "norm_test": "noise.batch_tests",
    "orthogonality_test": "noise.batch_tests",
    "pooled_variance": "noise.batch_tests",
    "SfoComplexity": "runs.sfo",
    "joint_critical_batch": "runs.sfo",
    "curvature": "hessian.curvature",
    "Curvature": "hessian.curvature",
    "cauchy_learning_rate": "hessian.cauchy",
    "fit_spike": "hessian.stability_limit",
    "SpikeFit": "hessian.stability_limit",
    "rate_ceiling": "hessian.stability_limit",
    "max_stable_lr": "course.contraction",
    "weight_decay_grid": "course.decay_grid",
    "DecayChoice": "course.decay_grid",
    "coordinate_check": "course.coordinate_check",
    "CoordinateCheck": "course.coordinate_check",
    "lr_range": "course.learning_rate",
    "RangeTest": "course.learning_rate",
    "Cycle": "course.learning_rate",
    "find_micro_batch": "memory.micro_batch",
    "MicroBatch": "memory.size_finder",
    "MicroBatchTable": "memory.buckets",
    "throughput": "speed.step_time",
    "Throughput": "speed.step_time",
    "Energy": "energy.energy",
    "EnergyUse": "energy.energy_use",
    "compare_energy": "energy.energy_study",
    "EnergyStudy": "energy.energy_study",
    "TrainResult": "energy.energy_study",
    "MachineMeter": "energy.energy_meters",
    "AdamStability": "course.adam_stability",
    "expected_variance": "course.adam_update",
    "WeightDistance": "course.weight_distance",
    "Diffusion": "course.diffusion",
    "landscape": "surface.landscape",
    "Landscape": "surface.landscape",
    "random_direction": "surface.directions",
    "interpolate": "surface.interpolation",
    "pca_trajectory": "surface.trajectory",
    "project_trajectory": "surface.trajectory",
    "hessian_map": "surface.convexity",
    "HessianMap": "surface.convexity",
    "Findings": "findings",
}

__all__ = [*_HOME]

__getattr__, __dir__ = hand_on(__name__, _HOME)
