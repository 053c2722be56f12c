"""Directions in weight space, filter-normalised (Li et al. 2018, arXiv 1712.09913, section 4).

d_f <- d_f · ‖θ_f‖ / (‖d_f‖ + 1e-10) for every filter f, the weights that make one output: a step of 1 along d changes
each filter by as much as it is long. So two networks whose filters differ in scale alone have the same curve, where
nothing but the scale of filters tells them apart (ReLU networks, batch norm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed
from batchlab.parallel.shards import is_spread

Direction = Mapping[str, Tensor]
Axes = Mapping[str, int | Sequence[int]]

NORMS = ("filter", "layer", "weight", "dfilter", "dlayer", "none")
_EPSILON = 1e-10
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


class Filters(NamedTuple):
    """shape: how to view a tensor. kept: the dimensions of that view which number its filters."""

    shape: tuple[int, ...]
    kept: tuple[int, ...]


def random_direction(
    model: nn.Module,
    *,
    seed: int = 0,
    norm: str = "filter",
    ignore: str | None = "biasbn",
    axes: Axes | None = None,
) -> dict[str, Tensor]:
    """A Gaussian direction with the shapes of the model's trainable parameters, scaled to their sizes.

    Returns name -> tensor, float64 for float64 parameters and else float32, on the parameter's device. A parameter
    with several names has its first one alone. The draw for a parameter depends on `seed`, its name and its shape:
    models that share these get the same direction but for its scale.

    norm: "filter", the paper's; "layer", ‖d‖ = ‖θ‖ over a whole tensor; "weight", d·θ entry by entry; "dfilter" and
        "dlayer", unit norm of each filter or tensor; "none", as drawn.
    ignore: "biasbn" gives 0 for biases and all parameters of normalisation layers, as in the paper's plots. None
        gives d = θ for them, as the reference code does: they are scaled by 1 + a, which is no random direction.
    axes: name -> the dimension, or dimensions, that number the filters, for parameters of your own layers. By default
        1 (and the groups) for transposed convolutions, 1 for Hugging Face's Conv1D, and 0 for all else: output
        channels of convolutions, rows of linear and recurrent layers and of attention's projections, tokens of
        embeddings.

    A filter of zeros gets a direction of zeros. Normalising removes a filter's scale only where the function does not
    depend on it; with biases in between that is approximate.

    >>> layer = nn.Linear(4, 2)
    >>> d = random_direction(layer, seed=1)
    >>> torch.allclose(d["weight"].norm(dim=1), layer.weight.norm(dim=1)), d["bias"].tolist()
    (True, [0.0, 0.0])
    """
    check_settings(norm, ignore)
    found = trainable(model)
    owners, axes = _owners(model), axes or {}
    if unknown := sorted(set(axes) - set(found)):
        raise InputError(f"axes must name trainable parameters of the model, got {unknown[0]!r}")
    direction = {}
    with torch.no_grad():
        for name, parameter in found.items():
            weight = parameter.detach().to(wide(parameter.dtype))
            owner, own_name = owners[name]
            if _is_ignored(owner, own_name, weight):
                direction[name] = torch.zeros_like(weight) if ignore == "biasbn" else weight.clone()
                continue
            draw = _gaussian(weight, derive_seed(seed, "direction", name))
            filters = _chosen(weight, axes[name], name) if name in axes else _filters(owner, own_name, weight)
            direction[name] = _scaled(draw, weight, filters, norm)
    return direction


def check_settings(norm: str, ignore: str | None) -> None:
    """Refuses an unknown `norm` or `ignore`."""
    if norm not in NORMS:
        raise InputError(f"norm must be one of {list(NORMS)}, got {norm!r}")
    if ignore not in ("biasbn", None):
        raise InputError(f'ignore must be "biasbn" or None, got {ignore!r}')


def bare(model: nn.Module) -> nn.Module:
    """The model inside of DDP and `torch.compile`, whose parameters it shares: names are taken from it."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    original = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None
    original = getattr(model, "_orig_mod", None) if original is None else original
    return bare(original) if isinstance(original, nn.Module) else model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, a shared one once, by their names in the bare model."""
    found = {name: p for name, p in bare(model).named_parameters() if p.requires_grad}
    if sum(p.numel() for p in found.values()) == 0:
        raise InputError("the model has no parameter that requires a gradient: there is no weight to move")
    check_whole(model)
    return found


def check_whole(model: nn.Module) -> None:
    """Refuses a model without parameters, and parameters that are sharded or complex."""
    own = dict(bare(model).named_parameters())
    if not own:
        raise InputError("the model has no parameter: there is no weight to move")
    sharded = _is_fully_sharded(model)
    for name, p in own.items():
        if sharded or is_spread(p):
            raise InputError(f"a landscape needs whole parameters, {name} is sharded (FSDP): use an unsharded copy")
        if p.is_complex():
            raise InputError(f"a landscape needs real parameters, {name} is {p.dtype}")


def ignored(model: nn.Module) -> set[str]:
    """The trainable parameters that `ignore="biasbn"` leaves where they are."""
    owners = _owners(model)
    return {name for name, p in trainable(model).items() if _is_ignored(*owners[name], p)}


def wide(dtype: torch.dtype) -> torch.dtype:
    """In what a weight of this type is moved: half precision would lose the step."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP has it, which shows whole parameters in place of its shards after a forward pass."""
    names = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    return bool(names & {"FSDPModule", "FullyShardedDataParallel"})


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Each parameter's module, and its name there."""
    owners: dict[str, tuple[nn.Module, str]] = {}
    for prefix, module in bare(model).named_modules():
        for name, _ in module.named_parameters(recurse=False):
            owners[f"{prefix}.{name}" if prefix else name] = (module, name)
    return owners


def _is_ignored(owner: nn.Module, name: str, weight: Tensor) -> bool:
    """Whether it is a bias or of a normalisation layer: those may have several dimensions."""
    if weight.ndim <= 1 or isinstance(owner, _NORM_LAYERS):
        return True
    return isinstance(owner, nn.MultiheadAttention) and name in ("bias_k", "bias_v")


def _filters(owner: nn.Module, name: str, weight: Tensor) -> Filters:
    shape = tuple(weight.shape)
    if isinstance(owner, _TRANSPOSED) and name == "weight":
        groups = owner.groups
        return Filters((groups, shape[0] // groups, *shape[1:]), (0, 2))
    if type(owner).__name__ == "Conv1D" and type(owner).__module__.startswith("transformers."):
        return Filters(shape, (1,))
    return Filters(shape, (0,))


def _chosen(weight: Tensor, axes: int | Sequence[int], name: str) -> Filters:
    kept = (axes,) if isinstance(axes, int) else tuple(axes)
    if not kept or any(not isinstance(axis, int) or not -weight.ndim <= axis < weight.ndim for axis in kept):
        raise InputError(f"axes of {name} must be dimensions of its shape {tuple(weight.shape)}, got {axes!r}")
    return Filters(tuple(weight.shape), tuple(axis % weight.ndim for axis in kept))


def _gaussian(like: Tensor, seed: int) -> Tensor:
    """N(0, 1), drawn on the CPU in float32 whatever the parameter's device and type."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu")
    return draw.to(like.device, like.dtype)


def _scaled(d: Tensor, weight: Tensor, filters: Filters, norm: str) -> Tensor:
    if norm == "none":
        return d
    if norm == "weight":
        return d * weight
    kept = filters.kept if norm in ("filter", "dfilter") else ()
    d_view, reduced = d.reshape(filters.shape), [i for i in range(len(filters.shape)) if i not in kept]
    lengths = torch.linalg.vector_norm(d_view, dim=reduced, keepdim=True) if reduced else d_view.abs()
    if norm.startswith("d"):
        return (d_view / (lengths + _EPSILON)).reshape(d.shape)
    theta = weight.reshape(filters.shape)
    goal = torch.linalg.vector_norm(theta, dim=reduced, keepdim=True) if reduced else theta.abs()
    return (d_view * (goal / (lengths + _EPSILON))).reshape(d.shape)
