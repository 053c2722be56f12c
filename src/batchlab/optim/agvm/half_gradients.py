"""The gradients of a batch's two halves: taken one after the other or over ranks, compared, and made one mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.core.errors import InputError
from batchlab.optim.state_dtype import dense
from batchlab.parallel.agree import device_of
from batchlab.parallel.shards import Mesh, is_spread, over_meshes, share

CHUNK = 2**20
_SQUARES = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam)

Dots = tuple[float, float, float]  # a·a, a·b and b·b of a group's gradients a and b in the two halves


class Preconditioner(NamedTuple):
    """Adam's, of one tensor or many in a row: g/(√(β₂v + (1 - β₂)g²) + ε). scale: what g is to be divided by first."""

    v: Tensor
    beta2: float
    eps: float
    scale: float

    def __call__(self, g: Tensor) -> Tensor:
        """Of a gradient in the dtype of v."""
        g = g / self.scale
        return g / ((self.beta2 * self.v + (1 - self.beta2) * g.square()).sqrt() + self.eps)

    def split(self, size: int) -> list[Preconditioner]:
        """Of consecutive pieces."""
        return [self._replace(v=v) for v in torch.split(self.v, size)]


def dot_products(a: Tensor, b: Tensor, conditioned: Preconditioner | None = None) -> Tensor:
    """[a·a, a·b, b·b] of flat tensors, in float64; in float32 on a device that has no other."""
    dtype = _wide(a)
    total = torch.zeros(3, dtype=dtype, device=a.device)
    left, right = torch.split(a, CHUNK), torch.split(b, CHUNK)
    conditions = [None] * len(left) if conditioned is None else conditioned.split(CHUNK)
    for x, y, condition in zip(left, right, conditions, strict=True):
        x, y = x.to(dtype), y.to(dtype)
        if condition is not None:
            x, y = condition(x), condition(y)
        total += torch.stack([x.dot(x), x.dot(y), y.dot(y)])
    return total


class Halves:
    """What a step has taken so far of its two halves."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self._first: dict[Tensor, Tensor] = {}

    def begin(self, names: Iterable[str], optimizer: torch.optim.Optimizer) -> None:
        """Before the backward passes. Refuses a half that was taken, and gradients that are of neither."""
        for name in names:
            if name in self.taken:
                raise InputError(
                    f"half {name!r} of this step was taken already: put all its micro-batches into one context, and "
                    "call zero_grad() of the AGVM optimizer between steps"
                )
        if not self.taken and any(bool(share(g).part.any()) for _, g in _with_gradient(optimizer)):
            raise InputError("the gradients must be zero before the first half: call zero_grad()")

    @torch.no_grad()
    def end(
        self, name: str, optimizer: torch.optim.Optimizer, *, measure: bool, loss_scale: float
    ) -> list[Dots | None] | None:
        """After the backward passes; after the second half's `.grad` is the mean of both, and the products known."""
        self.taken.add(name)
        if len(self.taken) == 1:
            if measure:
                # A copy: under DDP `.grad` can be a view of a bucket that the second half overwrites.
                self._first = {p: g.clone() for p, g in _with_gradient(optimizer)}
                for p in self._first:
                    p.grad = None
            return None
        dots = self._products(optimizer, loss_scale) if measure else None
        for p, gradient in self._first.items():
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        self._first = {}
        if means := [g for _, g in _with_gradient(optimizer)]:
            torch._foreach_div_(means, 2.0)
        return dots

    def check_complete(self, t: int, *, due: bool) -> None:
        """Refuses a step with one half, or one that should measure and has none."""
        if len(self.taken) == 1:
            (name,) = {"A", "B"} - self.taken
            raise InputError(f"half {name!r} is missing: this step has the gradient of the other one alone")
        if due and not self.taken:
            raise InputError(
                f'step {t} measures: run its backward passes in half("A") and half("B"), or in rank_halves(); due() '
                "says which steps do"
            )

    def _products(self, optimizer: torch.optim.Optimizer, loss_scale: float) -> list[Dots | None]:
        """Of each group over whole tensors, summed over the ranks that they are spread over."""
        count = len(optimizer.param_groups)
        sums: dict[Mesh | None, Tensor] = {}
        seen: set[int] = set()
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                a, b = self._first.get(p), p.grad
                known = a if b is None else b
                if known is None:
                    continue
                seen.add(index)
                held = share(known)
                x, y = (torch.zeros_like(held.part) if g is None else share(g).part for g in (a, b))
                conditioned = preconditioner(optimizer, group, [p], _wide(x), loss_scale)
                row = dot_products(x.reshape(-1), y.reshape(-1), conditioned) / held.holders
                rows = sums.setdefault(held.mesh, row.new_zeros(count, 3))
                rows[index] += row.to(rows.device)
        totals = over_meshes({mesh: rows.flatten().tolist() for mesh, rows in sums.items()})
        return [_triple(totals[3 * index : 3 * index + 3]) if index in seen else None for index in range(count)]

    @torch.no_grad()
    def over_ranks(
        self, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None, *, measure: bool, loss_scale: float
    ) -> list[Dots | None]:
        """Makes `.grad` the mean over ranks; if it measures, compares the ranks' first half with their second.

        With s = Σg and d = Σ±g over all W ranks the halves are (s ± d)/W.
        """
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        used = _used_somewhere(optimizer, group)
        found: list[Dots | None] = []
        for param_group in optimizer.param_groups:
            products: list[Tensor] = []
            for members in _buckets([p for p in param_group["params"] if p in used]):
                mean = torch.cat([_flat_gradient(p) for p in members])
                difference = mean * (1 if rank < world // 2 else -1) if measure else None
                dist.all_reduce(mean, group=group)
                mean /= world
                if difference is not None:
                    dist.all_reduce(difference, group=group)
                    difference /= world
                    conditioned = preconditioner(optimizer, param_group, members, _wide(mean), loss_scale)
                    products.append(dot_products(mean + difference, mean - difference, conditioned).cpu())
                _put_back(members, mean)
            found.append(_triple(torch.stack(products).sum(0).tolist()) if products else None)
        if measure:
            _check_differ([dots for dots in found if dots is not None], world)
        return found


def even_size(group: dist.ProcessGroup | None) -> None:
    """Refuses ranks that cannot be cut into two halves."""
    if not dist.is_initialized():
        raise InputError('rank_halves needs torch.distributed; in one process use half("A") and half("B")')
    if (world := dist.get_world_size(group)) % 2:
        raise InputError(
            f'rank_halves needs an even number of ranks, got {world}: take the halves with half("A") and half("B")'
        )


def _check_differ(found: Sequence[Dots], world: int) -> None:
    """Refuses halves that are alike up to rounding in all groups: |a - b|² is next to nothing against |a|²."""
    tiny = (world * torch.finfo(torch.float32).eps) ** 2
    if any(aa for aa, _, _ in found) and all(abs(aa - 2 * ab + bb) <= tiny * aa for aa, ab, bb in found):
        raise InputError(
            "all ranks have the same gradient, averaged before rank_halves could compare its halves: give it the DDP "
            "module and run the forward pass inside, and give each rank examples of its own"
        )


def preconditioner(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    members: Sequence[Tensor],
    dtype: torch.dtype,
    loss_scale: float,
) -> Preconditioner | None:
    """Adam's for these parameters in a row, None where the group keeps no mean of squared gradients."""
    if not {"betas", "eps"} <= group.keys() or not isinstance(group["eps"], float | int):  # CAME has two
        return None
    states = [optimizer.state[p] for p in group["params"] if p in optimizer.state]
    kept = any("exp_avg_sq" in state for state in states)
    if not kept and not (isinstance(optimizer, _SQUARES) and not any(states)):
        return None
    vs = []
    for p in members:
        state = optimizer.state.get(p, {})
        v = state.get("exp_avg_sq")
        part = share(p.detach()).part
        vs.append((torch.zeros_like(part, dtype=dtype) if v is None else dense(v, dtype)).reshape(-1))
    return Preconditioner(torch.cat(vs), group["betas"][1], group["eps"], loss_scale)


def check_gradient(p: Tensor, name: str) -> None:
    """Refuses a sparse or a complex gradient."""
    if p.is_complex():
        raise InputError(f"AGVM takes real gradients, got {p.dtype} of {name}: train torch.view_as_real of it")
    if p.grad is not None and p.grad.layout != torch.strided:
        raise InputError(f"AGVM takes dense gradients, got a sparse one of {name}: build its embedding dense")


def name_of(group: Mapping[str, Any], index: int, place: int) -> str:
    """The parameter's own name, else its place."""
    names = group.get("param_names")
    return str(names[place]) if names else f"parameter {place} of param_groups[{index}]"


def _with_gradient(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter that has a gradient, and the gradient."""
    for index, group in enumerate(optimizer.param_groups):
        for place, p in enumerate(group["params"]):
            if p.grad is not None:
                check_gradient(p, name_of(group, index, place))
                yield p, p.grad


def _used_somewhere(optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None) -> set[Tensor]:
    """The parameters that have a gradient on some rank: the others must stay without."""
    trained = []
    for index, param_group in enumerate(optimizer.param_groups):
        for place, p in enumerate(param_group["params"]):
            if is_spread(p):
                raise InputError(
                    f"{name_of(param_group, index, place)} is spread over ranks, so that no rank has its own gradient "
                    'of it: take the halves one after the other, with half("A") and half("B")'
                )
            check_gradient(p, name_of(param_group, index, place))
            if p.requires_grad:
                trained.append(p)
    has = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=device_of(group))
    dist.all_reduce(has, group=group)
    return {p for p, count in zip(trained, has.tolist(), strict=True) if count}


def _buckets(members: Sequence[Tensor]) -> list[list[Tensor]]:
    """By device and dtype of the sums: float32 at least."""
    found: dict[Any, list[Tensor]] = {}
    for p in members:
        found.setdefault((p.device, torch.promote_types(p.dtype, torch.float32)), []).append(p)
    return list(found.values())


def _flat_gradient(p: Tensor) -> Tensor:
    dtype = torch.promote_types(p.dtype, torch.float32)
    gradient = torch.zeros_like(p) if p.grad is None else p.grad
    return gradient.detach().reshape(-1).to(dtype)


def _put_back(members: Sequence[Tensor], flat: Tensor) -> None:
    for p, piece in zip(members, torch.split(flat, [p.numel() for p in members]), strict=True):
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(piece.view(p.shape))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _triple(numbers: Sequence[float]) -> Dots:
    aa, ab, bb = numbers
    return aa, ab, bb
