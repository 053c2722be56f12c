"""What a layer rule speaks of: parts of parameters, where the examples are, and what a pass is told of a use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from batchlab.measure.examples.factors import Dense, Piece, wide


class Part(NamedTuple):
    """A slice start..stop of one dimension of the parameter at `place`; the whole where dim is None."""

    place: int
    dim: int | None = None
    start: int = 0
    stop: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """This part of the parameter, or of its gradient."""
        return tensor if self.dim is None else tensor.narrow(self.dim, self.start, self.stop - self.start)


class View(NamedTuple):
    """A tensor of the forward pass that is a part of a parameter, or its transpose."""

    part: Part
    shape: torch.Size
    transposed: bool = False


class Layout(NamedTuple):
    """Where n examples are in a tensor: n equal groups of dim 0, one after the other; or dim 1.

    interleaved: dim 0 is both, [T·n], to be seen as [T, n].
    """

    n: int
    dim: int = 0
    interleaved: bool = False

    def first(self, tensor: Tensor) -> Tensor:
        """The examples, or their groups, first; a view."""
        if self.interleaved:
            tensor = tensor.reshape(-1, self.n, *tensor.shape[1:])
        return tensor.transpose(0, 1) if self.dim else tensor

    def fold(self, tensor: Tensor, features: int = 1) -> Tensor:
        """[n, T, *features], T all other positions together."""
        tensor = self.first(tensor)
        return tensor.reshape(self.n, -1, *tensor.shape[tensor.ndim - features :])


def layout_of(lead: torch.Size, n: int, *, second: bool = False) -> Layout | None:
    """From the sizes before the features; second: the examples are not first where that can be."""
    if len(lead) > 1 and lead[1] == n and (second or lead[0] != n):
        return Layout(n, 1)
    if len(lead) and lead[0] and lead[0] % n == 0:
        return Layout(n, 1, True) if second and len(lead) == 1 else Layout(n)
    return None


Pieces = Callable[[Tensor], Iterable[tuple[Part, Piece]]]


class Uses(Protocol):
    """What a rule may ask and tell."""

    examples: int
    second: bool

    def view(self, tensor: Any) -> View | None:
        """What part of which watched parameter it is."""

    def constant(self, tensor: Tensor) -> bool:
        """Whether it is a buffer or a frozen parameter of the model: its rows are no examples."""

    def derive(self, tensor: Tensor, view: View) -> None:
        """`tensor` is that part of a parameter."""

    def swap(self, tensor: Tensor, out: Tensor) -> None:
        """Two dimensions of n, the first of them one, have changed places."""

    def use(self, out: Tensor, name: str, parts: list[Part], layout: Layout, pieces: Pieces, source: bool) -> Any:
        """The parts got used to make `out`. source: no gradient flows on to what else was used."""

    def lend(self, out: Tensor, weight: View, index: Tensor, padding: int | None, use: Any) -> None:
        """`out` is an embedding of an index; `use` is how it was read, which a broadcast of `out` shows to be wrong."""

    def lent(self, tensor: Any) -> tuple[View, Tensor, int | None] | None:
        """What was lent as `tensor`; its use is taken back."""


def is_source(*inputs: Any) -> bool:
    return not any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in inputs)


def summed(terms: Tensor) -> Dense:
    """Over the positions of [n, T, ...]."""
    terms = wide(terms)
    return Dense(terms.sum(1) if terms.shape[1] > 1 else terms[:, 0], terms)


def scaled(g: Tensor, normal: Callable[[], Tensor], w: View | None, b: View | None) -> Iterable[tuple[Part, Piece]]:
    """out = w·normal + b, all [n, T, ...]. normal² is about 1, so that g stands for the size of the terms g·normal."""
    if b:
        yield b.part, summed(g)
    if w:
        yield w.part, Dense(normal().mul_(g).sum(1), g)


def channels(n: int) -> Callable[[Tensor], Tensor]:
    """[N, C, *spatial] to [n, T, C]."""

    def fold(tensor: Tensor) -> Tensor:
        return tensor.reshape(n, len(tensor) // n, tensor.shape[1], -1).transpose(2, 3).flatten(1, 2)

    return fold


@dataclass(eq=False)
class RecordedUse:
    """One call that used parts of parameters."""

    name: str
    parts: list[Part]
    layout: Layout
    edge: GradientEdge | None
    pieces: Pieces | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    source: bool
    index: Tensor | None = None
    taken_back: bool = False
    verified: bool = False
    mixed: bool = False
