"""Per-example gradients of normalisation layers, read off each layer's input and output gradient.

y = γ·x̂ + β, so example i adds Σ_t g·x̂ to the gradient of γ and Σ_t g to that of β, g the gradient at y and t all that
belongs to the example.

Of a large batch, evenly spaced examples stand for all: their mean |c_i|² is right on average, and a running mean over
many steps needs few from each.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from batchlab.measure.examples.factors import wide
from batchlab.measure.noise.pieces import Piece
from batchlab.measure.noise.witness import Witness
from batchlab.measure.norms import sq_norm, total
from batchlab.parallel.shards import Mesh

FEW = 64


class NormPieces:
    """Hooks on layer, RMS and group norms that act inside `watch` alone; the same surface as `ExamplePieces`.

    parameters: theirs. In a step of 2·64 examples or more, about 64 are looked at, in one or some of its passes; turn
    by turn each example's place comes once. The 64 are batchlab's own: on the digits' CNN 8 of 64 made the estimate
    vary three times as much as all did.

    `sound` turns false for good, after the step, where a layer was called with something whose first dimension is not
    the examples; nothing is told of that step then. Whether the numbers are right is for the caller to compare with
    `ExamplePieces` now and then.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._places = {parameter: place for place, parameter in enumerate(self.parameters)}
        self._modules = [m for m in model.modules() if isinstance(m, (*_NORMALISED,)) and self._own(m)]
        held = {p for m in self._modules for _, p in self._own(m)}
        self.sound = held == set(self.parameters)
        self.witness, self.meshes = Witness(self.parameters), dict[int, Mesh]()
        self._examples: int | None = None
        self._looked_at = slice(None)
        self._turn, self._passes, self._total = 0, 1, 0
        self._spoiled = False
        self._rows: dict[int, Tensor] = {}
        self._pieces: list[Piece] = []
        self._hooks: list[RemovableHandle] = []

    def _own(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        named = module.named_parameters(recurse=False)
        return [(name, parameter) for name, parameter in named if parameter in self._places]

    @property
    def empty(self) -> bool:
        """Whether no pass has begun since the last `take`."""
        return not self._pieces and self._examples is None

    @contextlib.contextmanager
    def watch(self, examples: int, *, every_one: bool = False) -> Iterator[None]:
        """Around the forward and the backward pass of one micro-batch; a pass that raises is forgotten."""
        self._examples, self._rows = examples, {}
        self._looked_at = slice(None) if every_one else self._sample()
        told = len(range(examples)[self._looked_at])
        hooks = [module.register_forward_hook(self._see) for module in self._modules] if told else []
        hooks.append(self.witness.listener(self._testify))
        try:
            yield
            squares = {place: sq_norm(rows) for place, rows in self._rows.items()}
            self._pieces.append(Piece(examples, dict(squares), number=examples, left_out=examples - told))
        finally:
            self._examples, self._rows = None, {}
            for hook in hooks:
                hook.remove()

    def _sample(self) -> slice:
        """Which examples of the next pass to look at: of all passes alike, by what the last step had."""
        stride = max(1, self._total // FEW)
        of_passes = min(stride, self._passes)
        of_examples = stride // of_passes
        turn, place = divmod(self._turn, of_passes)
        return slice(turn % of_examples, None, of_examples) if len(self._pieces) % of_passes == place else slice(0)

    def _testify(self, gradient: Tensor) -> None:
        if self.witness.wanted:
            self.witness.see(gradient)

    def _see(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        if output.ndim < 2 or len(output) != self._examples or not inputs:
            self._spoiled = True
            return
        own, looked_at = self._own(module), self._looked_at
        x = inputs[0].detach() if any(name == "weight" for name, _ in own) else None
        output.register_hook(lambda g: self._add(module, own, x, g.detach()[looked_at]))  # type: ignore[no-untyped-call]

    def _add(self, module: nn.Module, own: Sequence[tuple[str, nn.Parameter]], x: Tensor | None, g: Tensor) -> None:
        for name, parameter in own:
            terms = wide(g)
            if name == "weight" and x is not None:
                terms = _normalised(module, x[self._looked_at]).mul_(terms)
            place, rows = self._places[parameter], _rows(module, terms)
            before = self._rows.get(place)
            self._rows[place] = rows if before is None else before + rows

    @property
    def square(self) -> float:
        """Σ|c_i|² over all examples since the last `take`."""
        return total([square for piece in self._pieces for square in piece.squares.values()])

    def choose_witness(self) -> bool:
        """Another witness, where the one there is got no gradient."""
        return self.witness.choose_anew()

    def take(self) -> list[Piece]:
        """The passes since the last `take`, which are then forgotten."""
        pieces, self._pieces = self._pieces, []
        if self._spoiled:
            self.sound = self._spoiled = False
            pieces = [piece._replace(squares={}, left_out=piece.number) for piece in pieces]
        self._turn += 1
        if pieces:
            self._passes, self._total = len(pieces), sum(piece.examples for piece in pieces)
        return pieces

    def state_dict(self) -> dict[str, int]:
        """Which examples are looked at next."""
        return {"turn": self._turn, "passes": self._passes, "total": self._total, "sound": int(self.sound)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes over what `state_dict` gave."""
        self._turn, self._passes, self._total = (state[name] for name in ("turn", "passes", "total"))
        self.sound = self.sound and bool(state["sound"])

    def unmet(self, pieces: Sequence[Piece]) -> list[int]:
        """None: parameters spread over ranks are refused where all layers are measured."""
        return []

    def listen(self) -> None:
        """Nothing to put on: hooks live inside `watch`."""

    def close(self) -> None:
        """Nothing to take off."""


def _layer_norm(module: Any, x: Tensor) -> Tensor:
    return F.layer_norm(wide(x), module.normalized_shape, eps=module.eps)


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    return F.rms_norm(wide(x), module.normalized_shape, eps=eps)


def _group_norm(module: Any, x: Tensor) -> Tensor:
    return F.group_norm(wide(x), module.num_groups, eps=module.eps)


_NORMALISED: dict[type, Callable[[Any, Tensor], Tensor]] = {
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
}


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """As the class that the module is of, or is derived from, does it."""
    return next(normalise for kind, normalise in _NORMALISED.items() if isinstance(module, kind))(module, x)


def _rows(module: Any, terms: Tensor) -> Tensor:
    """Σ_t of [n, ...], t all that is not a feature of the module: (n, features)."""
    if isinstance(module, nn.GroupNorm):
        return terms.reshape(*terms.shape[:2], -1).sum(2)
    return terms.reshape(len(terms), -1, math.prod(module.normalized_shape)).sum(1)
