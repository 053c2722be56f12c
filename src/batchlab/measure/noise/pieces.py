"""The squared norm of each piece's own gradient, seen as the backward pass hands it over; no gradient is kept.

A hook on a leaf parameter sees what one backward pass adds to `.grad`, before it is added and before any rank's
share is averaged in: a pass over one tensor that is in the cache. Where `fully_shard` keeps a shard of a parameter, the
leaf is the whole one that stands in its place in its module from each forward pass on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.measure.noise.device_norms import DeviceNorms
from batchlab.measure.noise.preconditioner import Preconditioner
from batchlab.measure.noise.witness import Witness
from batchlab.measure.norms import CHUNK, DEVICE_CHUNK, dense_sq_norm, flat, sq_norm, sq_norm_of_sum
from batchlab.parallel.shards import Mesh, is_spread, part_like, share


class Piece(NamedTuple):
    """What one backward pass told. examples: that it was over. squares: |c|² of each parameter that it gave a gradient
    c to, by the parameter's place; this rank's share of it where c is spread over a mesh of ranks.

    number: 1, or where each example's own c is known, the examples, and squares hold the sums of their |c|². left_out:
    how many of these examples were not looked at; those that were stand for them.
    """

    examples: int
    squares: dict[int, float | Tensor]
    number: int = 1
    left_out: int = 0


class PieceNorms:
    """Hooks on parameters that act inside `watch` alone.

    merged: all pieces until `take` are one, the accumulated gradient of this process. Where `model` is a
    DistributedDataParallel, passes in its `no_sync` are then not looked at, but only the one that ends the sum; a step
    in which a parameter got a gradient before that one but not in it has NaN, and from then on each pass is looked at.
    weights: of the squares of each
    parameter's coordinates, read when a piece begins; all 1 if None. model: the modules that hold the parameters, where
    some are spread over ranks. meshes: the ranks that a parameter's gradient was spread over when it was seen.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        merged: bool = False,
        weights: Preconditioner | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.parameters, self._merged, self._weights = list(parameters), merged, weights
        self._examples: int | None = None
        self._seen: dict[int, float | Tensor] = {}
        self._norms = DeviceNorms()
        self._pieces: list[Piece] = []
        self.witness = Witness(self.parameters)
        self.meshes: dict[int, Mesh] = {}
        self._spread = _holders(model, self.parameters)
        self._ddp = model if isinstance(model, DistributedDataParallel) else None
        self._awaited: set[int] = set()
        self._stand_ins: dict[int, tuple[Tensor, list[RemovableHandle]]] = {}
        self._hooks: list[RemovableHandle] = []
        self.listen()

    def listen(self) -> None:
        """Puts the hooks on, where they are off; on parameters that were frozen since, none."""
        if self._hooks:
            return
        for index, parameter in enumerate(self.parameters):
            self._hooks += self._attach(index, parameter) if parameter.requires_grad else []
        self._hooks += [module.register_forward_pre_hook(self._meet) for module in self._spread]

    def _attach(self, index: int, leaf: Tensor) -> list[RemovableHandle]:
        make = self._merged_hook if self._merged else self._hook
        hooks = [leaf.register_hook(make(index, leaf))]  # type: ignore[no-untyped-call]
        if self.parameters[index] is self.witness.parameter:
            hooks.append(leaf.register_hook(self._testify_hook(leaf)))  # type: ignore[no-untyped-call]
        return hooks

    def _meet(self, module: nn.Module, _: Any) -> None:
        """Before a module's forward pass: hooks on the whole parameters that stand in for its shards."""
        for name, index in self._spread[module]:
            leaf = module._parameters[name]
            if leaf is None or leaf is self.parameters[index]:
                continue
            known, hooks = self._stand_ins.get(index, (None, []))
            if known is not leaf:
                for hook in hooks:
                    hook.remove()
                self._stand_ins[index] = (leaf, self._attach(index, leaf))

    def unmet(self, pieces: Sequence[Piece]) -> list[int]:
        """The places of spread parameters that have a gradient which none of `pieces` saw."""
        places = {index for held in self._spread.values() for _, index in held}
        places -= {index for piece in pieces for index in piece.squares}
        return sorted(index for index in places if self.parameters[index].grad is not None)

    @property
    def empty(self) -> bool:
        """Whether no piece has begun since the last `take`."""
        return not self._pieces and self._examples is None

    @contextlib.contextmanager
    def watch(self, examples: int) -> Iterator[None]:
        """Around the backward pass of one piece; a pass that raises is forgotten."""
        check_count(examples=examples)
        if self._examples is not None:
            raise InputError("micro_batch must not be entered twice at once")
        self._examples = examples
        try:
            yield
            self._end(examples)
        finally:
            self._examples = None
            self._norms.clear()
            if not self._merged:
                self._seen = {}

    def _end(self, examples: int) -> None:
        self._seen.update(self._norms.squares())
        if self._merged:
            before = self._pieces[0].examples if self._pieces else 0
            self._pieces = [Piece(before + examples, dict(self._seen))]
        else:
            self._pieces.append(Piece(examples, self._seen))

    def _plain(self, leaf: Tensor) -> bool:
        """Whether dot products give the square."""
        plain = leaf.is_cpu and leaf.dtype in (torch.float32, torch.float64)
        return plain and self._weights is None and not is_spread(leaf)

    def _hook(self, index: int, leaf: Tensor) -> Callable[[Tensor], None]:
        plain, strided, vector = self._plain(leaf), torch.strided, leaf.ndim == 1
        at_once = leaf.is_cuda and self._weights is None and not is_spread(leaf)

        def see(gradient: Tensor) -> None:
            if self._examples is None:
                return
            if index in self._seen:
                raise InputError(
                    "a parameter got two gradients in one micro_batch: give each backward pass a micro_batch of its "
                    "own, and checkpoint shared parameters with use_reentrant=False"
                )
            if plain and gradient.layout is strided:
                self._seen[index] = dense_sq_norm(gradient if vector else flat(gradient))
            elif at_once and gradient.layout is strided:
                self._seen[index] = math.nan  # until the pass ends
                self._norms.see(index, gradient, keeps=leaf.grad is not None)
            else:
                self._seen[index] = self._square(index, gradient)

        return see

    def _merged_hook(self, index: int, leaf: Tensor) -> Callable[[Tensor], None]:
        plain, strided, small = self._plain(leaf), torch.strided, leaf.numel() <= CHUNK
        at_once = leaf.is_cuda and self._weights is None and not is_spread(leaf) and leaf.numel() <= DEVICE_CHUNK

        def see(gradient: Tensor) -> None:
            if self._examples is None:
                return
            if self._ddp is not None and not self._ddp.require_backward_grad_sync:
                self._awaited.add(index)
                return
            before = leaf.grad
            if before is None and index in self._seen:
                raise InputError(
                    'method "ranks" reads the sum of a rank\'s micro-batches off .grad, which was taken away '
                    "between two of them: under fully_shard, set_requires_gradient_sync(False) on all but the last"
                )
            if plain and gradient.layout is strided and (small or before is None):
                self._seen[index] = dense_sq_norm(flat(gradient if before is None else before + gradient))
            elif at_once and gradient.layout is strided:
                self._norms.see(index, gradient if before is None else before + gradient, keeps=False)
            elif before is None or self._weights is not None or is_spread(leaf) or gradient.is_sparse:
                self._seen[index] = self._square(index, gradient if before is None else before + gradient)
            else:
                self._seen[index] = sq_norm_of_sum(before, gradient)

        return see

    def _square(self, index: int, gradient: Tensor) -> float | Tensor:
        held = share(gradient)
        if held.mesh is not None:
            self.meshes[index] = held.mesh
        square = sq_norm(held.part, self._weight_of(index, gradient)) / held.holders
        return square.item() if square.is_cpu else square

    def _weight_of(self, index: int, gradient: Tensor) -> Tensor | None:
        """The weights of the part of `gradient` that this rank holds."""
        if self._weights is None or not self._weights.known:
            return None
        return part_like(self._weights[index], gradient)

    def _testify_hook(self, leaf: Tensor) -> Callable[[Tensor], None]:
        def testify(gradient: Tensor) -> None:
            if self._examples is not None and self.witness.wanted:
                self.witness.see(gradient, before=leaf.grad if self._merged else None)

        return testify

    def choose_witness(self) -> bool:
        """Another witness, with its hook, where the one there is got no gradient."""
        chosen = self.witness.choose_anew()
        if chosen:
            self.close()
            self.listen()
        return chosen

    def take(self) -> list[Piece]:
        """The pieces since the last `take`, which are then forgotten."""
        pieces, self._pieces, self._seen = self._pieces, [], {}
        for index in self._awaited - set(pieces[0].squares) if pieces else ():
            pieces[0].squares[index], self._ddp = math.nan, None
        self._awaited = set()
        return pieces

    def close(self) -> None:
        """Takes the hooks off; `listen` puts them on again."""
        for hook in self._hooks + [hook for _, hooks in self._stand_ins.values() for hook in hooks]:
            hook.remove()
        self._stand_ins = {}
        for parameter in self.parameters if self._hooks else ():
            if not parameter._backward_hooks:
                parameter._backward_hooks = None  # an empty dict costs 2 µs a pass
        self._hooks = []


def _holders(model: nn.Module | None, parameters: Sequence[nn.Parameter]) -> dict[nn.Module, list[tuple[str, int]]]:
    """The modules that hold parameters spread over ranks: under which name, and each parameter's place."""
    places = {parameter: place for place, parameter in enumerate(parameters) if is_spread(parameter)}
    held: dict[nn.Module, list[tuple[str, int]]] = {}
    for module in model.modules() if model is not None and places else ():
        found = [(name, places[p]) for name, p in module._parameters.items() if p is not None and p in places]
        if found:
            held[module] = found
    return held
