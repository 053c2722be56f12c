"""The optimizers that the contract holds: a new one joins by one line."""

from functools import partial

from batchlab.optim.lamb import LAMB
from batchlab.optim.lars import LARS

LISTED = {
    "lars": partial(LARS, lr=0.5),
    "lars_plain_momentum": partial(LARS, lr=0.5, lr_in_momentum=False, exclude_vectors=False),
    "lamb": partial(LAMB, lr=0.01, weight_decay=0.1),
    "lamb_clipped": partial(LAMB, lr=0.01, max_grad_norm=0.1, exclude_vectors=False, clamp=(0.0, 1.0)),
}
CASES = dict(LISTED)
