"""The arithmetic of MKOR: rank-one updates of inverse factors, means from layers, and the knee of a loss curve.

Mozaffari, Li, Zhang and Mehri Dehnavi 2023 (arXiv 2306.01685). Symbols: P is A⁻¹ or G⁻¹, v is ā or ḡ, γ the decay,
ε and ζ the stabiliser's threshold and what it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.core.checks import check_inside

Variant = Literal["exact", "released", "printed"]
CLIP = 100.0  # the released package's `clipping_value`
RESET_ABOVE = 2.0  # and the largest entry above which it resets both factors of a layer


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in where `dtype` is stored: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def update_inverse_(
    P: Tensor, v: Tensor, *, gamma: float, eps: float = math.inf, zeta: float = 1.0, printed: bool = False
) -> Tensor:
    """P ← (γP⁻¹ + (1-γ)vvᵀ)⁻¹ in place, in O(d²); returns whether P or v was changed first, a tensor of one truth.

    P: (d, d), symmetric positive definite. v: (d,). Sherman-Morrison: P/γ - c·(Pv)(Pv)ᵀ with
    c = (1-γ)/γ²/(1 + (1-γ)/γ·vᵀPv). printed: the formula of the paper's listing in its place,
    γP + (1-γ)/(γ²(1 + γ(1-γ)vᵀPv))·(Pv)(Pv)ᵀ, which is not this inverse. Half precision is computed in float32.

    P ← ζP + (1-ζ)I first, where m, the largest entry of P, is above ε: of a positive definite P it stands on the
    diagonal. With ζ/γ + (1-ζ)/ε <= 1 it then never passes ε/γ; the largest row sum, the other reading of the paper's
    infinity norm, does (3.5 at ε = 2, d = 10).

    v is shortened to |v|² = 1/(um), u = `finfo(P.dtype).eps`, where it is longer: no eigenvalue of P then falls below
    what P can hold beside m, which would make it negative and P useless. At ε = 10 that is from |v|² of 100 on in
    float16, 13 in bfloat16, 8·10⁵ in float32.

    >>> P = torch.eye(2)
    >>> _ = update_inverse_(P, torch.tensor([1.0, 0.0]), gamma=0.5)
    >>> P.tolist()
    [[1.0, 0.0], [0.0, 2.0]]
    """
    if gamma != 1:
        check_inside(gamma=gamma)
    W = P.to(wide_dtype(P.dtype))
    v, largest = v.to(W.dtype), W.diagonal().max()
    mixed = changed = largest > eps
    if not printed:
        longest = 1 / (torch.finfo(P.dtype).eps * largest)
        changed = mixed | (v @ v > longest)
        v = v * torch.where(v @ v > longest, (longest / (v @ v)).sqrt(), torch.ones_like(longest))
    keep = 1 - (1 - zeta) * mixed.to(W.dtype)  # where() of two numbers would be float32
    w = keep * (W @ v) + (1 - keep) * v
    if printed:
        factor, sign, c = gamma, 1.0, (1 - gamma) / (gamma**2 * (1 + gamma * (1 - gamma) * (v @ w)))
    else:
        factor, sign, c = 1 / gamma, -1.0, (1 - gamma) / gamma**2 / (1 + (1 - gamma) / gamma * (v @ w))
    s = w * c.sqrt()
    W.mul_(keep * factor)
    W.diagonal().add_((1 - keep) * factor)
    W.add_(torch.outer(s, s), alpha=sign)  # not addr_, which rounds unsymmetrically: what is skew grows as 1/γ^t
    if W is not P:
        P.copy_(W)
    return changed


def update_released_(P: Tensor, v: Tensor, *, gamma: float) -> bool:
    """What the package `mkor` 0.1.2 does: M = γP + (1-γ)I, P ← M - (Mv)(Mv)ᵀ/(1 + vᵀMv); whether max|P| > 2 then.

    The inverse of M⁻¹ + vvᵀ: the inverse is drawn to I, and nothing of v is averaged. Waits for the device.
    """
    M = P.to(wide_dtype(P.dtype)).mul_(gamma)
    v = v.to(M.dtype)
    M.diagonal().add_(1 - gamma)
    w = M @ v
    s = w / (1 + v @ w).sqrt()
    M.sub_(torch.outer(s, s))
    if M is not P:
        P.copy_(M)
    return bool(P.abs().max() > RESET_ABOVE)


def norms_apart(M: Tensor) -> Tensor:
    """The released package's norm: ‖weight‖ + ‖bias‖, the bias in the last column."""
    norms: list[Tensor] = [torch.linalg.vector_norm(part) for part in (M[:, :-1], M[:, -1])]
    return norms[0] + norms[1]


def precondition(
    grad: Tensor, A: Tensor, G: Tensor, norm: Callable[[Tensor], Tensor] = torch.linalg.vector_norm
) -> Tensor:
    """D = G⁻¹·∇·A⁻¹, scaled to the norm of ∇; a gradient of zero stays zero, and one with NaN is NaN throughout.

    grad: (out, in), with the bias's gradient as its last column where A has a row more than the layer has inputs. A,
    G: the inverses. Computed in the gradient's dtype.
    """
    D = G.to(grad.dtype) @ grad @ A.to(grad.dtype)
    ours = norm(D)
    return D * torch.where(ours == 0, 1.0, norm(grad) / ours)


class Sums(NamedTuple):
    """rows: how many. total: Σ of the rows, (d,). energy: Σ of their squared norms."""

    rows: int
    total: Tensor
    energy: Tensor


def input_sums(module: nn.Module, x: Tensor, dtype: torch.dtype, *, clipped: bool = False) -> Sums:
    """Of a layer's input rows a_n: each vector of a Linear's input, each patch that a Conv2d's filters see.

    Patches are taken of the sum over examples: nothing as large as all patches is made. clipped: the released
    package's, whose rows are examples, a Conv2d's mean patch each, with entries cut to [-100, 100].
    """
    x = x.to(dtype) if x.dtype.itemsize > dtype.itemsize else x
    if isinstance(module, nn.Conv2d):
        x = x if x.ndim == 4 else x[None]
        if clipped:
            means = _patches(module, x.to(dtype)).mean(2).clamp(-CLIP, CLIP)
            return Sums(len(x), means.sum(0), means.square().sum())
        patches = _patches(module, x.sum(0, keepdim=True, dtype=dtype))
        squares = torch.linalg.vector_norm(x, dim=0, keepdim=True, dtype=dtype).square()
        return Sums(len(x) * patches.shape[2], patches.sum(2)[0], _patches(module, squares).sum())
    x = x.reshape(-1, x.shape[-1])
    if clipped:
        x = x.to(dtype).clamp(-CLIP, CLIP)
    return Sums(len(x), x.sum(0, dtype=dtype), torch.linalg.vector_norm(x, dtype=dtype).square())


def output_sum(
    module: nn.Module, g: Tensor, dtype: torch.dtype, *, clipped: bool = False, scale: float = 1.0
) -> Tensor:
    """ḡ = Σ g_n over rows, (d_out,): the mean of N·g_n where the loss is a mean over N rows, and a bias's gradient.

    scale: what the loss was multiplied by. clipped: the released package's: of a Conv2d Σ over positions divided by
    their number, N the examples or tokens of this call, and entries of N·g_n cut to [-100, 100].
    """
    g = g.to(dtype) if g.dtype.itemsize > dtype.itemsize else g
    if isinstance(module, nn.Conv2d):
        g = g if g.ndim == 4 else g[None]
        if clipped:
            g = g.sum((2, 3), dtype=dtype) / g[0, 0].numel()
        else:
            return g.sum((0, 2, 3), dtype=dtype) / scale
    g = g.reshape(-1, g.shape[-1])
    if clipped:
        return (g.to(dtype) * (len(g) / scale)).clamp(-CLIP, CLIP).mean(0)
    return g.sum(0, dtype=dtype) / scale


def _patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """(n, channels · filter's height · width, positions), in the order of the weight's columns."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    return F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)


class Knee:
    """When a loss stops paying: m, a running mean of its decrease per step, is below β times the mean since the first.

    The only rule of rates that the authors write down, of their knee-point scheduler; that MKOR-H switches by it is
    batchlab's choice. decay: of m, which starts at 0 and is divided by what its weights sum to. share: β. warm_up:
    steps without an answer. A loss that is not finite is left out.

    >>> knee = Knee(warm_up=2)
    >>> [knee.take(loss) for loss in (8.0, 4.0, 2.0, 1.0)]
    [False, False, False, False]
    """

    def __init__(self, decay: float = 0.98, share: float = 0.1, warm_up: int = 50) -> None:
        self.decay, self.share, self.warm_up = decay, share, warm_up
        self.steps, self.first, self.last, self.mean = 0, math.nan, math.nan, 0.0

    def take(self, loss: float) -> bool:
        """Takes in the loss of one step; whether this is a knee."""
        if not math.isfinite(loss):
            return False
        if math.isnan(self.first):
            self.first = self.last = loss
            return False
        self.steps += 1
        self.mean = self.decay * self.mean + (1 - self.decay) * (self.last - loss)
        self.last = loss
        recent = self.mean / (1 - self.decay**self.steps)
        return self.steps > self.warm_up and recent < self.share * (self.first - loss) / self.steps

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; NaN stands for no loss yet."""
        return {"steps": self.steps, "first": self.first, "last": self.last, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.steps, self.first, self.last, self.mean = (state[name] for name in ("steps", "first", "last", "mean"))
