"""How one number moves with batch size: pure functions on numbers, each with its source and where it holds."""

from batchlab.rules import adam, ema, fit, gradient_norm, learning_rate, loss, mup, ratio, tradeoff, weight_decay
from batchlab.rules.adam import adam_for_batch

__all__ = [
    "adam",
    "adam_for_batch",
    "ema",
    "fit",
    "gradient_norm",
    "learning_rate",
    "loss",
    "mup",
    "ratio",
    "tradeoff",
    "weight_decay",
]
