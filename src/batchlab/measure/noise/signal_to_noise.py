"""The gradient signal-to-noise ratio of each coordinate, r_j = (E g_j)²/Var(g_j) (Liu et al. 2020, 2001.07384).

From the mean gradients of k groups of examples (micro-batches, ranks), as Jiang et al. 2023 (2309.13681) take it:
r = gbar²/var, with gbar the mean over groups and var = mean (g_d - gbar)², not divided by k - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.parallel.shards import is_spread

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FEWEST_GROUPS, FEWEST_UNBIASED = 2, 4


@torch.no_grad()
def gsnr(
    gradients: Tensor, examples: Sequence[int] | None = None, *, unbiased: bool = False, normalise: bool = False
) -> Tensor:
    """r of each coordinate, from k >= 2 group gradients stacked along the first dimension; the other dimensions stay.

    gradients: each row the mean gradient over a group's examples. examples: how many are in each group, if they
    differ; the means are then weighted by them. In float32 at least. Where var = 0, r is 0 if gbar is 0 too, else inf.

    r is that of a group's mean: of one example it is r/m, with m examples in a group. For Gaussian gradients
    E[r] = (k·R + 1)/(k - 3), R being the truth: far too large for few groups, infinite for k <= 3. unbiased: returns
    ((k - 3)·r - 1)/k, whose mean is R exactly; it can be negative, and needs k >= 4. The paper has no such correction.
    normalise: divides by the mean over the tensor's finite r, as the paper does layer by layer; all 0 stay 0.

    The spread is large: at k = 8 a coordinate of pure noise exceeds r = 0.6 once in twelve times.

    >>> gsnr(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    tensor([4., inf])
    """
    if not isinstance(gradients, Tensor):
        raise InputError(f"gradients must be one tensor, stacked along its first dimension, got {gradients!r:.80}")
    if gradients.ndim < 1 or len(gradients) < FEWEST_GROUPS:
        raise InputError(f"gradients needs at least two groups along its first dimension, got {_shape(gradients)}")
    if not gradients.is_floating_point():
        raise InputError(f"gradients must be real floating-point numbers, got {gradients.dtype}")
    if is_spread(gradients):
        raise InputError("gradients must be a plain tensor, got a DTensor: each rank gives its part, .to_local()")
    if unbiased and normalise:
        raise InputError("unbiased ratios can be negative: they cannot be normalised to a mean of 1")
    sizes = [1] * len(gradients) if examples is None else list(examples)
    if len(sizes) != len(gradients):
        raise InputError(f"examples must name each of the {len(gradients)} groups, got {len(sizes)}")
    moments = Moments.like(gradients[0])
    for gradient, size in zip(gradients, sizes, strict=True):
        check_count(examples=size)
        moments.add(gradient, size)
    k, r = len(gradients), moments.ratio()
    if unbiased:
        if k < FEWEST_UNBIASED:
            raise InputError(f"an unbiased ratio needs at least {FEWEST_UNBIASED} groups, got {k}")
        return ((k - 3) * r - 1) / k
    return _normalised(r) if normalise else r


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _normalised(r: Tensor) -> Tensor:
    finite = r[r.isfinite()]
    mean = finite.mean() if finite.numel() else r.new_ones(())
    return r / mean if mean > 0 else r


class Moments:
    """The weighted mean of gradients and the weighted sum of squares about it (Welford), in float32 or float64."""

    def __init__(self, mean: Tensor, squares: Tensor) -> None:
        self.weight, self.mean, self.squares = 0.0, mean, squares

    @classmethod
    def like(cls, tensor: Tensor) -> Moments:
        """Without any group yet."""
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        mean = torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
        return cls(mean, torch.zeros_like(mean))

    def add(self, gradient: Tensor, weight: float, scale: float = 1.0) -> None:
        """One group's gradient, times `scale`."""
        dense = gradient.detach().to_dense() if gradient.layout != torch.strided else gradient.detach()
        self.weight += weight
        difference = dense.to(self.mean.dtype) * scale - self.mean
        self.mean.add_(difference, alpha=weight / self.weight)
        self.squares.addcmul_(difference, difference, value=weight * (1 - weight / self.weight))

    def skip(self, weight: float) -> None:
        """A group that gave this parameter no gradient: it counts as 0."""
        self.add(torch.zeros_like(self.mean), weight)

    def over_ranks(self, weight: float, group: dist.ProcessGroup | None) -> None:
        """Merges the groups of all ranks, of that weight together; every rank must call."""
        mean = self.mean * (self.weight / weight)
        dist.all_reduce(mean, group=group)
        self.squares.addcmul_(self.mean - mean, self.mean - mean, value=self.weight)
        dist.all_reduce(self.squares, group=group)
        self.weight, self.mean = weight, mean

    def ratio(self) -> Tensor:
        """gbar²/var; gbar is divided by the deviation first, so that small gradients do not vanish when squared."""
        deviation = (self.squares / self.weight).sqrt()
        r = (self.mean / deviation).square()
        return torch.where(deviation == 0, torch.where(self.mean == 0, 0.0, math.inf).to(r), r)


@dataclass(frozen=True)
class LayerGsnr(JsonNoun):
    """r over the coordinates of one parameter tensor, or of the whole model.

    mean: over its finite r. unbiased_mean: ((k - 3)·mean - 1)/k, free of the bias of few groups; NaN for k < 4.
    quantiles: at 5, 25, 50, 75 and 95 %, infinite r included. zeros, infinite: the shares of coordinates with r = 0
    and r = inf. of_sums: (|gbar|² - s²/k)/s² with s² the summed variance of the group means, unbiased above and below:
    the one ratio that few groups leave steady; over all layers it is the group size divided by the noise scale.
    """

    name: str
    coordinates: int
    mean: float
    unbiased_mean: float
    quantiles: tuple[float, ...]
    zeros: float
    infinite: float
    of_sums: float


@dataclass(frozen=True)
class Gsnr(JsonNoun):
    """One step's ratios: by parameter tensor, and of all coordinates (`whole`; its quantiles are not taken, and empty).

    groups: k. group_size: examples in a group, the mean where they differ. per: "group" where r is of a group's mean
    gradient, "sample" where it is of one example's.
    """

    layers: tuple[LayerGsnr, ...]
    whole: LayerGsnr
    groups: int
    group_size: float
    per: str = "group"

    def per_sample(self) -> Gsnr:
        """The same of one example's gradient: every r divided by the group size, r_sample = r_group/m."""
        if self.per == "sample":
            return self
        scale = 1 / self.group_size
        layers = tuple(_scaled(layer, scale) for layer in self.layers)
        return replace(self, layers=layers, whole=_scaled(self.whole, scale), per="sample")


def _scaled(layer: LayerGsnr, scale: float) -> LayerGsnr:
    return replace(
        layer,
        mean=layer.mean * scale,
        unbiased_mean=layer.unbiased_mean * scale,
        quantiles=tuple(value * scale for value in layer.quantiles),
        of_sums=layer.of_sums * scale,
    )


class Sums(NamedTuple):
    """Of r over its finite values, counts of coordinates, |gbar|² and Σvar: what adds up over tensors."""

    finite: float
    counted: int
    coordinates: int
    zeros: int
    infinite: int
    signal: float
    noise: float


def summed(r: Tensor, moments: Moments) -> Sums:
    """What adds up, of one tensor."""
    finite = r[r.isfinite()].double()
    lost = bool(r.isnan().any())
    return Sums(
        finite=math.nan if lost else float(finite.sum()),
        counted=finite.numel(),
        coordinates=r.numel(),
        zeros=int((r == 0).sum()),
        infinite=int(r.isinf().sum()),
        signal=float(moments.mean.double().square().sum()),
        noise=float(moments.squares.double().sum()) / moments.weight,
    )


def layer_of(name: str, sums: Sums, groups: int, quantiles: tuple[float, ...]) -> LayerGsnr:
    """The summary of one tensor, or of several by their added sums."""
    mean = sums.finite / sums.counted if sums.counted else math.nan
    variance = sums.noise * groups / (groups - 1)
    signal = sums.signal - variance / groups
    return LayerGsnr(
        name,
        sums.coordinates,
        mean,
        ((groups - 3) * mean - 1) / groups if groups >= FEWEST_UNBIASED else math.nan,
        quantiles,
        sums.zeros / sums.coordinates,
        sums.infinite / sums.coordinates,
        signal / variance if variance > 0 else math.inf if signal > 0 else math.nan,
    )


def quantiles_of(r: Tensor) -> tuple[float, ...]:
    """The smallest r that the given share of coordinates does not exceed."""
    if r.isnan().any():
        return (math.nan,) * len(QUANTILES)
    ordered = r.flatten().sort().values
    places = [max(0, math.ceil(q * len(ordered)) - 1) for q in QUANTILES]
    return tuple(ordered[places].tolist())
