"""One-step adversarial inputs: a batch's input moved along the sign or the direction of its loss's gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from batchlab.core.checks import holds
from batchlab.core.errors import InputError
from batchlab.core.modes import evaluating
from batchlab.optim.adversarial.dual_batchnorm import Branch, use_bn

Loss = Callable[[nn.Module, Any], Tensor]
Bounds = tuple[float | Tensor, float | Tensor]
Norm = Literal["linf", "l2"]


def perturbation(gradient: Tensor, rho: float | Tensor, norm: Norm = "linf") -> Tensor:
    """ρ·sign(g), or ρ·g_i/|g_i|₂ for each example i: of the shape and dtype of `gradient`, (examples, ...).

    Neither depends on the gradient's scale, so that a mean over the batch or a loss scale changes nothing. A zero
    gradient gives zero, a NaN gives NaN. Lengths are taken in float32 at least.

    >>> perturbation(torch.tensor([[3.0, -4.0]]), 1.0, "l2")
    tensor([[ 0.6000, -0.8000]])
    """
    check_norm(norm)
    if norm == "linf":
        sign = torch.where(gradient.isnan(), gradient, gradient.sign())  # torch's sign of NaN is 0
        return (sign * rho).to(gradient.dtype)
    flat = gradient.reshape(len(gradient), -1).to(torch.promote_types(gradient.dtype, torch.float32))
    for order in (math.inf, 2):  # by the largest part first: the squares of small gradients underflow
        length = torch.linalg.vector_norm(flat, order, dim=1, keepdim=True)
        flat = flat / torch.where(length == 0, 1, length)
    return (flat * rho).view_as(gradient).to(gradient.dtype)


def adversarial_input(
    model: nn.Module,
    loss_fn: Loss,
    batch: Any,
    *,
    rho: float | Tensor,
    norm: Norm = "linf",
    clip: Bounds | None = None,
    input_key: Any = 0,
    branch: Branch = "aux",
) -> Tensor:
    """x̂ = clip(x + perturbation(∇_x l(θ; x, y))), detached, of the shape, dtype and device of x.

    Arguments are those of `ConcurrentAdversarial`, and this is its phase B; branch: the BatchNorms in use, "main" to
    attack a trained model. Meanwhile the model is in evaluation mode: the gradient is each example's own, and weights,
    buffers and `.grad` stay bit for bit. Autocast around the call is off inside: a loss that shall run in lower
    precision enters it itself. With `clip`, x̂ lies in the range; x must lie in it too, or it moves further than ρ.
    Raises `InputError` for a bad ρ, norm or range, an input that is not of floating point, a loss that is no scalar
    or does not depend on the input.

    >>> loss = lambda model, batch: nn.functional.softplus(-batch[1] * model(batch[0])[:, 0]).mean()
    >>> model, batch = nn.Linear(2, 1, bias=False), (torch.zeros(1, 2), torch.ones(1))
    >>> _ = nn.init.constant_(model.weight, 3.0)
    >>> adversarial_input(model, loss, batch, rho=0.5)
    tensor([[-0.5000, -0.5000]])
    """
    check_perturbation(rho, norm, clip)
    return moved_input(model, loss_fn, batch, rho=rho, norm=norm, clip=clip, input_key=input_key, branch=branch)


def moved_input(
    model: nn.Module,
    loss_fn: Loss,
    batch: Any,
    *,
    rho: float | Tensor,
    norm: Norm,
    clip: Bounds | None,
    input_key: Any,
    branch: Branch = "aux",
) -> Tensor:
    """`adversarial_input` of arguments that were checked: it does not wait for the device, a ρ or range there is."""
    x = input_of(batch, input_key).detach().requires_grad_()
    outside = torch.autocast(x.device.type, enabled=False)
    with torch.enable_grad(), outside, evaluating(model), use_bn(model, branch):
        loss = checked_loss(loss_fn(model, with_input(batch, input_key, x)))
        (gradient,) = torch.autograd.grad(loss, x, allow_unused=True) if loss.requires_grad else (None,)
    if gradient is None:
        raise InputError(f"loss_fn must depend on the input, {_place(batch, input_key)}, got a loss that does not")
    with torch.no_grad():
        if isinstance(rho, Tensor):
            rho = _fitting(rho, x)
        moved = x + perturbation(gradient, rho, norm)
        return moved if clip is None else moved.clamp(*(_beside(end, x) for end in clip))


def check_norm(norm: Any) -> None:
    """Refuses a norm that is not known."""
    if norm not in ("linf", "l2"):
        raise InputError(f'norm must be "linf" or "l2", got {norm!r}')


def check_perturbation(rho: Any, norm: Any, clip: Any) -> None:
    """Refuses a ρ that is negative or not finite, a norm that is not known, a range that is none."""
    check_norm(norm)
    if isinstance(rho, Tensor) and rho.ndim and norm == "l2":
        raise InputError(f'rho must be one number for norm "l2", got a tensor of shape {tuple(rho.shape)}')
    if not holds(lambda value: _every((_tensor(value) >= 0) & _tensor(value).isfinite()), rho):
        raise InputError(f"rho must be finite and >= 0, in the unit of the input, got {rho!r}")
    if clip is not None and not holds(
        lambda ends: len(ends) == 2 and _every(_tensor(ends[0]) < _tensor(ends[1])), clip
    ):
        raise InputError(f"clip must be None or (low, high) with low < high, got {clip!r}")


def check_inside(x: Tensor, clip: Bounds) -> None:
    """Refuses an input outside the range that its adversarial form is kept in."""
    low, high = (_beside(end, x) for end in clip)
    if _every((x < low) | (x > high), any_one=True):
        raise InputError(
            f"clip must hold the inputs themselves, got {clip!r} for inputs from {x.min().item():g} to "
            f"{x.max().item():g}: give the range in the unit of the inputs as the model sees them"
        )


def input_of(batch: Any, key: Any) -> Tensor:
    """The input in a batch: the batch itself if it is a tensor, else `batch[key]`, of shape (examples, ...)."""
    if isinstance(batch, Tensor):
        x: Any = batch
    else:
        try:
            x = batch[key]
        except (KeyError, IndexError, TypeError):
            has = f"keys {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise InputError(f"input_key must say where the input is in a batch, got {key!r} for {has}") from None
    if (
        not isinstance(x, Tensor)
        or not x.is_floating_point()
        or x.layout != torch.strided
        or not x.numel()
        or not x.ndim
    ):
        got = f"{x.dtype}, {x.layout}, shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(
            f"the input, {_place(batch, key)}, must be a dense floating-point tensor (examples, ...), got {got}: "
            "turn bytes into floats in the loader, give the embeddings of tokens in their place"
        )
    return x


def with_input(batch: Any, key: Any, x: Tensor) -> Any:
    """The batch with `x` as its input; what else is in it is the same objects."""
    if isinstance(batch, Tensor):
        return x
    if isinstance(batch, Mapping):
        changed = cast(Any, copy.copy(batch))
        changed[key] = x
        return changed
    parts = list(batch)
    parts[key] = x
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def checked_loss(loss: Any) -> Tensor:
    """The loss, which must be a scalar tensor."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"loss_fn must return a scalar tensor, the mean over the batch's examples, got {got}")
    return loss.reshape(())


def _fitting(rho: Tensor, x: Tensor) -> Tensor:
    """ρ in the input's dtype, where it broadcasts against one example."""
    if not holds(lambda value: value.expand(x.shape[1:]) is not None, rho):
        raise InputError(f"rho must broadcast against an example of shape {tuple(x.shape[1:])}, got {tuple(rho.shape)}")
    return _beside(rho, x)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _beside(value: float | Tensor, x: Tensor) -> Tensor:
    """In the dtype and on the device of x, without a wait for the device."""
    return value.to(x, non_blocking=True) if isinstance(value, Tensor) else x.new_full((), value)


def _place(batch: Any, key: Any) -> str:
    return "the batch itself" if isinstance(batch, Tensor) else f"batch[{key!r}]"


def _every(truth: Tensor, any_one: bool = False) -> bool:
    return bool(truth.any() if any_one else truth.all())
