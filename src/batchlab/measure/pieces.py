"""The squared norm of each piece's own gradient, seen as the backward pass hands it over; no gradient is kept.

A hook on a leaf parameter sees what one backward pass adds to `.grad`, before it is added and before any rank's
share is averaged in: a pass over one tensor that is in the cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from batchlab.core.errors import InputError
from batchlab.measure.norms import CHUNK, flat, sq_norm, to_floats
from batchlab.measure.preconditioner import Preconditioner

WITNESS = 1024
_EXACT, _STRANGE = 1e-4, 0.05


class Piece(NamedTuple):
    """examples: in the piece. squares: |c|² of each parameter that it gave a gradient c to."""

    examples: int
    squares: list[float | Tensor]


class PieceNorms:
    """Hooks on parameters that act inside `watch` alone.

    merged: all pieces until `take` are one, the accumulated gradient of this process. weights: of the squares of each
    parameter's coordinates, read when a piece begins; all 1 if None.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, merged: bool = False, weights: Preconditioner | None = None
    ) -> None:
        self.parameters, self._merged, self._weights = list(parameters), merged, weights
        self._examples: int | None = None
        self._seen: dict[int, float | Tensor] = {}
        self._pieces: list[Piece] = []
        self.witness = Witness(self.parameters)
        make = self._merged_hook if merged else self._hook
        self._callbacks = [(p, make(index)) for index, p in enumerate(self.parameters)]
        self._callbacks.append((self.witness.parameter, self._testify))
        self._hooks: list[RemovableHandle] = []
        self.listen()

    def listen(self) -> None:
        """Puts the hooks on, where they are off."""
        if not self._hooks:
            self._hooks = [p.register_hook(callback) for p, callback in self._callbacks]  # type: ignore[no-untyped-call]

    @property
    def empty(self) -> bool:
        """Whether no piece has begun since the last `take`."""
        return not self._pieces and self._examples is None

    @contextlib.contextmanager
    def watch(self, examples: int) -> Iterator[None]:
        """Around the backward pass of one piece; a pass that raises is forgotten."""
        if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
            raise InputError(f"examples must be an integer of at least 1, got {examples!r}")
        if self._examples is not None:
            raise InputError("micro_batch must not be entered twice at once")
        self._examples = examples
        try:
            yield
            self._end(examples)
        finally:
            self._examples = None
            if not self._merged:
                self._seen = {}

    def _end(self, examples: int) -> None:
        if self._merged:
            before = self._pieces[0].examples if self._pieces else 0
            self._pieces = [Piece(before + examples, list(self._seen.values()))]
        else:
            self._pieces.append(Piece(examples, list(self._seen.values())))

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        parameter = self.parameters[index]
        plain = parameter.is_cpu and parameter.numel() <= CHUNK and parameter.dtype in (torch.float32, torch.float64)
        plain = plain and self._weights is None
        dot, strided, vector = torch.dot, torch.strided, parameter.ndim == 1

        def see(gradient: Tensor) -> None:
            if self._examples is None:
                return
            if index in self._seen:
                raise InputError(
                    "a parameter got two gradients in one micro_batch: give each backward pass a micro_batch of its "
                    "own, and checkpoint shared parameters with use_reentrant=False"
                )
            if plain and gradient.layout is strided:
                whole = gradient if vector else flat(gradient)
                self._seen[index] = dot(whole, whole).item()
            else:
                self._seen[index] = self._square(index, gradient)

        return see

    def _merged_hook(self, index: int) -> Callable[[Tensor], None]:
        parameter = self.parameters[index]

        def see(gradient: Tensor) -> None:
            if self._examples is not None:
                before = parameter.grad
                self._seen[index] = self._square(index, gradient if before is None else before + gradient)

        return see

    def _square(self, index: int, gradient: Tensor) -> float | Tensor:
        weighted = self._weights is not None and self._weights.known
        square = sq_norm(gradient, self._weights[index] if weighted and self._weights is not None else None)
        return square.item() if square.is_cpu else square

    def _testify(self, gradient: Tensor) -> None:
        if self._examples is not None and self.witness.wanted:
            self.witness.see(gradient)

    def take(self) -> list[Piece]:
        """The pieces since the last `take`, which are then forgotten."""
        pieces, self._pieces, self._seen = self._pieces, [], {}
        return pieces

    def close(self) -> None:
        """Takes the hooks off; `listen` puts them on again."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters if self._hooks else ():
            if not parameter._backward_hooks:
                parameter._backward_hooks = None  # an empty dict costs 2 µs a pass
        self._hooks = []


class Witness:
    """One small parameter whose gradients are added up, to tell whether those seen are those in `.grad`.

    The largest with at most 1,024 numbers, else the smallest. wanted: whether it listens.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        small = [p for p in parameters if p.numel() <= WITNESS]
        self.parameter = max(small, key=Tensor.numel) if small else min(parameters, key=Tensor.numel)
        self.wanted = True
        self.nothing = torch.zeros(0, device=self.parameter.device, dtype=torch.float64)
        self.forget()

    def forget(self) -> None:
        """Begins anew."""
        self.sum: Tensor | None = None
        self.squares: list[Tensor] = []

    def see(self, gradient: Tensor) -> None:
        """Adds what one backward pass gives."""
        gradient = gradient.detach().to_dense()
        self.sum = gradient.clone() if self.sum is None else self.sum.add_(gradient)
        self.squares.append(sq_norm(gradient))

    def take(self) -> Tensor:
        """Σc and, last, Σ|c|², as one vector on the parameter's device; forgotten then."""
        total, squares = self.sum, self.squares
        self.forget()
        if total is None:
            return torch.zeros(self.parameter.numel() + 1, device=self.parameter.device, dtype=torch.float64)
        return torch.cat([total.flatten(), torch.stack(squares).sum().reshape(1)]).double()

    def factor(self, seen: Tensor, pieces: int, expected: float) -> float:
        """f in Σc = f·grad, over all pieces of all ranks: `seen` is the sum of the ranks' `take`.

        expected: f where nothing was done to the gradient, 1, or the ranks that it was averaged over. A loss scale
        that was taken out, or a division after the backward passes, is another f. Where the gradient cancels so far
        that nothing can be told, `expected`. Raises `InputError` where Σc is no multiple of `.grad`.
        """
        gradient = self.parameter.grad
        if gradient is None:
            return expected
        c, g = seen[:-1], gradient.detach().to_dense().flatten().to(seen)
        cc, cg, gg, each = to_floats([torch.dot(c, c), torch.dot(c, g), torch.dot(g, g), seen[-1]])
        reach = (each * pieces) ** 0.5
        if max(cc - cg * cg / gg if gg else cc, 0.0) ** 0.5 > _STRANGE * reach:
            raise InputError(
                "the gradients seen in micro_batch do not add up to .grad: every backward pass since zero_grad must be "
                "in a micro_batch, and step must come before anything but a common factor changes .grad"
            )
        unsure = max(_EXACT, 8 * torch.finfo(gradient.dtype).eps) * reach / (cc**0.5 or 1.0)
        if gg == 0 or unsure > 0.5 or abs(cg / gg / expected - 1) <= unsure:
            return expected
        return cg / gg
