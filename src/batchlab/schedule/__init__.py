"""What the learning rate and the batch are along a run, counted in examples or tokens.

This module only hands on the public names, each loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchlab.core.handing_on import hand_on

if TYPE_CHECKING:
    from batchlab.schedule.batch_doubling import BatchDoubling as BatchDoubling
    from batchlab.schedule.batch_doubling import equivalent_lr as equivalent_lr
    from batchlab.schedule.batch_doubling import falcon2_doubling as falcon2_doubling
    from batchlab.schedule.batch_doubling import noise_floor as noise_floor
    from batchlab.schedule.batch_ramp import BatchRamp as BatchRamp
    from batchlab.schedule.batch_ramp import falcon_mamba_ramp as falcon_mamba_ramp
    from batchlab.schedule.by_examples import lr_factor as lr_factor
    from batchlab.schedule.controller import BatchController as BatchController
    from batchlab.schedule.controller import StepFacts as StepFacts
    from batchlab.schedule.counted import Counted as Counted
    from batchlab.schedule.decay_by_batch import DecayByBatch as DecayByBatch
    from batchlab.schedule.goodput_batch import GoodputBatch as GoodputBatch
    from batchlab.schedule.inner_product_test_batch import InnerProductTestBatch as InnerProductTestBatch
    from batchlab.schedule.milestones import Milestones as Milestones
    from batchlab.schedule.multigrid import Multigrid as Multigrid
    from batchlab.schedule.multigrid import MultigridLR as MultigridLR
    from batchlab.schedule.noise_scale_batch import NoiseScaleBatch as NoiseScaleBatch
    from batchlab.schedule.norm_test_batch import NormTestBatch as NormTestBatch
    from batchlab.schedule.norm_test_batch import check_no_batch_norm as check_no_batch_norm
    from batchlab.schedule.one_cycle import OneCycle as OneCycle
    from batchlab.schedule.power import Power as Power
    from batchlab.schedule.power import fit_power_law as fit_power_law
    from batchlab.schedule.power import power_rate as power_rate
    from batchlab.schedule.progressive_weight_decay import Phase as Phase
    from batchlab.schedule.progressive_weight_decay import ProgressiveWeightDecay as ProgressiveWeightDecay
    from batchlab.schedule.progressive_weight_decay import decay_per_token as decay_per_token
    from batchlab.schedule.progressive_weight_decay import equal_phases as equal_phases
    from batchlab.schedule.regime_adaptation import RegimeAdaptation as RegimeAdaptation
    from batchlab.schedule.regime_adaptation import adapt_regime as adapt_regime
    from batchlab.schedule.stages import Stage as Stage
    from batchlab.schedule.stages import Stages as Stages
    from batchlab.schedule.stages import falcon2_stages as falcon2_stages
    from batchlab.schedule.wsd import WSD as WSD
    from batchlab.schedule.wsd import wsd_share as wsd_share

_HOME = {
    "BatchDoubling": "batch_doubling",
    "equivalent_lr": "batch_doubling",
    "falcon2_doubling": "batch_doubling",
    "noise_floor": "batch_doubling",
    "BatchRamp": "batch_ramp",
    "falcon_mamba_ramp": "batch_ramp",
    "lr_factor": "by_examples",
    "BatchController": "controller",
    "StepFacts": "controller",
    "Counted": "counted",
    "DecayByBatch": "decay_by_batch",
    "GoodputBatch": "goodput_batch",
    "InnerProductTestBatch": "inner_product_test_batch",
    "Milestones": "milestones",
    "Multigrid": "multigrid",
    "MultigridLR": "multigrid",
    "NoiseScaleBatch": "noise_scale_batch",
    "NormTestBatch": "norm_test_batch",
    "check_no_batch_norm": "norm_test_batch",
    "OneCycle": "one_cycle",
    "Power": "power",
    "fit_power_law": "power",
    "power_rate": "power",
    "Phase": "progressive_weight_decay",
    "ProgressiveWeightDecay": "progressive_weight_decay",
    "decay_per_token": "progressive_weight_decay",
    "equal_phases": "progressive_weight_decay",
    "RegimeAdaptation": "regime_adaptation",
    "adapt_regime": "regime_adaptation",
    "Stage": "stages",
    "Stages": "stages",
    "falcon2_stages": "stages",
    "WSD": "wsd",
    "wsd_share": "wsd",
}

__all__ = [*_HOME]

__getattr__, __dir__ = hand_on(__name__, _HOME)
