"""How one number moves with batch size: pure functions on numbers, each with its source and where it holds.

Each module is loaded when it is first used: `rules.fit` alone needs SciPy's optimizers, which take half a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchlab.core.handing_on import hand_on

if TYPE_CHECKING:
    from batchlab.rules import adam as adam
    from batchlab.rules import batch as batch
    from batchlab.rules import ema as ema
    from batchlab.rules import fit as fit
    from batchlab.rules import gradient_norm as gradient_norm
    from batchlab.rules import learning_rate as learning_rate
    from batchlab.rules import loss as loss
    from batchlab.rules import mup as mup
    from batchlab.rules import published as published
    from batchlab.rules import ratio as ratio
    from batchlab.rules import tradeoff as tradeoff
    from batchlab.rules import weight_decay as weight_decay
    from batchlab.rules.adam import adam_for_batch as adam_for_batch
    from batchlab.rules.token_batch import TokenBatch as TokenBatch

_MODULES = (
    "adam",
    "batch",
    "ema",
    "fit",
    "gradient_norm",
    "learning_rate",
    "loss",
    "mup",
    "published",
    "ratio",
    "tradeoff",
    "weight_decay",
)
_HOME = {"adam_for_batch": "adam", "TokenBatch": "token_batch"}

__all__ = [*_MODULES, *_HOME]

__getattr__, __dir__ = hand_on(__name__, _HOME, _MODULES)
