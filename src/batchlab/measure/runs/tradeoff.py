"""S(B) = S_min(1 + B_crit/B) from steps to target at several batch sizes: `curves.tradeoff_fit`, which rules share."""

from __future__ import annotations

from batchlab.curves.tradeoff_fit import Tradeoff, fit_tradeoff

__all__ = ["Tradeoff", "fit_tradeoff"]
