"""The optimizers that the contract holds: a new one joins by one line."""

from functools import partial

from batchlab.optim.ademamix import AdEMAMix
from batchlab.optim.lamb import LAMB
from batchlab.optim.lars import LARS
from batchlab.optim.lion import Lion
from batchlab.optim.mars import MARS
from batchlab.optim.signum import Signum

LISTED = {
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
CASES = dict(LISTED)
