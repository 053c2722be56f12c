"""Optimizers by name, with groups that suit them: decay on matrices alone, embeddings and heads out of Muon."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import chain
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from batchlab.core.checks import check_rate
from batchlab.core.errors import InputError
from batchlab.optim.gains import gains_of, trained_of
from batchlab.optim.memory_order import IN_ORDER
from batchlab.parallel.shards import is_spread

ADAM_LIKE = frozenset({"adam", "adamw", "rmsprop"})
_FUSED_WHERE_SPREAD = frozenset({"adam", "adamw"})


class _Known(NamedTuple):
    """where: the class, as module:name. ours: defaults that are not the class's. split: which groups it takes.

    watches: made by a function that takes the model too.
    """

    where: str
    ours: Mapping[str, Any] = {}
    split: Literal["decay", "muon"] = "decay"
    watches: bool = False


_OPTIMIZERS: dict[str, _Known] = {
    "sgd": _Known("torch.optim:SGD", {"momentum": 0.9}),
    "adam": _Known("torch.optim:Adam"),
    "adamw": _Known("torch.optim:AdamW", {"weight_decay": 0.01}),
    "rmsprop": _Known("torch.optim:RMSprop"),
    "adagrad_norm": _Known("batchlab.optim.adagrad_norm:AdaGradNorm"),
    "ademamix": _Known("batchlab.optim.ademamix:AdEMAMix"),
    "came": _Known("batchlab.optim.came:CAME"),
    "dmuon": _Known("batchlab.optim.muon:DMuon", split="muon"),
    "lamb": _Known("batchlab.optim.lamb:LAMB", {"weight_decay": 0.01}),
    "lars": _Known("batchlab.optim.lars:LARS"),
    "lion": _Known("batchlab.optim.lion:Lion"),
    "mars": _Known("batchlab.optim.mars:MARS"),
    "mkor": _Known("batchlab.optim.mkor.mkor:mkor_sgd", watches=True),
    "muon": _Known("batchlab.optim.muon:Muon", split="muon"),
    "signum": _Known("batchlab.optim.signum:Signum"),
    "small_fc_lopt": _Known("batchlab.optim.learned.learned:LearnedOptimizer"),
    "vradam": _Known("batchlab.optim.vrgd.optimizers:VRAdam"),
    "vrlamb": _Known("batchlab.optim.vrgd.optimizers:VRLAMB", {"weight_decay": 0.01}),
    "vrlars": _Known("batchlab.optim.vrgd.optimizers:VRLARS"),
    "vrsgd": _Known("batchlab.optim.vrgd.optimizers:VRSGD", {"momentum": 0.9}),
}
BY_HAND: dict[str, str] = {
    "agvm": "it wraps another and takes gradients of two halves of a batch: batchlab.optim.AGVM(optimizer)",
    "diloco": "it wraps another on every replica: batchlab.optim.DiLoCo(optimizer, ...)",
    "egn": "it steps on inputs and targets, not on gradients: batchlab.optim.EGN(model, loss=...)",
    "mtadamw": "its step is told a task: batchlab.optim.MTAdamW(params, ratios=...)",
}
NUMBERS = ("betas", "eps", "weight_decay", "momentum", "alpha", "trust", "gamma", "alpha_warmup", "beta3_warmup")


def names() -> list[str]:
    """The names that `create` knows."""
    return sorted(_OPTIMIZERS)


def check_name(name: str) -> str:
    """`name` itself; `InputError` naming what exists where there is no such optimizer."""
    if not isinstance(cast(Any, name), str):
        raise InputError(f"optimizer must be one of {names()}, got {name!r}")
    if name in BY_HAND:
        raise InputError(f"optimizer {name!r} is not made by name alone: {BY_HAND[name]}")
    if name not in _OPTIMIZERS:
        raise InputError(f"optimizer must be one of {names()}, got {name!r}")
    return name


def defaults(name: str) -> dict[str, Any]:
    """The hyperparameters that `create` uses unless told otherwise: the class's own but for those that it says.

    torch's but for SGD's momentum of 0.9; LAMB's weight decay is its paper's for BERT.
    """
    accepted = inspect.signature(_class(name)).parameters
    own = {key: accepted[key].default for key in NUMBERS if key in accepted}
    return own | dict(_OPTIMIZERS[name].ours)


def is_torchs(name: str) -> bool:
    """Whether the optimizer is torch's own class."""
    return _OPTIMIZERS[check_name(name)].where.startswith("torch.")


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: tensors of two or more dimensions with `weight_decay`, biases and norm scales, whatever
    their shape (`gains_of`), without.

    Frozen parameters are left out; a shared parameter stands once. Names go with the parameters.
    """
    _check_model(model, "parameter groups are made of a model's own names")
    check_rate(weight_decay=weight_decay)
    trained, gains = trained_of(model), gains_of(model)
    decayed = [pair for pair in trained if pair[1].ndim >= 2 and id(pair[1]) not in gains]
    plain = [pair for pair in trained if pair[1].ndim < 2 or id(pair[1]) in gains]
    both = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in both if group["params"]]


def create(name: str, model: nn.Module, **hyperparameters: Any) -> torch.optim.Optimizer:
    """The optimizer `name` over `model`'s trained parameters; hyperparameters by the class's names.

    Biases and the scales of norms have no weight decay, and vectors no adaptation by LARS, LAMB and their like. Muon
    has the hidden matrices; embeddings, the last `nn.Linear`, gains and vectors its AdamW, unless `muon_groups` says
    otherwise.

    >>> optimizer = create("sgd", nn.Linear(2, 1), lr=0.1)
    >>> [group["weight_decay"] for group in optimizer.param_groups], optimizer.defaults["momentum"]
    ([0, 0.0], 0.9)
    >>> create("lars", nn.Linear(2, 1), lr=2.0).param_groups[1]["param_names"]
    ['bias']
    """
    make = _class(name)
    kind = make.__name__ if isinstance(make, type) else "the class"
    _check_model(model, f"{kind}(params, ...) takes parameters")
    parameters = inspect.signature(make).parameters
    accepted = {key: value for key, value in parameters.items() if key not in ("params", "model")}
    open_ended = any(value.kind is value.VAR_KEYWORD for value in accepted.values())
    if (unknown := sorted(set(hyperparameters) - set(accepted))) and not open_ended:
        raise InputError(f"{name} takes no hyperparameter {unknown[0]!r}; it takes {sorted(accepted)}")
    settings = dict(_OPTIMIZERS[name].ours) | hyperparameters
    if "lr" in settings:
        check_rate(lr=settings["lr"])
    elif (rate := accepted.get("lr")) is not None and rate.default is rate.empty:
        raise InputError(f"{name} has no learning rate of its own: give it lr")
    decay = settings.pop("weight_decay", accepted["weight_decay"].default)
    parameter_groups = _split(name, model, decay)
    if not parameter_groups:
        raise InputError("the model has no parameter that requires a gradient")
    if is_torchs(name) and not {"fused", "foreach", "capturable", "differentiable"} & settings.keys():
        settings["fused"] = "fused" in accepted and not _has_sparse(model) and _fused_is_faster(name, parameter_groups)
        if not settings["fused"]:
            del settings["fused"]
    try:
        watched: dict[str, Any] = {"model": model} if _OPTIMIZERS[name].watches else {}
        return cast(torch.optim.Optimizer, IN_ORDER.get(make, make)(parameter_groups, **watched, **settings))
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} refuses its hyperparameters: {error}") from None


def group_as_saved(optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """Puts an optimizer's parameters into the groups that a state of it has, where these are the same ones by name.

    So that a run goes on as it began, though `groups` may part them in another way by now.
    """
    own = optimizer.param_groups
    names, wanted = ([list(group.get("param_names", ())) for group in each] for each in (own, saved))
    if names == wanted or sorted(chain(*names)) != sorted(chain(*wanted)):
        return
    held = {name: (p, group) for group in own for name, p in zip(group["param_names"], group["params"], strict=True)}
    own[:] = [
        {**held[each[0]][1], "params": [held[name][0] for name in each], "param_names": each} for each in wanted if each
    ]


def first_step(name: str) -> None:
    """One step of `name` on one number: at the first one torch loads its compiler, which takes a second or more."""
    line = nn.Linear(1, 1)
    optimizer = create(name, line, lr=0.1)
    line(torch.ones(1, 1)).sum().backward()
    step_alone(optimizer)
    optimizer.zero_grad()


def in_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step wants the gradient in groups, by `add_group` after each micro-batch's backward pass."""
    return hasattr(optimizer, "add_group")


def step_alone(optimizer: torch.optim.Optimizer) -> None:
    """A step on the gradient in `.grad` with nothing around it, for its time and memory.

    An optimizer that takes gradients in groups has it as one of two, the other being zero.
    """
    if in_groups(optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        cast(Any, optimizer).add_group()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        cast(Any, optimizer).add_group()
    optimizer.step()


def _check_model(model: Any, otherwise: str) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}: {otherwise}")


def _class(name: str) -> Callable[..., Any]:
    where, what = _OPTIMIZERS[check_name(name)].where.split(":")
    found: Callable[..., Any] = getattr(import_module(where), what)
    return found


def _split(name: str, model: nn.Module, decay: float) -> list[dict[str, Any]]:
    if _OPTIMIZERS[name].split == "muon":
        from batchlab.optim.muon import muon_groups

        return muon_groups(model, weight_decay=decay)
    return groups(model, decay)


def _fused_is_faster(name: str, parameter_groups: list[dict[str, Any]]) -> bool:
    """On CPU and CUDA torch's fused step is the fastest of its three where it exists: for floating-point parameters.

    For parameters that are spread over ranks torch (2.13) has Adam's alone. On CPUs it goes through memory as it lies,
    in the order of rows here; `memory_order` sees to what comes later.
    """
    parameters = [p for group in parameter_groups for _, p in group["params"]]
    if name not in _FUSED_WHERE_SPREAD and any(map(is_spread, parameters)):
        return False
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") and _in_order(p) for p in parameters)


def _in_order(parameter: Tensor) -> bool:
    return is_spread(parameter) or parameter.is_contiguous()


def _has_sparse(model: nn.Module) -> bool:
    """Whether some module's gradient is sparse, which no fused step takes."""
    return any(getattr(module, "sparse", False) is True for module in model.modules())
