"""The optimizers that the contract holds: a new one joins by one line."""

from functools import partial

import torch

from batchlab.optim.adagrad_norm import AdaGradNorm
from batchlab.optim.ademamix import AdEMAMix
from batchlab.optim.came import CAME
from batchlab.optim.lamb import LAMB
from batchlab.optim.lars import LARS
from batchlab.optim.learned.learned import LearnedOptimizer
from batchlab.optim.learned.weights import fresh_weights
from batchlab.optim.lion import Lion
from batchlab.optim.mars import MARS
from batchlab.optim.mt_adamw import MTAdamW
from batchlab.optim.muon import DMuon, Muon
from batchlab.optim.signum import Signum
from batchlab.optim.vrgd.optimizers import VRLAMB, VRLARS, VRSGD, VRAdam
from tests.optim.grouped import in_groups, in_turn

LISTED = {
    "came": partial(CAME, lr=1e-3, weight_decay=0.1),
    "came_adafactor": partial(CAME, lr=1e-3, confidence=False),
    "adagrad_norm": partial(AdaGradNorm, lr=0.5),
    "muon": partial(Muon, lr=0.01, use_muon="matrices", ns_dtype=torch.float64),
    "dmuon": partial(DMuon, lr=0.01, ns_dtype=torch.float64),
    "mt_adamw": partial(in_turn(MTAdamW), lr=0.01, ratios={"a": 0.25, "b": 0.75}, weights={"a": 2.0, "b": 1.0}),
    "vr_sgd": partial(in_groups(VRSGD), lr=0.05, momentum=0.9),
    "vr_adam": partial(in_groups(VRAdam), lr=0.01, weight_decay=0.1),
    "vr_adam_raw": partial(in_groups(VRAdam), lr=0.01, second_moment="raw"),
    "vr_lars": partial(in_groups(VRLARS), lr=0.5),
    "vr_lamb": partial(in_groups(VRLAMB), lr=0.01, weight_decay=0.1),
    "vr_lamb_raw": partial(in_groups(VRLAMB), lr=0.01, second_moment="raw"),
    "lars": partial(LARS, lr=0.5),
    "lars_plain_momentum": partial(LARS, lr=0.5, lr_in_momentum=False, exclude_vectors=False),
    "ademamix": partial(AdEMAMix, lr=0.01, alpha_warmup=10, beta3_warmup=8, weight_decay=0.1),
    "lion": partial(Lion, lr=0.01, weight_decay=0.1),
    "mars": partial(MARS, lr=0.01, weight_decay=0.1),
    "signum": partial(Signum, lr=0.01, weight_decay=0.1),
    "signum_nesterov": partial(Signum, lr=0.01, nesterov=True),
    "lamb": partial(LAMB, lr=0.01, weight_decay=0.1),
    "lamb_clipped": partial(LAMB, lr=0.01, max_grad_norm=0.1, exclude_vectors=False, clamp=(0.0, 1.0)),
}
CASES = {
    **LISTED,
    "learned": partial(LearnedOptimizer, weights=fresh_weights(0)),
}
