"""The noise scale in an optimizer's own geometry: l1 for sign descent, nuclear for spectral descent (2602.03001).

Descent along a norm's steepest direction lowers the loss by at least |G|_* - 2·E|g_B - G|_* per unit of step, |.|_*
being the dual norm, G the true gradient and g_B that of a batch. For B independent examples Jensen gives

    sign:      E|g_B - G|_1   <= Σ_j σ_j/√B                    σ_j the deviation of coordinate j, of one example
    spectral:  E|g_B - G|_nuc <= Σ_layers tr (E ΔᵀΔ)^½/√B      Δ = g - G of one example, on the shorter side

The noise scale is where that bound equals |G|_*: B = (noise/|G|_*)², noise being the numerator. With |.|_2 it is
tr(Σ)/|G|², McCandlish's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from batchlab.core.checks import is_count
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.measure.ratio import RatioOfMeans

Stacks = Sequence[Tensor] | Mapping[str, Tensor]
Geometry = Literal["sign", "spectral", "euclidean"]
GEOMETRIES = ("sign", "spectral", "euclidean")
_NOT_IN_IT = "spectral geometry needs a tensor of two or more dimensions; there is none"


class DualNormParts(NamedTuple):
    """Of one step. noise: of one example, in the dual norm. signal: |gbar|_*, whose mean is above |G|_*.

    signal_low: each group's gradient against the direction that the other groups would step in; its mean is below
    |G|_*, and it can be negative.
    """

    noise: float
    signal: float
    signal_low: float


def dual_norm_noise(
    steps: Iterable[Stacks],
    examples: int | Sequence[int],
    geometry: Geometry = "sign",
    *,
    ema: float | None = None,
    coverage: float = 0.95,
) -> Estimate:
    """The noise scale in examples, from the group gradients of one or more steps: see `DualNormNoise`.

    steps: for each, the tensors' group gradients, stacked along the first dimension, in a list or by name, as
    `group_gradients` gives them.
    """
    noise = DualNormNoise(geometry, ema=ema, coverage=coverage)
    for gradients in steps:
        noise.update(gradients, examples)
    return noise.estimate()


class DualNormNoise:
    """Gathers (noise, signal) over steps and gives (mean noise/mean signal)², in examples.

    geometry: "sign" for sign descent (signSGD, Signum, Lion), "spectral" for spectral descent (Muon), "euclidean" for
    SGD. In the spectral one a tensor of more dimensions is the matrix (first, all others), and vectors are left out.
    ema, coverage: as in `RatioOfMeans`.

    Published: the definitions, and that batches grown in proportion to them kept the loss of Signum and Muon with up to
    66 % fewer steps at 160 M parameters; its batch is the noise scale over θ², θ = 0.6. Tested here: unbiasedness,
    closed forms, and coverage on Gaussian gradients. That it predicts a critical batch size better than the Euclidean
    one is a claim under test (benchmarks/dual_norm_claim.py), so far not borne out in general. Of sign descent on
    quadratics its ratio to the measured one varied less, by a factor of 1.5 about its median against 2.4; of Muon not,
    1.7 against 1.6. On digits it was 1.6 and 1.4 times the measured one, the Euclidean 1.05 and 0.6. The quadratic was
    set up anew three times until its sweeps were bracketed; in the earlier settings the ratio of sign descent lay
    between 0.001 and 0.08, and once it varied more than the Euclidean one. Take it as a diagnostic.

    value: with |gbar|_* for |G|_*, as published. It is biased low where noise outweighs signal in the mean gradient:
    of pure noise it gives about π/2 times the step's own examples in the sign geometry, and no more. So the interval
    runs from that ratio's lower end to the upper end of the ratio with `signal_low`, which is biased high: between
    them lies the truth. It is wide, or unbounded above, where a step is too small to tell; then give more examples.
    The noise is unbiased for Gaussian gradients in the sign geometry, where a plain deviation is 20 % too small with
    two groups and 3 % with eight. In the spectral one it is too small with few groups: for isotropic noise in a square
    matrix by 15 % with two (Marchenko-Pastur), by 2 % with eight. Use eight groups or more.
    """

    def __init__(self, geometry: Geometry = "sign", *, ema: float | None = None, coverage: float = 0.95) -> None:
        if geometry not in GEOMETRIES:
            raise InputError(f"geometry must be one of {list(GEOMETRIES)}, got {geometry!r}")
        self.geometry, self.skipped = geometry, 0
        self._plain = RatioOfMeans(ema=ema, coverage=coverage)
        self._crossed = RatioOfMeans(ema=ema, coverage=coverage)

    def update(self, gradients: Stacks, examples: int | Sequence[int]) -> Estimate:
        """Adds one step and returns the estimate so far; a step that is not finite is skipped and counted.

        gradients: for each tensor, its k >= 2 group gradients stacked; a list, or by name. examples: in each group, or
        of each.
        """
        parts = dual_norm_parts(gradients, examples, self.geometry)
        if all(map(math.isfinite, parts)):
            self._plain.update(parts.noise, parts.signal)
            self._crossed.update(parts.noise, parts.signal_low)
        else:
            self.skipped += 1
        return self.estimate()

    def estimate(self) -> Estimate:
        """(mean noise/mean signal)² from all steps so far."""
        low, high = self._plain.ratio(lowest=0.0), self._crossed.ratio(lowest=0.0)
        method = f"({self.geometry} noise/|gbar|)², {low.method}"
        value = low.value**2 if low.value > 0 else low.value
        top = math.inf if math.isnan(high.value) else high.high
        end = max(top, low.high)
        if end == math.inf and low.defined:
            method += "; unbounded above: groups agree on no direction"
        return Estimate(value, low.low**2, end**2, method, low.coverage)

    def state_dict(self) -> dict[str, Any]:
        """The statistics, as plain numbers."""
        return {
            "geometry": self.geometry,
            "plain": self._plain.state_dict(),
            "crossed": self._crossed.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        if state["geometry"] != self.geometry:
            raise InputError(f"the state is of geometry {state['geometry']!r}, not {self.geometry!r}")
        self._plain.load_state_dict(state["plain"])
        self._crossed.load_state_dict(state["crossed"])
        self.skipped = state["skipped"]


@torch.no_grad()
def dual_norm_parts(gradients: Stacks, examples: int | Sequence[int], geometry: Geometry = "sign") -> DualNormParts:
    """Noise and signal of one step, summed over tensors (the dual of the largest of the tensors' norms).

    "euclidean" sums squares over tensors instead. Computed in float32 at least; NaN where a gradient is not
    finite. The spectral geometry costs k + 1 singular value decompositions of each matrix.

    >>> parts = dual_norm_parts([torch.tensor([[1.0], [3.0]])], examples=2, geometry="euclidean")
    >>> round(parts.noise**2, 3), parts.signal, parts.signal_low
    (4.0, 2.0, 2.0)
    """
    if geometry not in GEOMETRIES:
        raise InputError(f"geometry must be one of {list(GEOMETRIES)}, got {geometry!r}")
    given = gradients.values() if isinstance(gradients, Mapping) else gradients
    stacks = [each for each in map(_wide, given) if each.numel()]
    counts = {len(stack) for stack in stacks}
    if len(counts) != 1 or min(counts) < 2:
        raise InputError(f"gradients must be stacks of one number of groups, at least two, got {sorted(counts)}")
    k = counts.pop()
    sizes = list(examples) if isinstance(examples, Sequence) else [examples] * k
    if len(sizes) != k or not all(map(is_count, sizes)):
        raise InputError(f"examples must be an integer of at least 1, or one for each of {k} groups, got {examples!r}")
    if not all(bool(stack.isfinite().all()) for stack in stacks):
        return DualNormParts(math.nan, math.nan, math.nan)
    if geometry == "euclidean":
        return _euclidean(torch.cat([stack.reshape(k, -1) for stack in stacks], 1), sizes)
    if geometry == "spectral":
        stacks = [stack.flatten(2) for stack in stacks if stack.ndim > 2]
        if not stacks:
            raise InputError(_NOT_IN_IT)
    noise, norm, direction = _SIGN if geometry == "sign" else _SPECTRAL
    each = [_parts(stack, sizes, noise, norm, direction) for stack in stacks]
    return DualNormParts(*(math.fsum(column) for column in zip(*each, strict=True)))


def _wide(stack: Tensor) -> Tensor:
    if not stack.is_floating_point() or stack.ndim < 1:
        raise InputError(f"gradients must be real floating-point stacks, got {stack.dtype}, shape {tuple(stack.shape)}")
    return stack if stack.dtype == torch.float64 else stack.float()


_Noise = Callable[[Tensor, int], Tensor]
_Norm = Callable[[Tensor], Tensor]


def _parts(stack: Tensor, sizes: Sequence[int], noise: _Noise, norm: _Norm, direction: _Norm) -> DualNormParts:
    n = torch.tensor(sizes, dtype=stack.dtype, device=stack.device)
    share = (n / n.sum()).view(-1, *[1] * (stack.ndim - 1))
    weighted = stack * share
    mean = weighted.sum(0)
    deviations = (stack - mean) * n.view_as(share).sqrt()  # of variance σ² of one example each, k - 1 of them free
    others = [direction((mean - part) / (1 - float(f))) for part, f in zip(weighted, share.flatten(), strict=True)]
    low = sum(float((part * each).sum()) for part, each in zip(weighted, others, strict=True))
    return DualNormParts(float(noise(deviations, len(stack) - 1)), float(norm(mean)), low)


def _euclidean(stack: Tensor, sizes: Sequence[int]) -> DualNormParts:
    def noise(deviations: Tensor, free: int) -> Tensor:
        return (deviations.square().sum() / free).sqrt()

    return _parts(stack, sizes, noise, torch.linalg.vector_norm, _unit)


def _sign_noise(deviations: Tensor, free: int) -> Tensor:
    """Σ_j σ_j; c₄ makes the deviation of a Gaussian sample unbiased."""
    c4 = math.sqrt(2 / free) * math.exp(math.lgamma((free + 1) / 2) - math.lgamma(free / 2))
    return (deviations.square().sum(0) / free).sqrt().sum() / c4


def _spectral_noise(deviations: Tensor, free: int) -> Tensor:
    """tr (E ΔᵀΔ)^½ is the sum of the singular values of the deviations laid along the longer side, over √free."""
    tall = deviations if deviations.shape[-2] >= deviations.shape[-1] else deviations.mT
    singular: Tensor = torch.linalg.svdvals(tall.flatten(0, 1))
    return singular.sum() / math.sqrt(free)


def _nuclear(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(matrix, "nuc")
    return norm


def _orthogonal(matrix: Tensor) -> Tensor:
    """UVᵀ over the singular values that are not 0."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = (s > s.max() * max(matrix.shape) * torch.finfo(s.dtype).eps).to(s)
    product: Tensor = (u * kept) @ vh
    return product


def _unit(tensor: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(tensor)
    return tensor / norm if norm > 0 else tensor


def _l1(tensor: Tensor) -> Tensor:
    return tensor.abs().sum()


_SIGN: tuple[_Noise, _Norm, _Norm] = (_sign_noise, _l1, torch.sign)
_SPECTRAL: tuple[_Noise, _Norm, _Norm] = (_spectral_noise, _nuclear, _orthogonal)


def group_gradients(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], groups: Sequence[Any]
) -> dict[str, Tensor]:
    """The mean gradient of each group of examples, stacked, by parameter name; `.grad` is left alone.

    loss: `(model, batch)` -> mean over the batch's examples. groups: two or more batches. A parameter that a group
    does not use has gradient 0 there. It holds as many copies of the gradient as there are groups. Buffers that a
    forward pass changes (batch normalisation's) do change.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise InputError("the model has no parameter that requires a gradient")
    if len(groups) < 2:
        raise InputError(f"groups must be two batches or more, got {len(groups)}")
    parameters = [p for _, p in named]
    rows = [torch.autograd.grad(loss(model, group), parameters, allow_unused=True) for group in groups]
    columns = zip(*rows, strict=True)
    return {
        name: torch.stack([torch.zeros_like(p) if g is None else g for g in column])
        for (name, p), column in zip(named, columns, strict=True)
    }
