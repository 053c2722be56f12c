"""Exact |g_i|² of every example of a batch, from one forward and backward pass of the mean loss.

What a layer rule covers is read off that pass (`example_norms`). What none covers is differentiated example by example,
for those parameters alone: with `torch.func` a few examples at once, or one by one where that cannot be.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from batchlab.core.checks import check_count
from batchlab.core.device import TF32_EPS, product_eps
from batchlab.core.errors import InputError
from batchlab.core.random import preserved_generators
from batchlab.measure.examples.example_norms import ExampleNorms, ExampleRecord
from batchlab.measure.examples.factors import row_squares, wide

MEMORY_BYTES = 2**28
DROPOUT = (nn.modules.dropout._DropoutNd, nn.RReLU)


@dataclass(frozen=True, eq=False)
class ExampleSqNorms:
    """What `per_example_sq_norms` found of n examples.

    values: |g_i|² over all parameters, [n], float64. by_parameter: each parameter's own part, [n], by its first name;
    one without a gradient is absent. loss: of the whole batch. rules: how each parameter's part came about:
    "ghost" (no gradient was made), "instantiated" (those of some examples at a time, layer by layer), "functional"
    (`torch.func`, some examples at a time), "loop" (one example at a time). memory_bytes: the bound that was asked
    for. gradient_bytes: of per-example gradients that "functional" or "loop" held at once, 0 without them; above the
    bound only where one example's gradient is. checked: whether two examples were differentiated on their own and
    compared. notes: what else came about, in sentences.
    """

    values: Tensor
    by_parameter: Mapping[str, Tensor]
    loss: float
    rules: Mapping[str, str]
    memory_bytes: int
    gradient_bytes: int = 0
    checked: bool = False
    notes: tuple[str, ...] = field(default=())


def per_example_sq_norms(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    examples: int | None = None,
    units: Callable[[Any], int] | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> ExampleSqNorms:
    """|g_i|² of each example's own gradient g_i, without holding the gradients of all.

    loss: `(model, batch) -> scalar`, the mean over the batch's examples, as in `batchlab.Job`. batch: tensors whose
    first dimension is the examples, in dicts, lists and tuples; what else is in it goes to each example as it is.
    examples: how many; the first dimension of the first tensor by default. units: `batch -> count` where the loss is
    a mean over something that examples hold different numbers of, as tokens: then the loss of the batch is
    Σ(u_i/Σu)·loss_i, and g_i is the gradient of n·(u_i/Σu)·loss_i, so that the mean of all g_i is still the batch's
    gradient. memory_bytes: bound on temporary per-example tensors, 256 MiB by default; one example's are held in any
    case.

    Two examples, that of the largest norm among them, are also differentiated alone, and what differs is refused:
    losses that compare examples, or means over something else. Active dropout makes this impossible, and the result
    says that it is unchecked; with dropout and a parameter that no rule covers (recurrent layers, weights computed
    from parameters; see `ExampleNorms`), the masks could not be repeated, and the function refuses. Batch
    normalisation in training mode is refused: an example has no gradient of its own there.

    The model's weights, buffers, `.grad`, modes and the global generators are left as they were. To measure along
    training use `ExampleNorms` or `GradientNoise`, which need no pass of their own.

    >>> from torch import nn
    >>> line = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(line.weight)
    >>> x = torch.tensor([[1.0], [2.0], [0.5], [0.0]])
    >>> per_example_sq_norms(line, lambda model, x: model(x).square().mean(), x).values.tolist()
    [4.0, 64.0, 0.25, 0.0]
    """
    n = _count(batch) if examples is None else examples
    check_count(examples=n)
    norms = ExampleNorms(model, strict=False, memory_bytes=memory_bytes)
    with preserved_generators(), _left_alone(model), torch.enable_grad():
        record, value, random = _pass(norms, model, loss, batch, n)
        one = _OneByOne(model, loss, batch, n, _weights(batch, n, units))
        if random and record.uncovered:
            _refuse_random(model, record)
        own = one.gradients(list(record.uncovered), memory_bytes) if record.uncovered else None
        if own is not None:
            _same_mean(own.losses, value)
            record.by_parameter.update(own.squares)
            record.rules.update(dict.fromkeys(own.squares, own.rule))
        checked = not random and one.possible and n > 1
        if checked:
            _compare(one, record)
    notes = () if own is None or not own.why else (f"torch.func could not be used: {own.why}",)
    return ExampleSqNorms(
        record.sq_norms(),
        record.by_parameter,
        value.item(),
        record.rules,
        memory_bytes,
        0 if own is None else own.held,
        checked,
        notes if checked or n == 1 else (*notes, "not checked against single examples"),
    )


def _pass(
    norms: ExampleNorms, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, n: int
) -> tuple[ExampleRecord, Tensor, bool]:
    """The record, the loss, and whether random numbers were drawn."""
    before = _generators()
    with norms.watch(n) as record:
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise InputError(f"loss must return a scalar tensor that depends on the model's parameters, got {value!r}")
        random = any(not torch.equal(a, b) for a, b in zip(before, _generators(), strict=True))
        value.sum().backward()  # type: ignore[no-untyped-call]
    return record, value.detach(), random


def _generators() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *cuda]


def _refuse_random(model: nn.Module, record: ExampleRecord) -> None:
    active = [name for name, module in model.named_modules() if isinstance(module, DROPOUT) and module.training]
    where = (
        f"{active[0]} and {len(active) - 1} more draw" if len(active) > 1 else f"{(active or ['the model'])[0]} draws"
    )
    name, reason = next(iter(record.uncovered.items()))
    raise InputError(
        f"{name} must be differentiated one example at a time ({reason}), but {where} random numbers that cannot be "
        "repeated there: put dropout in eval mode"
    )


@contextlib.contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """`.grad` and buffers as they were."""
    gradients = [(p, p.grad) for p in model.parameters()]
    modules = [(module, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, own in modules:
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, saved in buffers:
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)


def _count(batch: Any) -> int:
    found: list[int] = []
    _map(batch, lambda tensor: found.append(len(tensor)) if tensor.ndim else None)
    if not found:
        raise InputError("batch holds no tensor that tells how many examples it has: give examples=")
    return found[0]


def _map(batch: Any, take: Callable[[Tensor], Any]) -> Any:
    """The batch with take(t) for each tensor t."""
    if isinstance(batch, Tensor):
        return take(batch)
    if isinstance(batch, Mapping):
        mapped = {key: _map(value, take) for key, value in batch.items()}
        return mapped if type(batch) is dict else type(batch)(mapped)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(value, take) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_map(value, take) for value in batch)
    return batch


def _weights(batch: Any, n: int, units: Callable[[Any], int] | None) -> Tensor:
    """n·u_i/Σu, 1 without units."""
    if units is None:
        return torch.ones(n, dtype=torch.float64)
    counts = torch.tensor([float(units(_example(batch, n, i))) for i in range(n)], dtype=torch.float64)
    if not (counts >= 0).all() or counts.sum() <= 0:
        raise InputError(f"units must give counts of at least 0 and not 0 for all, got {counts.tolist()[:8]}")
    return counts * (n / counts.sum())


def _example(batch: Any, n: int, index: int) -> Any:
    return _map(batch, lambda tensor: tensor[index : index + 1] if tensor.ndim and len(tensor) == n else tensor)


class _Objective(nn.Module):
    """The loss as a module, so that `functional_call` can put other parameters in."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.training = model.training

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch).sum()


class _Own(NamedTuple):
    """squares: |g_i|² by parameter, [n] each. losses: n·(u_i/Σu)·loss_i. held: bytes at once. why: no vmap."""

    squares: dict[str, Tensor]
    losses: Tensor
    rule: str
    held: int
    why: str = ""


class _OneByOne:
    """Examples differentiated on their own, each weighted as in the batch's loss."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, n: int, w: Tensor):
        self._parameters = dict(model.named_parameters())
        self._objective, self._batch, self._n, self.weights = _Objective(model, loss), batch, n, w
        self._tensors: list[Tensor] = []
        _map(batch, lambda tensor: self._tensors.append(tensor) if tensor.ndim and len(tensor) == n else None)

    @property
    def possible(self) -> bool:
        """Whether the batch can be taken apart."""
        return bool(self._tensors)

    def gradients(self, names: list[str], memory_bytes: int) -> _Own:
        """Of the named parameters, for all examples."""
        if not self.possible:
            raise InputError(
                f"{names[0]} must be differentiated one example at a time, but batch holds no tensor whose first "
                f"dimension is the {self._n} examples"
            )
        parameters = {name: self._parameters[name].detach() for name in names}
        one = sum(p.numel() * p.element_size() for p in parameters.values())
        step = max(1, min(self._n, memory_bytes // one))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            try:
                chunks = [self._together(parameters, i, min(i + step, self._n)) for i in range(0, self._n, step)]
                rule, held, why = "functional", step * one, ""
            except Exception as error:  # whatever has no batching rule; a true error comes again in the loop
                why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                chunks = [self.example(names, i) for i in range(self._n)]
                rule, held = "loop", one
        squares = {name: torch.cat([part[name] for part, _ in chunks]) for name in names}
        return _Own(squares, torch.cat([losses for _, losses in chunks]), rule, held, why)

    def _together(self, parameters: dict[str, Tensor], start: int, stop: int) -> tuple[dict[str, Tensor], Tensor]:
        def value(parameters: dict[str, Tensor], tensors: list[Tensor], weight: Tensor) -> Tensor:
            values = iter(tensors)
            n = self._n
            batch = _map(self._batch, lambda t: next(values)[None] if t.ndim and len(t) == n else t)
            named = {f"model.{name}": parameter for name, parameter in parameters.items()}
            loss: Tensor = functional_call(self._objective, named, (batch,))
            return loss * weight

        tensors = [tensor[start:stop] for tensor in self._tensors]
        first = next(iter(parameters.values()))
        weights = self.weights[start:stop].to(first.device, wide(first).dtype)
        gradients, losses = vmap(grad_and_value(value), in_dims=(None, 0, 0))(parameters, tensors, weights)
        return {name: row_squares(wide(gradient).flatten(1)) for name, gradient in gradients.items()}, losses

    def example(self, names: list[str], index: int) -> tuple[dict[str, Tensor], Tensor]:
        """Of one example, [1] each; a parameter that it does not use has 0."""
        parameters = [self._parameters[name] for name in names]
        weight = float(self.weights[index])
        with torch.enable_grad():
            value = self._objective(_example(self._batch, self._n, index)) * weight
            try:
                gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                raise InputError("loss uses reentrant checkpointing: set use_reentrant=False in checkpoint") from None
        zero = torch.zeros(1, device=value.device)
        return {
            name: zero if g is None else row_squares(wide(g.to_dense()).reshape(1, -1))
            for name, g in zip(names, gradients, strict=True)
        }, value.detach().reshape(1)


_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
_TF32_TOLERANCE = 1e-2


def _tolerance(like: Tensor) -> float:
    """Relative, of sums that were made of such numbers in two ways."""
    return _TF32_TOLERANCE if product_eps(like) == TF32_EPS else _TOLERANCE.get(like.dtype, 0.1)


def _same_mean(losses: Tensor, value: Tensor) -> None:
    """Whether the batch's loss is the weighted mean of its examples'."""
    mean, reach = losses.double().mean().item(), losses.double().abs().mean().item()
    if abs(mean - value.item()) > _tolerance(losses) * reach:
        raise InputError(_strange(f"it is {value.item():.6g}, and the mean of the examples' own losses is {mean:.6g}"))


def _compare(one: _OneByOne, record: ExampleRecord) -> None:
    """The largest of all norms, and the last one, against the example's own gradient."""
    names = [name for name, rule in record.rules.items() if rule not in ("functional", "loop")]
    if not names:
        return
    seen = record.sq_norms(names)
    coarsest = min((record.by_parameter[name] for name in names), key=lambda each: torch.finfo(each.dtype).bits)
    tolerance = _tolerance(coarsest) if record.eps <= torch.finfo(coarsest.dtype).eps else 0.1
    for index in {int(seen.nan_to_num(0.0).argmax()), len(seen) - 1}:
        own = sum(float(square) for square in one.example(names, index)[0].values())
        if abs(own - float(seen[index])) > tolerance * max(own, float(seen.nan_to_num(0.0).mean())):
            raise InputError(
                _strange(f"|g|² of example {index} is {float(seen[index]):.6g} in the batch and {own:.6g} alone")
            )


def _strange(what: str) -> str:
    return (
        f"loss must be the mean over independent examples, but {what}: give units= for a mean over tokens; a loss that "
        "compares examples has no gradient per example"
    )
