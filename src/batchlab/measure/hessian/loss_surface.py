"""Products with the Hessian of a mean loss, by double backward: Hv = ∂/∂θ (gᵀv), g = ∂L/∂θ (Pearlmutter 1994).

L = Σ n_i·L_i / Σ n_i over pieces of n_i examples, where L_i is the mean loss of piece i: unequal pieces, also over
ranks, give the Hessian of the mean over all examples and not the mean of the pieces' Hessians.

The operator is curvlinops' `HessianLinearOperator` with its product replaced, so that all of curvlinops works with it.
Its own product is forward over reverse mode, `jvp` of `jacrev`: that has no group norm, LSTM, checkpointing or
`autograd.Function` of the common kind, and in torch 2.13 gives wrong numbers where there is a `LayerNorm` with weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from batchlab.core.device import whole_float32
from batchlab.core.errors import InputError
from batchlab.core.modes import evaluating
from batchlab.core.random import derive_seed, preserved_generators, reseed
from batchlab.data.fetch import to_device
from batchlab.parallel.shards import is_spread

Loss = Callable[[nn.Module, Any], Tensor]
Piece = tuple[Any, int]

_NO_DOUBLE = ("is not implemented", "once_differentiable", "double backward", "does not currently support")


class LossSurface:
    """L(θ) around the model's weights as they are now.

    model: its parameters that require a gradient are θ, a shared one once; all of one dtype, float32 or float64, on
    one device. A DDP or compiled model is unwrapped: neither survives a second derivative. loss: `(model, batch) ->`
    scalar mean over the batch's examples. group: ranks that each hold a part of the examples; None for this process
    alone. seed: from which a loss that draws random numbers gets the same ones at every pass.
    """

    def __init__(self, model: nn.Module, loss: Loss, *, group: dist.ProcessGroup | None = None, seed: int = 0) -> None:
        self.model, self.loss, self.group, self.seed = _unwrapped(model), loss, group, seed
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        _check(self.parameters)
        self.size = sum(p.numel() for p in self.parameters)
        self._checked = False
        self.device, self.dtype = self.parameters[0].device, self.parameters[0].dtype

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Within it the loss is one fixed, twice differentiable function; after it the model is as it was.

        Evaluation mode: no dropout, and batch norm by its running statistics, as else the examples of a batch depend
        on each other. Attention by its plain formula, as flash kernels have no double backward; for the same reason
        no cuDNN where there are recurrent layers. No autocast, and no TF32, which would hide small eigenvalues.
        """
        recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        with contextlib.ExitStack() as stack:
            stack.enter_context(preserved_generators())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if recurrent and self.device.type == "cuda":
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(whole_float32())
            stack.enter_context(evaluating(self.model))
            yield

    def gradient(self, batch: Any) -> list[Tensor]:
        """∂L/∂θ of one batch, with its graph."""
        reseed(derive_seed(self.seed, "loss"))
        value = self.loss(self.model, to_device(batch, self.device))
        if not isinstance(value, Tensor) or value.ndim:
            shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"loss must return a scalar tensor, the mean over the batch's examples, got {shown}")
        if not value.requires_grad:
            return [torch.zeros_like(p) for p in self.parameters]
        options: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
        gradient = list(_differentiated(value, self.parameters, options))
        if not self._checked:
            _check_graph(gradient)
            self._checked = True
        return gradient

    def total(self, parts: list[Tensor]) -> list[Tensor]:
        """Summed over the ranks, in place."""
        if self.group is not None:
            for part in parts:
                dist.all_reduce(part, group=self.group)
        return parts

    def count(self, examples: int) -> int:
        """The sum of all ranks' examples."""
        if self.group is None:
            return examples
        return int(self.total([torch.tensor(float(examples), dtype=torch.float64, device=self.device)])[0].item())

    def mean_gradient(self, pieces: Sequence[Piece]) -> Tensor:
        """∂L/∂θ over all pieces of all ranks, flat (P,)."""
        examples = self.count(sum(n for _, n in pieces))
        mean = [torch.zeros_like(p) for p in self.parameters]
        for batch, n in pieces:
            for part, g in zip(mean, self.gradient(batch), strict=True):
                part.add_(g.detach(), alpha=n / examples)
        return torch.cat([part.reshape(-1) for part in self.total(mean)])

    def hessian(self, pieces: Sequence[Piece]) -> Any:
        """The Hessian over all pieces, this rank's part of it being `pieces`: a curvlinops operator, (P, P).

        One piece keeps its graph from product to product: half the time, and no more memory than one product takes.
        """
        return _operator_class()(self, pieces, self.count(sum(n for _, n in pieces)))


@cache
def _operator_class() -> Any:
    try:
        from curvlinops import HessianLinearOperator
    except ImportError as error:
        raise InputError('curvature needs the extra: pip install "batchlab[curvature]"') from error

    class MeanLossHessian(HessianLinearOperator):  # type: ignore[misc]
        """H of all pieces. A rank without any holds one of no examples: curvlinops wants some data."""

        def __init__(self, surface: LossSurface, pieces: Sequence[Piece], examples: int) -> None:
            self._surface = surface
            self._kept: list[Tensor] | None = None
            self._keep = len(pieces) == 1
            nothing = torch.zeros((), device=surface.device)
            data = [({"batch": batch, "examples": n}, nothing) for batch, n in pieces or [(None, 0)]]
            mean = SimpleNamespace(reduction="mean")
            options = {"num_data": examples, "batch_size_fn": lambda X: X["examples"], "check_deterministic": False}
            super().__init__(surface.model, mean, surface.parameters, data, **options)

        def _matmat(self, M: list[Tensor]) -> list[Tensor]:
            return self._surface.total(super()._matmat(M))

        def _matmat_batch(self, X: Any, y: Tensor, M: list[Tensor]) -> list[Tensor]:
            if not X["examples"]:
                return [torch.zeros_like(m) for m in M]
            gradient = self._kept or self._surface.gradient(X["batch"])
            self._kept = gradient if self._keep else None
            columns = M[0].shape[-1]
            products = [
                _product(gradient, self._surface.parameters, [m[..., k] for m in M], self._keep or k + 1 < columns)
                for k in range(columns)
            ]
            return [torch.stack(column, dim=-1) for column in zip(*products, strict=True)]

    return MeanLossHessian


def _product(gradient: list[Tensor], parameters: list[nn.Parameter], v: list[Tensor], keep: bool) -> list[Tensor]:
    pairs = [(g, part) for g, part in zip(gradient, v, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(p) for p in parameters]
    outputs, vectors = zip(*pairs, strict=True)
    options: dict[str, Any] = {"grad_outputs": vectors, "retain_graph": keep}
    return list(_differentiated(outputs, parameters, options | {"allow_unused": True, "materialize_grads": True}))


def _differentiated(outputs: Any, parameters: list[nn.Parameter], options: dict[str, Any]) -> Sequence[Tensor]:
    try:
        return torch.autograd.grad(outputs, parameters, **options)
    except RuntimeError as error:
        said = str(error)
        if not any(words in said for words in _NO_DOUBLE):
            raise
        raise InputError(f"the loss has no second derivative in torch: {said.splitlines()[0]}") from error


def _check_graph(gradient: list[Tensor]) -> None:
    """torch leaves a function marked `once_differentiable` out of a second derivative without a word."""
    seen: set[Any] = set()
    ahead = [g.grad_fn for g in gradient if g.grad_fn is not None]
    while ahead:
        node = ahead.pop()
        if node.name() == "torch::autograd::Error":
            raise InputError("the loss has no second derivative in torch: a function in it is once_differentiable")
        seen.add(node)
        ahead += [after for after, _ in node.next_functions if after is not None and after not in seen]


def _unwrapped(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    original = getattr(model, "_orig_mod", None)
    return _unwrapped(original) if isinstance(original, nn.Module) else model


def _check(parameters: list[nn.Parameter]) -> None:
    if sum(p.numel() for p in parameters) == 0:
        raise InputError("the model has no parameter that requires a gradient: its Hessian has no entry")
    if any(is_spread(p) for p in parameters):
        raise InputError("curvature needs whole parameters, got sharded ones (DTensor): measure an unsharded copy")
    dtypes = {p.dtype for p in parameters}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        names = sorted(map(str, dtypes))
        raise InputError(
            f"curvature needs all parameters float32, or all float64, got {names}: half precision loses the small "
            "eigenvalues"
        )
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise InputError(f"curvature needs all parameters on one device, got {sorted(map(str, devices))}")
