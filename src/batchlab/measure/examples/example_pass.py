"""One forward and backward pass under `ExampleNorms`: the uses that it saw, and what came back to them."""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from batchlab.core.device import product_eps
from batchlab.core.errors import InputError
from batchlab.measure.examples.factors import Factors, Piece, Vectors, row_squares, wide
from batchlab.measure.examples.ghost_norms import Means, Norms, TiedOutput, joint_norms, piece_norms
from batchlab.measure.examples.gradient_checks import GradientCheck, outside
from batchlab.measure.examples.layer_rules import RULES, opened_attention
from batchlab.measure.examples.layer_uses import Layout, Part, Pieces, RecordedUse, View
from batchlab.measure.examples.row_probe import RowProbe
from batchlab.measure.norms import to_floats

TURNS = 8


class Watcher(Protocol):
    """What a pass needs of the `ExampleNorms` that it belongs to.

    constants: the model's buffers and frozen parameters, by id. verified: the sequences of uses whose rows were found
    to be the examples. complete: those in which every gradient was the sum of its uses. passes: the number of this
    pass, in which each eighth parameter is checked, in turn.
    """

    names: list[str]
    parameters: dict[str, nn.Parameter]
    constants: set[int]
    means: Means
    verified: set[tuple[Any, ...]]
    complete: set[tuple[Any, ...]]
    passes: int

    def vectors(self, part: Part) -> Vectors:
        """The random u and v of that part."""


@dataclass
class PassNorms:
    """|c_i|² of each parameter that is covered, with its rule; why others are not; the coarsest eps seen."""

    squares: dict[str, tuple[Tensor, str]]
    uncovered: dict[str, str]
    eps: float


class PassMode(TorchFunctionMode):
    """Shows the pass every call that has a rule, and the beginning of the backward pass."""

    def __init__(self, watched: Pass) -> None:
        super().__init__()
        self._pass = watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self, self._pass.sequence_first():
                out = opened_attention(*args, **kwargs)
            self._pass.attend([*args, *kwargs.values()], out[0])
            return out
        if func is Tensor.backward:
            self._pass.before_backward()
        out = func(*args, **kwargs)
        rule = RULES.get(func)
        if rule is not None:
            rule(self._pass, out, *args, **kwargs)
        return out


class Pass:
    """One pass: the uses of its forward pass, then the pieces that its backward pass gives."""

    def __init__(self, norms: Watcher, examples: int) -> None:
        self.norms, self.examples, self.second = norms, examples, False
        parameters = norms.parameters.values()
        self._views = {id(p): View(Part(i), p.shape) for i, p in enumerate(parameters)}
        self._kept: dict[int, Tensor] = {id(p): p for p in parameters}
        self._lent: dict[int, tuple[weakref.ref[Tensor], View, Tensor, int | None, RecordedUse | None]] = {}
        self._swaps: dict[int, Tensor] = {}
        self._attended: dict[int, weakref.ref[Tensor]] = {}
        self._uses: list[RecordedUse] = []
        self._waiting: dict[Part, list[tuple[RecordedUse, Piece | TiedOutput]]] = {}
        self._done: dict[Part, Norms] = {}
        self._found: dict[int, tuple[Tensor, str]] = {}
        self._checks: list[GradientCheck] = []
        self._check_all = False
        self._why: dict[int, str] = {}
        self._settled: set[int] = set()
        self._eps: dict[int, float] = {}
        self._positions = examples
        self._open, self._began, self._told = True, False, False
        self._rows = RowProbe(norms.names, examples)
        self._signature: tuple[Any, ...] = ()

    # What the rules ask and tell.

    def view(self, tensor: Any) -> View | None:
        return self._views.get(id(tensor))

    def constant(self, tensor: Tensor) -> bool:
        return id(tensor) in self.norms.constants

    def derive(self, tensor: Tensor, view: View) -> None:
        self._views[id(tensor)], self._kept[id(tensor)] = view, tensor

    def lend(self, out: Tensor, weight: View, index: Tensor, padding: int | None, use: Any) -> None:
        self._lent[id(out)] = (weakref.ref(out), weight, index, padding, use)

    def lent(self, tensor: Any) -> tuple[View, Tensor, int | None] | None:
        found = self._lent.get(id(tensor))
        if found is None or found[0]() is not tensor:
            return None
        _, weight, index, padding, use = found
        if use is not None:
            use.taken_back = True
        return weight, index, padding

    def use(self, out: Tensor, name: str, parts: list[Part], layout: Layout, pieces: Pieces, source: bool) -> Any:
        if not out.requires_grad or self.examples == 1:
            return None
        if self._began:
            raise InputError("the forward pass must be over before backward begins: watch one backward pass at a time")
        use = RecordedUse(name, parts, layout, get_gradient_edge(out), pieces, out.shape, out.dtype, out.device, source)
        self._uses.append(use)
        out.register_hook(self._hook(use))  # type: ignore[no-untyped-call]
        return use

    def swap(self, tensor: Tensor, out: Tensor) -> None:
        attended = self._attended.get(id(tensor))
        if not self.second and (attended is None or attended() is not tensor):
            self._swaps[id(out)] = out

    def attend(self, inputs: list[Any], out: Tensor) -> None:
        """Attention is known to put the sequence first: what was swapped for it alone, and back, is no doubt."""
        for tensor in inputs:
            self._swaps.pop(id(tensor), None)
        self._attended[id(out)] = weakref.ref(out)

    @contextlib.contextmanager
    def sequence_first(self) -> Iterator[None]:
        """`F.multi_head_attention_forward` works on [T, n, d]."""
        before, self.second = self.second, True
        try:
            yield
        finally:
            self.second = before

    # The backward pass.

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the parameters while the pass goes on."""
        hooks: list[RemovableHandle] = []
        parameters = list(self.norms.parameters.values())
        try:
            for index, parameter in ((i, p) for i, p in enumerate(parameters) if p.requires_grad):
                see = self._parameter_hook(index)
                if parameter.grad is None:  # a hook on the gradient itself would make autograd copy it
                    hooks.append(parameter.register_post_accumulate_grad_hook(_given(see)))  # type: ignore[no-untyped-call]
                else:
                    hooks.append(parameter.register_hook(see))  # type: ignore[no-untyped-call]
            yield
        finally:
            self._close()
            for hook in hooks:
                hook.remove()
            for parameter in parameters:
                if not parameter._backward_hooks:
                    parameter._backward_hooks = None

    def _close(self) -> None:
        """A use holds an edge of the graph, whose hook holds the use: a circle that no collector sees."""
        self._open = False
        for use in self._uses:
            use.edge = use.pieces = None
        self._kept, self._lent, self._swaps, self._attended, self._waiting = {}, {}, {}, {}, {}

    def _hook(self, use: RecordedUse) -> Callable[[Tensor], None]:
        def see(g: Tensor) -> None:
            if not self._open or use.taken_back:
                use.pieces = None
                return
            if self._rows.active:
                self._rows.see(use, g)
                return
            pieces, use.pieces = use.pieces, None
            if pieces is None:
                raise InputError("a layer's output got two gradients in one watch: give each backward pass its own")
            if not self._told:
                raise InputError("the backward pass must begin with loss.backward(), where watch can see it")
            self._began, g = True, g.detach()
            eps = torch.finfo(g.dtype).eps
            self._positions = max(self._positions, g.numel() // max(1, g.shape[-1]))
            with _no_autocast(g):
                for part, piece in pieces(g):
                    self._eps[part.place] = max(eps, self._eps.get(part.place, 0.0))
                    self._arrive(use, part, piece)

        return see

    def _arrive(self, use: RecordedUse, part: Part, piece: Piece) -> None:
        vectors, means = self._vectors(part), self.norms.means
        others = [u for u in self._uses if u is not use and part in u.parts and not u.taken_back]
        if not others:
            self._done[part] = piece_norms(piece, vectors, means)
            return
        kept: Piece | TiedOutput = piece
        if isinstance(piece, Factors) and not piece.indexed and piece.blocks == 1:
            indices = [u.index for u in others if u.index is not None]
            if len(indices) == len(others) and sum(i.shape[1] for i in indices) < piece.rows:
                left, right = piece.chunk(0, len(piece))
                picked = torch.cat(indices, 1)[:, None].expand(-1, piece.positions, -1)
                kept = TiedOutput(wide(left[:, 0].gather(2, picked)), right[:, 0], piece_norms(piece, vectors, means))
        self._waiting.setdefault(part, []).append((use, kept))

    def _join(self, part: Part) -> Norms:
        """All that arrived for a part that was used several times."""
        arrived = self._waiting.pop(part)
        vectors, means = self._vectors(part), self.norms.means
        tied = next((piece for _, piece in arrived if isinstance(piece, TiedOutput)), None)
        if tied is None:
            return joint_norms([p for _, p in arrived if not isinstance(p, TiedOutput)], vectors, means)
        order = [u for u in self._uses if part in u.parts and u.index is not None and not u.taken_back]
        got = {id(use): piece for use, piece in arrived if isinstance(piece, Factors)}
        if len(got) < len(order):
            raise InputError("an embedding with a tied output layer was used without getting a gradient")
        return tied.with_embeddings([got[id(use)] for use in order], vectors, means)

    def _parameter_hook(self, index: int) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            if not self._open or self._rows.active:
                return
            if index in self._settled:
                raise InputError("a parameter got two gradients in one watch: give each backward pass its own")
            self._settled.add(index)
            gradient = gradient.detach()
            if self.examples == 1:
                whole = gradient.coalesce().values() if gradient.is_sparse else gradient
                self._found[index] = row_squares(wide(whole).reshape(1, -1)), "instantiated"
            else:
                with _no_autocast(gradient):
                    self._settle(index, gradient)

        return see

    def _settle(self, index: int, gradient: Tensor) -> None:
        """One parameter's norms, after all its uses; each part's gradient must be the one that its pieces give."""
        for part in [part for part in self._waiting if part.place == index]:
            self._done[part] = self._join(part)
        parts = sorted(part for part in self._done if part.place == index and part.dim is not None)
        if not parts and Part(index) not in self._done:
            rows = f"no call in watch gave {self.examples} examples: is that their number, and the forward pass inside?"
            self._why.setdefault(index, "no call that has a rule used it" if self._uses else rows)
            return
        if (parts and Part(index) in self._done) or _overlap(parts):
            self._why[index] = "its uses take slices that overlap"
            return
        parts = parts or [Part(index)]
        for part in parts:
            own = part.of(gradient)
            self._compare(index, part, own, self._done[part])
        if parts[0].dim is not None:
            self._checks.append(GradientCheck(index, 0.0, [outside(gradient, parts)]))
        done = [self._done.pop(part) for part in parts]
        rule = next(rule for rule in ("projected", "instantiated", "ghost") if rule in {norms.rule for norms in done})
        squares = done[0].squares if len(done) == 1 else torch.stack([norms.squares for norms in done]).sum(0)
        self._found[index] = squares, rule

    def _vectors(self, part: Part) -> Vectors | None:
        """None where this parameter's turn to be checked has not come."""
        return self.norms.vectors(part) if self._check_all or part.place % TURNS == self.norms.passes % TURNS else None

    def _compare(self, index: int, part: Part, gradient: Tensor, norms: Norms) -> None:
        vectors, witness = self._vectors(part), norms.witness
        if vectors is None or witness is None:
            return
        eps, fine = max(product_eps(gradient), self._eps[index]), torch.finfo(witness.value.dtype).eps
        numbers = [vectors.of(gradient), *witness, *([vectors.spread(gradient)] if eps > fine else [])]
        self._checks.append(GradientCheck(index, eps, numbers, fine, self._positions))

    # Whether dim 0 is the example.

    def before_backward(self) -> None:
        """At a new sequence of uses, two rows' gradients are sent back and must stay in their rows."""
        uses = [use for use in self._uses if not use.taken_back]
        self._signature = tuple((use.name, tuple(use.parts), use.layout[1:], len(use.shape)) for use in uses)
        self._told, self._check_all = True, self._signature not in self.norms.complete
        reason = self._rows.doubt(uses, swapped=bool(self._swaps))
        if not reason and self._signature not in self.norms.verified:
            reason = self._rows.mixed(uses)
            if not reason:
                self.norms.verified.add(self._signature)
        for use in self._uses:
            use.edge = None
        for use in uses if reason else ():
            use.taken_back = True
            self._why.update((part.place, reason) for part in use.parts)

    # The end.

    def norms_by_name(self) -> PassNorms:
        """After the pass."""
        floats = to_floats([number for check in self._checks for number in check.numbers])
        numbers, complete = iter(floats), all(map(math.isfinite, floats))
        for check in self._checks:
            if check.fails([next(numbers) for _ in check.numbers]):
                self._why.setdefault(check.parameter, "its gradient is not the sum of its uses that were seen")
                complete = False
        if complete and self._told:
            self.norms.complete.add(self._signature)
        names = self.norms.names
        found = {names[index]: found for index, found in self._found.items() if index not in self._why}
        why = {names[index]: self._why[index] for index in sorted(self._why)}
        return PassNorms(
            {name: found[name] for name in names if name in found}, why, max(self._eps.values(), default=0.0)
        )


def _no_autocast(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Norms are taken in float32 at least, where the backward pass itself is under autocast too."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _given(see: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def of(parameter: Tensor) -> None:
        if parameter.grad is not None:
            see(parameter.grad)

    return of


def _overlap(parts: list[Part]) -> bool:
    if len({part.dim for part in parts}) > 1:
        return True
    return any(a.stop > b.start for a, b in itertools.pairwise(parts))
