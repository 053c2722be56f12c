"""What the Gauss-Newton step needs of a loss at a batch's outputs: l_i, r_i = ∂l_i/∂f_i and Q_i = ∂²l_i/∂f_i².

Every batch loss is L = (1/b) Σ l_i, a mean over b examples with c outputs each. Of torch's losses with
`reduction="mean"`, `MSELoss` and `BCEWithLogitsLoss` are means over the c outputs too: their factor 1/c is in l_i.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from batchlab.core.errors import InputError

EPSILON = 1e-6  # added to a given Q before it is factored, as somax does for its cross-entropy


class Terms(NamedTuple):
    """losses: l_i, [b]. r: [b, c]. Q: [b, c, c], or its diagonal [b, c].

    root: S with S Sᵀ = Q, in Q's shape. u: [b, c] with S u = r. Both None where they have to be computed from Q.
    """

    losses: Tensor
    r: Tensor
    Q: Tensor
    root: Tensor | None = None
    u: Tensor | None = None


Loss = Callable[[Tensor, Tensor], Terms]


def mse(outputs: Tensor, targets: Tensor) -> Terms:
    """l = |f - y|²/c, as `torch.nn.MSELoss()`: r = 2(f - y)/c and Q = 2I/c."""
    error = _same_shape(outputs, targets)
    return _squared(error, 2.0 / error.shape[1])


def half_mse(outputs: Tensor, targets: Tensor) -> Terms:
    """l = |f - y|²/2, a sum over the c outputs, as the paper has it: r = f - y and Q = I."""
    return _squared(_same_shape(outputs, targets), 1.0)


def _squared(error: Tensor, scale: float) -> Terms:
    q = torch.full_like(error, scale)
    return Terms(error.square().sum(1) * (scale / 2), scale * error, q, q.sqrt(), q.sqrt() * error)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Terms:
    """l = -Σ y log softmax(f), as `torch.nn.CrossEntropyLoss()`; y are classes [b] or probabilities [b, c].

    r = p - y and Q = diag(p) - ppᵀ, singular. S = diag(√p) - p√pᵀ is a root of it, and S u = r has the solution
    u = r/√p: no ε is needed. p is held above the least normal number there, which is below all rounding.
    """
    if outputs.ndim != 2:
        raise InputError(f"cross_entropy needs outputs of shape (b, classes), got {tuple(outputs.shape)}")
    y = _probabilities(targets, outputs)
    total = y.sum(1, keepdim=True)
    log_p = outputs.log_softmax(1)
    p = log_p.exp()
    sqrt_p = p.clamp_min(torch.finfo(p.dtype).tiny).sqrt()
    r = total * p - y
    Q = total[..., None] * (p.diag_embed() - p[:, :, None] * p[:, None, :])
    root = total[..., None].sqrt() * (sqrt_p.diag_embed() - p[:, :, None] * sqrt_p[:, None, :])
    return Terms(-(y * log_p).sum(1), r, Q, root, r / (total.sqrt() * sqrt_p))


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Terms:
    """l = mean over c of log(1 + eᶠ) - y f, as `torch.nn.BCEWithLogitsLoss()`; y in [0, 1].

    r = (σ(f) - y)/c and Q = diag(σ(f)σ(-f))/c, held above the least normal number.
    """
    error = _same_shape(outputs, targets)
    f, y = outputs.reshape(error.shape), targets.reshape(error.shape).to(outputs.dtype)
    if not bool(((y >= 0) & (y <= 1)).all()):
        raise InputError(f"binary_cross_entropy needs targets in [0, 1], got {_range(y)}")
    c = error.shape[1]
    losses = F.binary_cross_entropy_with_logits(f, y, reduction="none").mean(1)
    q = (f.sigmoid() * (-f).sigmoid() / c).clamp_min(torch.finfo(f.dtype).tiny)
    r = (f.sigmoid() - y) / c
    return Terms(losses, r, q, q.sqrt(), r / q.sqrt())


LOSSES: dict[str, Loss] = {
    "mse": mse,
    "half_mse": half_mse,
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
}
SQUARED = ("mse", "half_mse")  # Q is a multiple of I: no damping is needed where J has full rank


def terms_of(loss: str | Callable[[Tensor, Tensor], Any]) -> Loss:
    """The named loss, or a caller's own `(outputs, targets) -> (losses, r, Q)`, whose shapes are then checked.

    `TypeError` where curvature is not given: the name of another loss, or a function that returns one tensor.
    """
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]
    if not callable(loss):
        raise TypeError(f"loss must be one of {sorted(LOSSES)} or a function {_GIVES}, got {loss!r}")
    own = loss

    def given(outputs: Tensor, targets: Tensor) -> Terms:
        found = own(outputs, targets)
        if not isinstance(found, tuple) or len(found) != 3 or not all(isinstance(each, Tensor) for each in found):
            raise TypeError(f"loss must be a function {_GIVES}, got one that returns {type(found).__name__}")
        losses, r, Q = (each.to(outputs) for each in found)
        b, c = len(outputs), outputs[0].numel()
        if losses.shape != (b,) or r.numel() != b * c or Q.numel() not in (b * c, b * c * c):
            shapes = [tuple(each.shape) for each in (losses, r, Q)]
            raise InputError(f"loss must return shapes ({b},), ({b}, {c}) and ({b}, {c}, {c}), got {shapes}")
        return Terms(losses, r.reshape(b, c), Q.reshape((b, c, c) if Q.numel() == b * c * c else (b, c)))

    return given


_GIVES = "(outputs, targets) -> (losses [b], r [b, c], Q [b, c, c] or its diagonal [b, c])"


def rooted(terms: Terms) -> tuple[Tensor, Tensor]:
    """S and u. Of a caller's Q, S is the root of Q + 1e-6·I."""
    if terms.root is not None and terms.u is not None:
        return terms.root, terms.u
    if terms.Q.ndim == 2:
        root = (terms.Q + EPSILON).sqrt()
        return root, terms.r / root
    shifted = terms.Q + EPSILON * torch.eye(terms.Q.shape[1], dtype=terms.Q.dtype, device=terms.Q.device)
    root, failed = torch.linalg.cholesky_ex(shifted)
    if bool(failed.any()):
        raise InputError('solver="cholesky" needs a positive semi-definite Q, got one that is not: use solver="lu"')
    return root, torch.linalg.solve_triangular(root, terms.r[..., None], upper=False)[..., 0]


def _same_shape(outputs: Tensor, targets: Tensor) -> Tensor:
    """f - y, [b, c]."""
    if outputs.shape != targets.shape:
        raise InputError(
            f"targets must have the shape of the outputs, {tuple(outputs.shape)}, got {tuple(targets.shape)}"
        )
    return (outputs - targets.to(outputs.dtype)).reshape(len(outputs), -1)


def _probabilities(targets: Tensor, outputs: Tensor) -> Tensor:
    b, c = outputs.shape
    if targets.is_floating_point():
        y = targets.to(outputs.dtype)
        if y.shape != outputs.shape or not bool((y >= 0).all() & ((y.sum(1) - 1).abs() < 1e-3).all()):
            raise InputError(
                f"cross_entropy needs classes ({b},) or probabilities ({b}, {c}) whose rows sum to 1, "
                f"got {tuple(y.shape)}, {_range(y)}"
            )
        return y
    if targets.shape != (b,) or not bool(((targets >= 0) & (targets < c)).all()):
        raise InputError(
            f"cross_entropy needs targets of shape ({b},) with classes in [0, {c - 1}], "
            f"got shape {tuple(targets.shape)}, {_range(targets)}"
        )
    return F.one_hot(targets.long(), c).to(outputs.dtype)


def _range(values: Tensor) -> str:
    return f"values from {values.min().item():.6g} to {values.max().item():.6g}"
