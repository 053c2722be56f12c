"""Optimizers for large batches, and averages of weights.

This module only hands on the public names, each loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchlab.core.handing_on import hand_on

if TYPE_CHECKING:
    from batchlab.optim.adagrad_norm import AdaGradNorm as AdaGradNorm
    from batchlab.optim.ademamix import AdEMAMix as AdEMAMix
    from batchlab.optim.adversarial.concurrent_adversarial import ConcurrentAdversarial as ConcurrentAdversarial
    from batchlab.optim.adversarial.dual_batchnorm import convert_dual_batchnorm as convert_dual_batchnorm
    from batchlab.optim.agvm.agvm import AGVM as AGVM
    from batchlab.optim.agvm.module_groups import groups_by_module as groups_by_module
    from batchlab.optim.average import WeightAverage as WeightAverage
    from batchlab.optim.by_name import create as create
    from batchlab.optim.by_name import groups as groups
    from batchlab.optim.came import CAME as CAME
    from batchlab.optim.diloco.diloco import DiLoCo as DiLoCo
    from batchlab.optim.egn.egn import EGN as EGN
    from batchlab.optim.lamb import LAMB as LAMB
    from batchlab.optim.lamb import lamb_schedule as lamb_schedule
    from batchlab.optim.lars import LARS as LARS
    from batchlab.optim.learned.learned import LearnedOptimizer as LearnedOptimizer
    from batchlab.optim.lion import Lion as Lion
    from batchlab.optim.mars import MARS as MARS
    from batchlab.optim.mkor.mkor import MKOR as MKOR
    from batchlab.optim.mt_adamw import MTAdamW as MTAdamW
    from batchlab.optim.muon import DMuon as DMuon
    from batchlab.optim.muon import Muon as Muon
    from batchlab.optim.muon import muon_groups as muon_groups
    from batchlab.optim.signum import Signum as Signum
    from batchlab.optim.vrgd.optimizers import VRLAMB as VRLAMB
    from batchlab.optim.vrgd.optimizers import VRLARS as VRLARS
    from batchlab.optim.vrgd.optimizers import VRSGD as VRSGD
    from batchlab.optim.vrgd.optimizers import VRAdam as VRAdam
    from batchlab.optim.vrgd.vrgd import VRGradient as VRGradient

_HOME = {
    "AdaGradNorm": "adagrad_norm",
    "AdEMAMix": "ademamix",
    "AGVM": "agvm.agvm",
    "WeightAverage": "average",
    "CAME": "came",
    "ConcurrentAdversarial": "adversarial.concurrent_adversarial",
    "create": "by_name",
    "groups": "by_name",
    "DiLoCo": "diloco.diloco",
    "convert_dual_batchnorm": "adversarial.dual_batchnorm",
    "EGN": "egn.egn",
    "LAMB": "lamb",
    "lamb_schedule": "lamb",
    "LARS": "lars",
    "LearnedOptimizer": "learned.learned",
    "Lion": "lion",
    "MARS": "mars",
    "MKOR": "mkor.mkor",
    "groups_by_module": "agvm.module_groups",
    "MTAdamW": "mt_adamw",
    "DMuon": "muon",
    "Muon": "muon",
    "muon_groups": "muon",
    "Signum": "signum",
    "VRGradient": "vrgd.vrgd",
    "VRLAMB": "vrgd.optimizers",
    "VRLARS": "vrgd.optimizers",
    "VRSGD": "vrgd.optimizers",
    "VRAdam": "vrgd.optimizers",
}

__all__ = [*_HOME]

__getattr__, __dir__ = hand_on(__name__, _HOME)
