"""The rule of convolutions (see `layer_rules`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from batchlab.measure.examples.factors import Factors, Piece
from batchlab.measure.examples.layer_uses import Layout, Part, Uses, channels, is_source, summed


def conv(
    uses: Uses,
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> None:
    w, b, n, spatial = uses.view(weight), uses.view(bias), uses.examples, weight.ndim - 2
    whole = (w is None or w.part.dim is None) and input.ndim == weight.ndim and len(out) % n == 0
    if not (w or b) or not whole:
        return
    stride, dilation = (_each(value, spatial) for value in (stride, dilation))
    sides = pad_for(padding if isinstance(padding, str) else _each(padding, spatial), weight.shape[2:], dilation)
    a, frames, kernel = input.detach() if w else None, len(out) // n, weight.shape[2:]

    def pieces(g: Tensor) -> Iterable[tuple[Part, Piece]]:
        if b:
            yield b.part, summed(channels(n)(g))
        if w and a is not None:
            places, rows = math.prod(g.shape[2:]), weight.shape[0] // groups
            columns = math.prod(weight.shape[1:])

            def chunk(start: int, stop: int) -> tuple[Tensor, Tensor]:
                after = g[start * frames : stop * frames].reshape(-1, groups, rows, places).mT
                patches = unfold(padded(a[start * frames : stop * frames], sides), kernel, stride, dilation)
                split = patches.reshape(len(patches), groups, -1, *patches.shape[2:])
                before = split.transpose(2, 3).flatten(3)
                return _frames(after, frames), _frames(before, frames)

            size = 4 * groups * frames * places * (rows + 2 * columns)
            yield w.part, Factors(n, groups, frames * places, rows, columns, chunk, bytes=size)

    parts = [view.part for view in (w, b) if view]
    uses.use(out, "conv", parts, Layout(n), pieces, is_source(input))


def _frames(tensor: Tensor, frames: int) -> Tensor:
    """[c·frames, groups, L, k] to [c, groups, frames·L, k]."""
    if frames == 1:
        return tensor
    return tensor.reshape(-1, frames, *tensor.shape[1:]).transpose(1, 2).flatten(2, 3)


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * count if len(values) == 1 else values


def unfold(input: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """The patches [N, C, L, ∏kernel] of a padded input [N, C, *spatial], in the order of a convolution's output."""
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        input = input.unfold(2 + dim, gap * (size - 1) + 1, step)[..., ::gap]
    spatial = len(kernel)
    return input.reshape(*input.shape[:2], math.prod(input.shape[2 : 2 + spatial]), math.prod(kernel))


def pad_for(padding: str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """What `torch.nn.functional.pad` needs, the last dimension first."""
    sides: list[int] = []
    for dim in reversed(range(len(kernel))):
        if padding == "valid":
            sides += [0, 0]
        elif padding == "same":
            both = dilation[dim] * (kernel[dim] - 1)
            sides += [both // 2, both - both // 2]
        else:
            sides += [int(padding[dim])] * 2
    return sides


def padded(input: Tensor, sides: list[int]) -> Tensor:
    """With zeros on its sides."""
    return F.pad(input, sides) if any(sides) else input
