"""A model's trained parameters, and which of them are no matrices, whatever their shape: gains and biases."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from batchlab.core.errors import InputError

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
BIASES = ("bias", "bias_k", "bias_v")


def trained_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that require a gradient, by name; `InputError` where one is lazy and has no shape yet."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, p in trained:
        if is_lazy(p):
            raise InputError(f"model must have its weights, but {name} is lazy: send a batch through it first")
    return trained


def gains_of(model: nn.Module) -> set[int]:
    """The ids of the scales and biases of norms, of the magnitudes of `weight_norm`, and of biases, of any shape.

    A `LayerNorm` over a picture has gains of three dimensions, `weight_norm` a column of magnitudes.

    >>> layer = nn.LayerNorm([2, 2])
    >>> gains_of(layer) == {id(layer.weight), id(layer.bias)}, gains_of(nn.Linear(2, 2, bias=False))
    (True, set())
    """
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, NORMS):
            found |= {id(p) for p in module.parameters()}  # with those of its parametrizations
        found |= {id(p) for name, p in module.named_parameters(recurse=False) if name in BIASES}
        if isinstance(module, nn.utils.parametrize.ParametrizationList) and isinstance(module[0], _WeightNorm):
            found.add(id(module.original0))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                found.add(id(getattr(module, f"{hook.name}_g")))
    return found
