"""Giving all BatchNorms of a model one kind at a time: plain, split or synchronised, to and fro in mid-run."""

from __future__ import annotations

from typing import Any

from torch import nn

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.nn.parts import PLAIN, check_kinds, convert_plain_batchnorm
from batchlab.nn.split_batchnorm import SPLIT, convert_split_batchnorm

KINDS = ("plain", "split", "sync")


def set_batchnorm_kind(model: nn.Module, kind: str, number: int = 1, process_group: Any = None) -> nn.Module:
    """Makes every BatchNorm plain, split in `number` parts, or synchronised over `process_group`, in place.

    Parameters, statistics, hooks and names stay, and with them the optimizer's state; so does the place of each rank in
    a group. kind and number: as of `Multigrid.batch_norm`. process_group: this rank's group of `number` ranks, as
    `torch.distributed.new_subgroups(number)[0]` gives it; all ranks by default. PyTorch's synchronised layers run on
    accelerators alone. `nn.SyncBatchNorm` layers that were not made here are refused: what they were is not known.
    Returns the model.

    >>> model = nn.Sequential(nn.BatchNorm3d(4))
    >>> [type(set_batchnorm_kind(model, *rule)[0]).__name__ for rule in (("split", 4), ("sync", 2), ("plain", 1))]
    ['SplitBatchNorm3d', 'SyncBatchNorm', 'BatchNorm3d']
    """
    if kind not in KINDS:
        raise InputError(f"kind must be one of {list(KINDS)}, got {kind!r}")
    check_count(number=number)
    if kind == "split":
        check_kinds(model, (*SPLIT, *SPLIT.values(), nn.SyncBatchNorm))
    for name, layer in model.named_modules():
        if isinstance(layer, nn.SyncBatchNorm) and not hasattr(layer, "_was"):
            raise InputError(f"model must have no SyncBatchNorm of its own, got one at {name!r}")
    for layer in model.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            layer.__class__ = next(plain for plain in PLAIN if plain.__name__ == layer._was)  # type: ignore[assignment]
            del layer._was, layer.process_group
    if kind == "split":
        return convert_split_batchnorm(model, number)
    convert_plain_batchnorm(model)
    for layer in model.modules() if kind == "sync" else ():
        if type(layer) in PLAIN:
            layer.__dict__["_was"] = type(layer).__name__
            layer.__class__ = nn.SyncBatchNorm
            layer.process_group = process_group
    return model
