"""The rules of normalisation layers (see `layer_rules`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.measure.examples.factors import Dense, Piece, wide
from batchlab.measure.examples.layer_uses import Layout, Part, Uses, channels, is_source, layout_of, scaled, summed


def _affine(
    uses: Uses,
    out: Tensor,
    name: str,
    input: Tensor,
    weight: Any,
    bias: Any,
    fold: Callable[[Tensor], Tensor],
    normalise: Callable[[Tensor], Tensor],
) -> None:
    """out = weight·normalise(input) + bias; fold brings a tensor to [n, T, *weight.shape]."""
    w, b = uses.view(weight), uses.view(bias)
    parts = [view.part for view in (w, b) if view]
    if not parts:
        return
    a = input.detach()

    def pieces(g: Tensor) -> Iterable[tuple[Part, Piece]]:
        return scaled(wide(fold(g)), lambda: fold(normalise(wide(a))), w, b)

    uses.use(out, name, parts, Layout(uses.examples), pieces, is_source(input))


def layer_norm(
    uses: Uses,
    out: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> None:
    _last_dims(uses, out, "layer_norm", input, normalized_shape, weight, bias, eps)


def rms_norm(
    uses: Uses,
    out: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> None:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    _last_dims(uses, out, "rms_norm", input, normalized_shape, weight, None, eps)


def _last_dims(
    uses: Uses, out: Tensor, name: str, input: Tensor, shape: list[int], weight: Any, bias: Any, eps: float
) -> None:
    layout = layout_of(out.shape[: out.ndim - len(shape)], uses.examples, second=uses.second)
    w, b = uses.view(weight), uses.view(bias)
    if layout is None or not (w or b):
        return
    a, features = input.detach(), len(shape)
    kept = layer_statistics(out) if name == "layer_norm" else None

    def pieces(g: Tensor) -> Iterable[tuple[Part, Piece]]:
        after = wide(layout.fold(g, features))
        if b:
            yield b.part, summed(after)
        if w:
            before = wide(layout.fold(a, features)).flatten(2)
            if name == "rms_norm":
                mean, r = None, (before.square().mean(2, keepdim=True) + eps).rsqrt()
            elif kept is not None:
                mean, r = (layout.fold(each, features).flatten(2).to(before.dtype) for each in kept)
            else:
                variance, mean = torch.var_mean(before, 2, correction=0, keepdim=True)
                r = (variance + eps).rsqrt()
            rows = scale_rows(after.flatten(2), before, mean, r)
            yield w.part, Dense(rows.reshape(uses.examples, *shape), after)

    uses.use(out, name, [view.part for view in (w, b) if view], layout, pieces, is_source(input))


def layer_statistics(out: Tensor) -> tuple[Tensor, Tensor] | None:
    """The mean and 1/σ that a layer norm's forward pass kept for its backward pass, each feature dimension 1.

    None where hooks are on what is saved: under checkpointing each reading would run the block anew.
    """
    node: Any = out.grad_fn
    if node is None or node.name() != "NativeLayerNormBackward0":
        return None
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(""):  # which raises where there are some
            return node._saved_result1, node._saved_result2
    except RuntimeError:
        return None


def scale_rows(g: Tensor, x: Tensor, mean: Tensor | None, r: Tensor) -> Tensor:
    """Σ_t g·(x - μ)·r, [n, F], which is example i's gradient of the scale of a norm over F; x̂ itself is not made.

    g, x: [n, T, F]. mean, r: [n, T, 1].
    """
    centred = g * x if mean is None else (x - mean).mul_(g)
    return torch.bmm(r.mT, centred).squeeze(1)


def group_norm(
    uses: Uses,
    out: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> None:
    if len(out) % uses.examples == 0:
        fold = channels(uses.examples)
        _affine(uses, out, "group_norm", input, weight, bias, fold, lambda a: F.group_norm(a, num_groups, eps=eps))


def instance_norm(
    uses: Uses,
    out: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    if len(out) % uses.examples:
        return
    if use_input_stats:
        fold = channels(uses.examples)
        _affine(uses, out, "instance_norm", input, weight, bias, fold, lambda a: F.instance_norm(a, eps=eps))
    else:
        _by_statistics(uses, out, "instance_norm", input, running_mean, running_var, weight, bias, eps)


def batch_norm(
    uses: Uses,
    out: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    if training or running_mean is None:
        raise InputError(
            "batch normalisation over the batch was called: there an example has no gradient of its own; use the "
            "running statistics (eval mode) or another normalisation"
        )
    if len(out) % uses.examples == 0:
        _by_statistics(uses, out, "batch_norm", input, running_mean, running_var, weight, bias, eps)


def _by_statistics(
    uses: Uses, out: Tensor, name: str, input: Tensor, mean: Any, var: Any, weight: Any, bias: Any, eps: float
) -> None:
    def normalise(a: Tensor) -> Tensor:
        return F.batch_norm(a, mean.to(a.dtype), var.to(a.dtype), training=False, eps=eps)

    _affine(uses, out, name, input, weight, bias, channels(uses.examples), normalise)
