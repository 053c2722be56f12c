"""What the learning rate and the batch are along a run, counted in examples or tokens.

This module only hands on the public names, each loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchlab.core.handing_on import hand_on

if TYPE_CHECKING:
    from batchlab.schedule.batches.batch_doubling import BatchDoubling as BatchDoubling
    from batchlab.schedule.batches.batch_doubling import equivalent_lr as equivalent_lr
    from batchlab.schedule.batches.batch_doubling import falcon2_doubling as falcon2_doubling
    from batchlab.schedule.batches.batch_doubling import noise_floor as noise_floor
    from batchlab.schedule.batches.batch_ramp import BatchRamp as BatchRamp
    from batchlab.schedule.batches.batch_ramp import falcon_mamba_ramp as falcon_mamba_ramp
    from batchlab.schedule.batches.controller import BatchController as BatchController
    from batchlab.schedule.batches.controller import StepFacts as StepFacts
    from batchlab.schedule.batches.decay_by_batch import DecayByBatch as DecayByBatch
    from batchlab.schedule.batches.goodput_batch import GoodputBatch as GoodputBatch
    from batchlab.schedule.batches.inner_product_test_batch import InnerProductTestBatch as InnerProductTestBatch
    from batchlab.schedule.batches.milestones import Milestones as Milestones
    from batchlab.schedule.batches.noise_scale_batch import NoiseScaleBatch as NoiseScaleBatch
    from batchlab.schedule.batches.norm_test_batch import NormTestBatch as NormTestBatch
    from batchlab.schedule.batches.norm_test_batch import check_no_batch_norm as check_no_batch_norm
    from batchlab.schedule.batches.stages import Stage as Stage
    from batchlab.schedule.batches.stages import Stages as Stages
    from batchlab.schedule.batches.stages import falcon2_stages as falcon2_stages
    from batchlab.schedule.grids.multigrid import Multigrid as Multigrid
    from batchlab.schedule.grids.multigrid import MultigridLR as MultigridLR
    from batchlab.schedule.rates.by_examples import lr_factor as lr_factor
    from batchlab.schedule.rates.counted import Counted as Counted
    from batchlab.schedule.rates.one_cycle import OneCycle as OneCycle
    from batchlab.schedule.rates.power import Power as Power
    from batchlab.schedule.rates.power import fit_power_law as fit_power_law
    from batchlab.schedule.rates.power import power_rate as power_rate
    from batchlab.schedule.rates.progressive_weight_decay import Phase as Phase
    from batchlab.schedule.rates.progressive_weight_decay import ProgressiveWeightDecay as ProgressiveWeightDecay
    from batchlab.schedule.rates.progressive_weight_decay import decay_per_token as decay_per_token
    from batchlab.schedule.rates.progressive_weight_decay import equal_phases as equal_phases
    from batchlab.schedule.rates.regime_adaptation import RegimeAdaptation as RegimeAdaptation
    from batchlab.schedule.rates.regime_adaptation import adapt_regime as adapt_regime
    from batchlab.schedule.rates.wsd import WSD as WSD
    from batchlab.schedule.rates.wsd import wsd_share as wsd_share

_HOME = {
    "BatchDoubling": "batches.batch_doubling",
    "equivalent_lr": "batches.batch_doubling",
    "falcon2_doubling": "batches.batch_doubling",
    "noise_floor": "batches.batch_doubling",
    "BatchRamp": "batches.batch_ramp",
    "falcon_mamba_ramp": "batches.batch_ramp",
    "BatchController": "batches.controller",
    "StepFacts": "batches.controller",
    "DecayByBatch": "batches.decay_by_batch",
    "GoodputBatch": "batches.goodput_batch",
    "InnerProductTestBatch": "batches.inner_product_test_batch",
    "Milestones": "batches.milestones",
    "NoiseScaleBatch": "batches.noise_scale_batch",
    "NormTestBatch": "batches.norm_test_batch",
    "check_no_batch_norm": "batches.norm_test_batch",
    "Stage": "batches.stages",
    "Stages": "batches.stages",
    "falcon2_stages": "batches.stages",
    "Multigrid": "grids.multigrid",
    "MultigridLR": "grids.multigrid",
    "lr_factor": "rates.by_examples",
    "Counted": "rates.counted",
    "OneCycle": "rates.one_cycle",
    "Power": "rates.power",
    "fit_power_law": "rates.power",
    "power_rate": "rates.power",
    "Phase": "rates.progressive_weight_decay",
    "ProgressiveWeightDecay": "rates.progressive_weight_decay",
    "decay_per_token": "rates.progressive_weight_decay",
    "equal_phases": "rates.progressive_weight_decay",
    "RegimeAdaptation": "rates.regime_adaptation",
    "adapt_regime": "rates.regime_adaptation",
    "WSD": "rates.wsd",
    "wsd_share": "rates.wsd",
}

__all__ = [*_HOME]

__getattr__, __dir__ = hand_on(__name__, _HOME)
