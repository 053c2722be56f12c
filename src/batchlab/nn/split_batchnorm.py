"""Split batch normalisation: k parts of a batch with running statistics of their own, merged for evaluation.

Multigrid training (Wu et al. 2020, arXiv 1912.00998) normalises over 8 clips whatever the batch; the released SlowFast
code does it by this layer where a device has more. Example i is in part i mod k: a contiguous (n, C, ...) is viewed as
(n/k, k·C, ...) and goes through one BatchNorm of k·C channels. Its outputs in training are those of a ghost BatchNorm
with interleaved ghosts of n/k. What differs: the count of parts is fixed and not their size; each part has running
statistics of its own, moved once an update and not k times; and evaluation merges them as

    mean = (1/k)·Σ mean_i,    var = (1/k)·Σ var_i + (1/k)·Σ (mean_i - mean)²

The last term is the spread of the running means, which their average over updates has mostly removed.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.nn.parts import OfParts, change_kind, check_channels, parts_at_once


def merge_statistics(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """(k, C) means and variances of k equal parts as (C,) of all: the spread of the means belongs to the variance.

    >>> merge_statistics(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]]))
    (tensor([1.]), tensor([3.]))
    """
    merged = mean.mean(0)
    return merged, var.mean(0) + (mean - merged).square().mean(0)


class _SplitBatchNorm(OfParts):
    split_mean: Tensor
    split_var: Tensor
    _unmerged: int | None = None  # the merged statistics' version, where a pass ended before it merged the parts'

    def __init__(
        self,
        num_features: int,
        num_splits: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.set_splits(num_splits)

    def set_splits(self, num_splits: int) -> None:
        """From the next batch on so many parts, each of which begins with the merged statistics."""
        check_count(num_splits=num_splits)
        self.num_splits = num_splits
        if self.running_mean is not None and self.running_var is not None:
            for name, merged in (("split_mean", self.running_mean), ("split_var", self.running_var)):
                self.register_buffer(name, merged.detach().repeat(num_splits, 1))

    def _leave(self) -> None:
        del self.num_splits
        for name in ("split_mean", "split_var"):
            self._buffers.pop(name, None)
        self.__dict__.pop("_unmerged", None)

    def reset_running_stats(self) -> None:
        """All parts' too: `torch.optim.swa_utils.update_bn` calls it."""
        super().reset_running_stats()
        if self.track_running_stats and hasattr(self, "split_mean"):
            self.split_mean.zero_()
            self.split_var.fill_(1)

    def train(self, mode: bool = True) -> Self:
        """As of all modules; what activation checkpointing left out of the merged statistics joins them."""
        super().train(mode)
        if not mode and self._unmerged is not None and self._unmerged == self._written():
            self._merge()
        return self

    def _written(self) -> int:
        return 0 if self.running_mean is None else self.running_mean._version

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._unmerged is not None:  # a copy's tensors begin to count anew
            self._unmerged = self._written()

    def forward(self, input: Tensor) -> Tensor:
        """Of the input's shape: by the parts' statistics in training, as `nn.BatchNorm` in evaluation."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        check_channels(input, self.weight, self.bias, self.running_mean, self.running_var)
        k, n = self.num_splits, len(input)
        if not input.numel():
            return super().forward(input)
        if n % k or n // k * input[:1, :1].numel() < 2:
            raise InputError(f"each of {k} parts must have as many examples and 2 values a channel, got {n} examples")
        if k == 1:
            output: Tensor = super().forward(input)
        else:
            mean, var = (self.split_mean, self.split_var) if self._tracks() else (None, None)
            momentum = self._momentum()
            if self._tracks() and not torch.compiler.is_compiling():
                self._unmerged = self._written()
            output = parts_at_once(input, k, mean, var, self.weight, self.bias, momentum, self.eps, interleaved=True)
        self._merge()
        return output

    def _momentum(self) -> float:
        """Of this update, which is counted."""
        if not self._tracks() or self.num_batches_tracked is None:
            return 0.0
        self.num_batches_tracked.add_(1)
        return 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _tracks(self) -> bool:
        return self.track_running_stats and "split_mean" in self._buffers

    @torch.no_grad()
    def _merge(self) -> None:
        self._unmerged = None
        if self.running_mean is None or self.running_var is None or not self._tracks():
            return
        if self.num_splits == 1:
            self.split_mean.copy_(self.running_mean)
            self.split_var.copy_(self.running_var)
            return
        mean, var = merge_statistics(self.split_mean, self.split_var)
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A plain BatchNorm's state, or one of another number of parts, begins with merged statistics in each part."""
        if self.track_running_stats:
            for name, merged in (("split_mean", "running_mean"), ("split_var", "running_var")):
                given = state_dict.get(prefix + name)
                if (given is None or len(given) != self.num_splits) and prefix + merged in state_dict:
                    state_dict[prefix + name] = state_dict[prefix + merged].repeat(self.num_splits, 1)
            self._unmerged = None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """As of `nn.BatchNorm`, with the number of parts."""
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, num_splits={self.num_splits}"


class SplitBatchNorm1d(_SplitBatchNorm, nn.BatchNorm1d):
    """Split batch normalisation of (B, C) or (B, C, L); see `SplitBatchNorm3d`."""


class SplitBatchNorm2d(_SplitBatchNorm, nn.BatchNorm2d):
    """Split batch normalisation of (B, C, H, W); see `SplitBatchNorm3d`."""


class SplitBatchNorm3d(_SplitBatchNorm, nn.BatchNorm3d):
    """Split batch normalisation of (B, C, T, H, W): in training `num_splits` interleaved parts are normalised alone.

    num_features, eps, momentum, affine, track_running_stats: as of `nn.BatchNorm3d`. num_splits: k, which must divide
    each batch on this device; 1 is `nn.BatchNorm3d` bit for bit in what it gives.
    running_mean, running_var: merged after each batch in training, so that an evaluation never sees old ones. They are
    rank 0's under DDP. What else writes to them, to average them over ranks, say, holds until the next batch in
    training. With momentum None each part keeps its plain mean over updates.

    State: `nn.BatchNorm3d`'s, with split_mean and split_var of shape (k, C). A state of a plain layer or of another
    number of parts loads, the merged statistics for each part; plain layers load this one's with `strict=False`.

    Not where the size of a part shall stay as the batch changes: that is `GhostBatchNorm3d`.

    >>> layer = SplitBatchNorm3d(3, num_splits=2)
    >>> layer(torch.randn(4, 3, 2, 5, 5)).shape, layer.split_mean.shape
    (torch.Size([4, 3, 2, 5, 5]), torch.Size([2, 3]))
    """


SPLIT: dict[type[nn.Module], type[_SplitBatchNorm]] = {
    nn.BatchNorm1d: SplitBatchNorm1d,
    nn.BatchNorm2d: SplitBatchNorm2d,
    nn.BatchNorm3d: SplitBatchNorm3d,
}


def convert_split_batchnorm(model: nn.Module, num_splits: int) -> nn.Module:
    """Makes each BatchNorm of the model a split one, or gives a split one so many parts, in place; returns the model.

    Parameters, merged statistics, hooks and names stay; the optimizer's state is untouched. `convert_plain_batchnorm`
    leads back. Under DDP convert before wrapping where buffers are broadcast. Raises `InputError` for SyncBatchNorm,
    ghost and lazy layers, and subclasses with ways of their own.

    >>> convert_split_batchnorm(nn.Sequential(nn.BatchNorm2d(4)), 2)[0].num_splits
    2
    """
    check_count(num_splits=num_splits)
    return change_kind(model, SPLIT, lambda layer: layer.set_splits(num_splits))
