"""What batch normalisations over parts of a batch share: k parts through one call, and changing a layer's kind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchlab.core.errors import InputError

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

Layer = TypeVar("Layer", bound="OfParts")


class OfParts(_BatchNorm):
    """A BatchNorm whose batch is normalised in parts: stands before one of PyTorch's three in a class's bases."""

    def _leave(self) -> None:
        """Takes off what a plain BatchNorm has not."""
        raise NotImplementedError


def parts_at_once(
    x: Tensor,
    k: int,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    *,
    interleaved: bool,
) -> Tensor:
    """k parts of n/k examples of (n, C, ...) by one call, as if they were k·C channels; k divides n.

    mean, var: (k, C), contiguous, the parts' running statistics, moved in place, or None.
    interleaved: example i is in part i mod k, which is a view of a contiguous input and costs no copy; else the parts
    are consecutive, which costs a copy in and one out. The output has the input's memory format.
    """
    last = is_channels_last(x)
    rows = x.movedim(1, -1) if last else x
    shape = rows.shape[1:]
    split = rows.reshape(-1, k, *shape) if interleaved else rows.reshape(k, -1, *shape).transpose(0, 1)
    spread = split.movedim(1, -2) if last else split
    folded = spread.reshape(-1, k * x.shape[1]) if last else spread.flatten(1, 2)
    if len(folded) == 1:
        folded = folded.contiguous()  # PyTorch's gradient is wrong where the stride of a single example is odd
    mean, var = (None if s is None else s.view(-1) for s in (mean, var))
    weight, bias = (None if p is None else p.repeat(k) for p in (weight, bias))
    output = F.batch_norm(folded, mean, var, weight, bias, True, momentum, eps).view(spread.shape)
    back = output.movedim(-2, 1) if last else output
    back = (back if interleaved else back.transpose(0, 1)).reshape(rows.shape)
    return back.movedim(-1, 1) if last else back


def is_channels_last(x: Tensor) -> bool:
    """Whether its memory has channels innermost, as pictures or clips, and not in the plain order too."""
    return x.ndim in _LAST and not x.is_contiguous() and x.is_contiguous(memory_format=_LAST[x.ndim])


def is_batched(dy: Tensor) -> bool:
    """Whether it is a batch of gradients, from `is_grads_batched` or `vmap`, which cannot be written into slices."""
    wrapped = torch._C._functorch
    return wrapped.is_legacy_batchedtensor(dy) or wrapped.is_functorch_wrapped_tensor(dy)


def check_channels(input: Tensor, *others: Tensor | None) -> None:
    """Refuses what PyTorch's kernels would read beyond the end of. others: weight, bias, running_mean, running_var."""
    if input.ndim < 2:
        raise InputError(f"input must be (B, C, ...), got shape {tuple(input.shape)}")
    channels = input.shape[1:2]
    for place, given in enumerate(others):
        if given is not None and given.shape != channels:
            name = ("weight", "bias", "running_mean", "running_var")[place]
            expected, found = tuple(channels), tuple(given.shape)
            raise InputError(f"{name} must be of shape {expected}, as the input has channels, got {found}")


def change_kind(
    model: nn.Module, kinds: Mapping[type[nn.Module], type[Layer]], change: Callable[[Layer], None]
) -> nn.Module:
    """Makes each layer of a type that is a key of `kinds` one of the type that stands there, in place.

    The layers stay the objects they are: parameters, statistics, hooks, names and places. change: is called with each
    afterwards, and with layers that were of such a type already. Returns the model. Raises `InputError` for any other
    BatchNorm, before anything is changed.
    """
    check_kinds(model, (*kinds, *kinds.values()))
    for layer in model.modules():
        if type(layer) in kinds:
            layer.__class__ = kinds[type(layer)]
        if type(layer) in kinds.values():
            change(layer)  # type: ignore[arg-type]
    return model


def check_kinds(model: nn.Module, kinds: Collection[type[nn.Module]]) -> None:
    """Refuses a model with a BatchNorm of another type."""
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and type(layer) not in kinds:
            raise InputError(f"model must have no {type(layer).__name__}, got one at {name!r}: {_why(layer)}")


def _why(layer: nn.Module) -> str:
    if isinstance(layer, nn.SyncBatchNorm):
        return "it joins all ranks' batches, which is the contrary"
    if isinstance(layer, LazyModuleMixin):
        return "send a batch through it first"
    if isinstance(layer, OfParts):
        return "call convert_plain_batchnorm first"
    return "what its own class does would be lost"


def convert_plain_batchnorm(model: nn.Module) -> nn.Module:
    """Makes each ghost or split BatchNorm of the model a plain one again, in place; returns the model.

    >>> from batchlab.nn.ghost_batchnorm import GhostBatchNorm1d
    >>> convert_plain_batchnorm(GhostBatchNorm1d(4, ghost_size=32))
    BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    for layer in model.modules():
        if isinstance(layer, OfParts):
            layer._leave()
            layer.__class__ = next(base for base in type(layer).__mro__ if base in PLAIN)  # type: ignore[assignment]
    return model
