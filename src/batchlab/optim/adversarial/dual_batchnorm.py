"""Two BatchNorms in the place of each one: a main one for clean inputs, an auxiliary one for adversarial inputs.

Adversarial inputs have other feature statistics than clean ones, and one BatchNorm over both fits neither (AdvProp,
Xie et al. 2020, arXiv 1911.09665). Statistics and affine parameters are doubled, all other weights are shared. It lies
beside its user because it needs nothing of a layer library: it holds two layers of PyTorch's own and picks one. Weights
and statistics after 20 steps in float64 are those of timm's `convert_splitbn_model` to 2e-14; subclasses are kept.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchlab.core.errors import InputError

Branch = Literal["main", "aux"]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_LAZY = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)


class DualBatchNorm(nn.Module):
    """`main` and `aux`, two layers of one kind; `use_bn` says which one an input goes through, `main` unless told.

    main: the layer that was there, hooks and all; aux: a copy of it, weights and statistics too. The kind may be any
    subclass of `nn.BatchNorm1d`, `2d`, `3d` or `nn.SyncBatchNorm`.
    """

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main, self.aux = main, copy.deepcopy(main)
        self.branch: Branch = "main"
        self.training = main.training

    def forward(self, input: Tensor) -> Tensor:
        """What the layer in use makes of the input, of the same shape."""
        result: Tensor = (self.aux if self.branch == "aux" else self.main)(input)
        return result

    def extra_repr(self) -> str:
        """Which of the two is in use."""
        return f"branch={self.branch!r}"


def convert_dual_batchnorm(model: nn.Module) -> nn.Module:
    """Puts a `DualBatchNorm` in the place of each BatchNorm, in place; returns the model, or the pair if it is one.

    Call it before the optimizer is made and before any wrapper (DDP, `fully_shard`, `torch.compile`), else the new
    affine parameters are in neither; after `load_state_dict` of a plain model's weights, whose names end in
    `bn.weight` where they are `bn.main.weight` afterwards; before or after `nn.SyncBatchNorm.convert_sync_batchnorm`.
    A layer that stands at two places stays one pair at both. Pairs that are there already are left alone, and so is a
    model without BatchNorm. Adds 2 parameters and 2 statistics a channel. Not for a model whose BatchNorms shall see
    both kinds of inputs alike, and `torch.optim.swa_utils.update_bn` empties both layers' statistics and fills the
    main one's alone. Raises `InputError` for a wrapped model and for lazy layers without weights.

    >>> model = convert_dual_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    >>> [name for name, _ in model.named_parameters()][2:]
    ['1.main.weight', '1.main.bias', '1.aux.weight', '1.aux.bias']
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if unwrapped(model) is not model:
        raise InputError(f"model must be converted before it is wrapped, got a {type(model).__name__}")
    pairs: dict[nn.Module, nn.Module] = {}
    for name, layer in _places(model):
        if isinstance(layer, _LAZY):  # it turns into a plain one when it gets its weights
            raise InputError(f"model must have its weights, but {name or 'it'} is lazy: send a batch through it first")
        if isinstance(layer, _NORMS) and not _in_pair(model, name):
            pairs[layer] = DualBatchNorm(layer)
    return _replaced(model, pairs)


def keep_main_batchnorm(model: nn.Module) -> nn.Module:
    """Puts each pair's main layer back in its place, in place: the plain model to evaluate, export or share.

    >>> keep_main_batchnorm(convert_dual_batchnorm(nn.Sequential(nn.BatchNorm1d(4))))
    Sequential(
      (0): BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    )
    """
    return _replaced(model, {pair: pair.main for pair in model.modules() if isinstance(pair, DualBatchNorm)})


@contextlib.contextmanager
def use_bn(model: nn.Module, branch: Branch) -> Iterator[None]:
    """Sends what `model` is given inside through its "main" or its "aux" BatchNorms, in training and in evaluation.

    It is set on the layers and put back at the end. Under activation checkpointing the backward pass must be inside
    too: it runs the layers a second time. A model without pairs is left as it is.
    """
    if branch not in ("main", "aux"):
        raise InputError(f'branch must be "main" or "aux", got {branch!r}')
    before = [(layer, layer.branch) for layer in model.modules() if isinstance(layer, DualBatchNorm)]
    try:
        for layer, _ in before:
            layer.branch = branch
        yield
    finally:
        for layer, kept in before:
            layer.branch = kept


def single_batchnorms(model: nn.Module) -> list[str]:
    """The names of BatchNorm layers that are not in a pair."""
    return [name for name, layer in _places(model) if isinstance(layer, _NORMS) and not _in_pair(model, name)]


def branch_parameters(model: nn.Module, branch: Branch) -> list[nn.Parameter]:
    """The affine parameters of all pairs' main or auxiliary layers."""
    pairs = (layer for layer in model.modules() if isinstance(layer, DualBatchNorm))
    return [parameter for pair in pairs for parameter in getattr(pair, branch).parameters()]


def unwrapped(model: Any) -> nn.Module:
    """The model inside DDP and `torch.compile`."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    inner: nn.Module = model
    return inner


def _places(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules(remove_duplicate=False))


def _in_pair(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:n])), DualBatchNorm) for n in range(len(parts)))


def _replaced(model: nn.Module, new: dict[Any, nn.Module]) -> nn.Module:
    """The model with every layer that is a key of `new` replaced, wherever it stands."""
    for name, layer in _places(model):
        if layer in new and name:
            model.set_submodule(name, new[layer])
    return new.get(model, model)
