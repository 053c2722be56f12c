"""Layers whose work depends on the batch.

This module only hands on the public names, each loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchlab.core.handing_on import hand_on

if TYPE_CHECKING:
    from batchlab.nn.batchnorm_kind import set_batchnorm_kind as set_batchnorm_kind
    from batchlab.nn.ghost_batchnorm import GhostBatchNorm1d as GhostBatchNorm1d
    from batchlab.nn.ghost_batchnorm import GhostBatchNorm2d as GhostBatchNorm2d
    from batchlab.nn.ghost_batchnorm import GhostBatchNorm3d as GhostBatchNorm3d
    from batchlab.nn.ghost_batchnorm import convert_ghost_batchnorm as convert_ghost_batchnorm
    from batchlab.nn.ghost_batchnorm import ghost_batch_norm as ghost_batch_norm
    from batchlab.nn.parts import convert_plain_batchnorm as convert_plain_batchnorm
    from batchlab.nn.split_batchnorm import SplitBatchNorm1d as SplitBatchNorm1d
    from batchlab.nn.split_batchnorm import SplitBatchNorm2d as SplitBatchNorm2d
    from batchlab.nn.split_batchnorm import SplitBatchNorm3d as SplitBatchNorm3d
    from batchlab.nn.split_batchnorm import convert_split_batchnorm as convert_split_batchnorm
    from batchlab.nn.split_batchnorm import merge_statistics as merge_statistics

_HOME = {
    "set_batchnorm_kind": "batchnorm_kind",
    "GhostBatchNorm1d": "ghost_batchnorm",
    "GhostBatchNorm2d": "ghost_batchnorm",
    "GhostBatchNorm3d": "ghost_batchnorm",
    "convert_ghost_batchnorm": "ghost_batchnorm",
    "ghost_batch_norm": "ghost_batchnorm",
    "convert_plain_batchnorm": "parts",
    "SplitBatchNorm1d": "split_batchnorm",
    "SplitBatchNorm2d": "split_batchnorm",
    "SplitBatchNorm3d": "split_batchnorm",
    "convert_split_batchnorm": "split_batchnorm",
    "merge_statistics": "split_batchnorm",
}

__all__ = [*_HOME]

__getattr__, __dir__ = hand_on(__name__, _HOME)
