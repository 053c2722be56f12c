"""Cutting a clip or picture to a shape of multigrid training: coarser sampling of the same extent, not less of it.

Fewer frames are drawn at larger strides, up to the default clip's span; a smaller crop comes from a picture that may be
scaled down further (Wu et al. 2020, arXiv 1912.00998, with the ranges of the code released).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.schedule.grids.multigrid_cycles import GridShape, scale_range, stride_range


def resample(
    x: Tensor,
    sizes: Sequence[int],
    default: Sequence[int],
    *,
    scales: tuple[int, int] | None = None,
    stride: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A random piece of (C, T, H, W) or (C, H, W), of the shape (C, *sizes).

    default: the full sizes, to which scales and stride belong. Frames: one of `stride_range`'s strides that the clip is
    long enough for, and a start, both uniform. Pixels: the short side scaled (bilinear, with antialiasing) to a number
    drawn from `scale_range`, then a crop at a uniform place; H and W are then reckoned by the first of them. scales
    None: the whole picture is scaled to the crop's size, which keeps the extent exactly.
    generator: torch's global one of the CPU by default, which a `DataLoader` seeds for each worker and epoch.

    >>> clip = torch.randn(3, 32, 40, 50)
    >>> resample(clip, (4, 16, 16), (16, 32, 32), scales=(36, 40), stride=2).shape
    torch.Size([3, 4, 16, 16])
    """
    if len(sizes) not in (2, 3) or len(default) != len(sizes) or x.ndim != len(sizes) + 1:
        raise InputError(
            f"x must have channels and one axis for each of 2 or 3 sizes and defaults, got {tuple(x.shape)}, "
            f"{tuple(sizes)} and {tuple(default)}"
        )
    for size in (*sizes, *default):
        check_count(sizes=size)
    if len(sizes) == 3:
        x = _frames(x, sizes[0], *stride_range(stride, sizes[0], default[0]), generator)
    height, width = sizes[-2:]
    if scales is None:
        return _scaled(x, height, width)
    low, high = scale_range(scales, height, default[-2])
    short = _draw(low, high, generator)
    ratio = short / min(x.shape[-2:])
    h, w = (short if side == min(x.shape[-2:]) else int(side * ratio) for side in x.shape[-2:])
    if h < height or w < width:
        raise InputError(f"scales must not be below the crop {height} x {width}, got {short} of {scales}")
    x = _scaled(x, h, w)
    top, left = _draw(0, h - height, generator), _draw(0, w - width, generator)
    return x[..., top : top + height, left : left + width]


def _frames(x: Tensor, frames: int, low: int, high: int, generator: torch.Generator | None) -> Tensor:
    fits = (x.shape[1] - 1) // (frames - 1) if frames > 1 else high
    if x.shape[1] < frames or fits < low:
        raise InputError(f"x must have {(frames - 1) * low + 1} frames at stride {low}, got {x.shape[1]}")
    stride = _draw(low, min(high, fits), generator)
    start = _draw(0, x.shape[1] - (frames - 1) * stride - 1, generator)
    return x[:, start : start + (frames - 1) * stride + 1 : stride]


def _scaled(x: Tensor, height: int, width: int) -> Tensor:
    if tuple(x.shape[-2:]) == (height, width):
        return x
    flat = x.flatten(0, -3)[None]
    scaled = F.interpolate(flat, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return scaled[0].view(*x.shape[:-2], height, width)


def _draw(low: int, high: int, generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(low, high + 1, (), generator=generator, device=device))


class Resampled(Dataset[tuple[Any, ...]]):
    """A data set of (tensor, ...) examples that takes `(index, GridShape)` and gives the tensor cut to the shape.

    default, scales, stride: as of `resample`; a plain index gives the example at the default sizes, as to evaluate.
    """

    def __init__(
        self, data: Any, default: Sequence[int], *, scales: tuple[int, int] | None = None, stride: int = 1
    ) -> None:
        self.data, self.default, self.scales, self.stride = data, tuple(default), scales, stride

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | tuple[int, GridShape]) -> tuple[Any, ...]:
        at, sizes = (index[0], index[1].sizes) if isinstance(index, tuple) else (index, self.default)
        x, *rest = self.data[at]
        return (resample(x, sizes, self.default, scales=self.scales, stride=self.stride), *rest)
