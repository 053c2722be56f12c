"""One layer under MKOR: what its passes told, its two inverse factors, its gradient; and which layers a model has."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from batchlab.core.errors import InputError
from batchlab.optim.mkor.factors import (
    Sums,
    norms_apart,
    precondition,
    update_inverse_,
    update_released_,
    wide_dtype,
)
from batchlab.parallel.shards import is_spread, share, whole


class Passes(NamedTuple):
    """What the passes since the last step told. inputs: sums over rows. output: Σ g_n, a sum over passes."""

    inputs: Sums
    output: Tensor


class Layer:
    """A Linear or Conv2d with its factors A⁻¹ and G⁻¹, both None before the first update.

    bias: None where there is none of its own. stale: in the released variant, whether A⁻¹ and G⁻¹ are to be set to I.
    """

    def __init__(self, name: str, module: nn.Module, dtype: torch.dtype) -> None:
        self.name, self.module, self.dtype = name, module, dtype
        self.weight: nn.Parameter = module.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
        self.outputs, self.columns = self.weight.shape[0], self.weight.shape[1:].numel()
        self.A: Tensor | None = None
        self.G: Tensor | None = None
        self.stale = [True, True]
        self.updates, self.stabilised, self.mean_share = 0, torch.tensor(0), torch.tensor(math.nan)
        self._passes: Passes | None = None

    def add(self, inputs: Sums, output: Tensor) -> None:
        """Takes in one call of the layer, after its backward pass."""
        if (before := self._passes) is None:
            self._passes = Passes(inputs, output)
        else:
            (rows, total, energy), (more, x, x_energy) = before.inputs, inputs
            self._passes = Passes(Sums(rows + more, total + x, energy + x_energy), before.output + output)

    def take(self) -> Passes:
        """All calls since the last `take`, which are then forgotten; zeros where there was none."""
        passes, self._passes = self._passes, None
        if passes is not None:
            return passes
        zeros = torch.zeros(self.columns + self.outputs + 1, dtype=wide_dtype(self.dtype), device=self.weight.device)
        total, output, energy = torch.split(zeros, [self.columns, self.outputs, 1])
        return Passes(Sums(0, total, energy[0]), output)

    def update(self, passes: Passes, *, gamma: float, eps: float, zeta: float, variant: str) -> None:
        """One rank-one update of both factors; none where no row was seen."""
        (rows, total, energy), g = passes
        if not rows:
            return
        mean = total / rows
        self.mean_share = mean.square().sum() * rows / energy
        a = mean if self.bias is None else torch.cat([mean, mean.new_ones(1)])
        if self.A is None or self.G is None:
            kind: dict[str, Any] = {"dtype": self.dtype, "device": self.weight.device}
            self.A, self.G = torch.eye(len(a), **kind), torch.eye(self.outputs, **kind)
        for index, (P, v) in enumerate(((self.A, a), (self.G, g))):
            v = v.to(P.device)
            if variant != "released":
                self.stabilised = self.stabilised + update_inverse_(
                    P, v, gamma=gamma, eps=eps, zeta=zeta, printed=variant == "printed"
                )
            elif self.stale[index]:  # the vector of this step is dropped, as the package does
                P.zero_().fill_diagonal_(1.0)
                self.stale[index] = False
                self.stabilised = self.stabilised + 1
            elif update_released_(P, v, gamma=gamma):
                self.stale = [True, True]
        self.updates += 1

    def precondition(self, held: Collection[int], *, variant: str) -> None:
        """∇ ← D·‖∇‖/‖D‖ in place, of the weight and of the bias where the base holds it and it has a gradient."""
        if self.A is None or self.G is None or self.weight.grad is None:
            return
        parts = [self.weight.grad]
        if self.bias is not None and self.bias.grad is not None and id(self.bias) in held:
            parts.append(self.bias.grad)
        for part, kind in zip(parts, ("weight", "bias")):
            self._check(part, kind)
        dtype = torch.promote_types(parts[0].dtype, wide_dtype(self.dtype))
        grad = torch.cat([whole(part).reshape(self.outputs, -1).to(dtype) for part in parts], 1)
        norm = norms_apart if variant == "released" and len(parts) == 2 else torch.linalg.vector_norm
        D = precondition(grad, self.A[: grad.shape[1], : grad.shape[1]], self.G, norm)
        for part, value in zip(parts, torch.split(D, [self.columns, 1][: len(parts)], dim=1)):
            _put(value.reshape(part.shape).to(part.dtype), part)

    def _check(self, grad: Tensor, kind: str) -> None:
        what = f"the gradient of {f'{self.name}.' if self.name else ''}{kind}"
        if grad.layout != torch.strided:
            raise InputError(f"{what} is sparse, MKOR needs dense ones: put {self.name!r} in ignore")
        if is_spread(grad) and any(placement.is_partial() for placement in grad.placements):  # type: ignore[attr-defined]
            raise InputError(f"{what} is a sum still to be taken over ranks: redistribute it before step")

    def has_gradient(self) -> bool:
        """Whether the weight has one that is not zero; waits for the device."""
        return self.weight.grad is not None and bool(share(self.weight.grad).part.to_dense().any())

    def drop(self) -> None:
        """What the passes since the last step told."""
        self._passes = None

    def forget(self) -> None:
        """That, and the factors."""
        self.A = self.G = self._passes = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers."""
        numbers = {"updates": self.updates, "mean_share": float(self.mean_share), "stabilised": int(self.stabilised)}
        factors = {} if self.A is None else {"A": self.A, "G": self.G}
        return {**numbers, **factors, "stale": list(self.stale)}

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuses factors of another shape."""
        sizes = {"A": self.columns + (self.bias is not None), "G": self.outputs}
        for key, size in sizes.items():
            if key in state and tuple(state[key].shape) != (size, size):
                raise InputError(
                    f"state's factor {key} of layer {self.name!r} must be of shape {(size, size)}, "
                    f"got {tuple(state[key].shape)}"
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; factors are copied, to this layer's device and dtype."""
        self.forget()
        if "A" in state:
            kind: dict[str, Any] = {"dtype": self.dtype, "device": self.weight.device, "copy": True}
            self.A, self.G = state["A"].to(**kind), state["G"].to(**kind)
        self.updates, self.stale = state["updates"], list(state["stale"])
        self.stabilised, self.mean_share = torch.tensor(state["stabilised"]), torch.tensor(state["mean_share"])


def _put(value: Tensor, grad: Tensor) -> None:
    """Writes it into a gradient; of one that is spread over ranks, each its part."""
    if is_spread(grad):
        from torch.distributed.tensor import distribute_tensor

        spread: Any = grad
        value = distribute_tensor(value, spread.device_mesh, spread.placements, src_data_rank=None)
    grad.copy_(value)


def over_ranks(passes: Sequence[Passes], group: dist.ProcessGroup | None) -> list[Passes]:
    """Of each layer: inputs summed over the ranks' rows, outputs a mean over ranks, as gradients are. One message."""
    world = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return list(passes)
    device = passes[0].output.device
    flat = [
        torch.cat([p.inputs.total, p.inputs.energy[None], p.output / world, p.output.new_full((1,), p.inputs.rows)])
        for p in passes
    ]
    sent = torch.cat([each.to(device) for each in flat])
    dist.all_reduce(sent, group=group)
    result = []
    for own, told in zip(passes, torch.split(sent, [len(each) for each in flat]), strict=True):
        total, energy, output, rows = torch.split(told, [len(own.inputs.total), 1, len(own.output), 1])
        result.append((total, energy[0], output, rows))
    counts = torch.cat([rows for *_, rows in result]).tolist()
    return [
        Passes(Sums(int(rows), total, energy), output)
        for (total, energy, output, _), rows in zip(result, counts, strict=True)
    ]


def all_finite(passes: Sequence[Passes]) -> list[bool]:
    """Of each layer whether its sums are; waits for the device, once."""
    flags = [each.inputs.total.isfinite().all() & each.output.isfinite().all() for each in passes]
    return [bool(flag) for flag in torch.stack([each.to(flags[0].device) for each in flags]).tolist()]


def mean_over_ranks(value: Tensor, device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Of one number; every rank must call."""
    if dist.is_available() and dist.is_initialized() and (world := dist.get_world_size(group)) > 1:
        value = value.to(device) / world
        dist.all_reduce(value, group=group)
    return value.item()


def layers_of(
    model: nn.Module, ignore: Collection[str | nn.Module], dtype: torch.dtype
) -> tuple[list[Layer], dict[str, str]]:
    """The layers that can be preconditioned, and of the other modules with parameters of their own, why not."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    ignored, owners = _ignored(model, ignore), _owners(model)
    read = {id(each.out_proj) for each in model.modules() if isinstance(each, nn.MultiheadAttention)}
    layers, others = [], dict[str, str]()
    for name, module in model.named_modules():
        if not any(p is not None for p in module._parameters.values()) and not isinstance(module, nn.Linear):
            continue
        why = "in ignore" if module in ignored else _why_not(name, module, owners)
        why = "MultiheadAttention reads its weight and never calls it" if id(module) in read else why
        if why is None:
            layers.append(Layer(name, module, dtype))
        else:
            others[name] = why
    return layers, others


def _why_not(name: str, module: nn.Module, owners: dict[int, list[str]]) -> str | None:
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return f"{type(module).__name__} is neither Linear nor Conv2d"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"its filters are in {module.groups} groups"
    own = [module._parameters.get("weight"), module._parameters.get("bias")]
    if own[0] is None or (own[1] is None and module.bias is not None):
        return "its weight or bias is parametrised"
    if any(p is not None and is_lazy(p) for p in own):
        raise InputError(f"layer {name!r} is lazy: run one forward pass before MKOR is made")
    if own[0].is_complex():
        raise InputError(f"the weight of layer {name!r} is complex, MKOR needs real ones: put {name!r} in ignore")
    shared = [other for p in own if p is not None for other in owners[id(p)] if other != name]
    return f"its weight or bias is also that of {shared[0]!r}" if shared else None


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Which modules hold each parameter, a module with two names under one."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _ignored(model: nn.Module, ignore: Collection[str | nn.Module]) -> set[nn.Module]:
    """The modules that are named or given, and all in them."""
    names = dict(model.named_modules(remove_duplicate=False))
    known, result = set(names.values()), set[nn.Module]()
    for item in [ignore] if isinstance(ignore, str | nn.Module) else ignore:
        module = names.get(item) if isinstance(item, str) else item
        if module is None or module not in known:
            raise InputError(f"ignore must hold layers of the model or their names, as {sorted(names)}, got {item!r}")
        result.update(module.modules())
    return result
