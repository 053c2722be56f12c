"""EGN, a Gauss-Newton step that is exact for the batch, through a system of batch size (Korbit et al., 2405.14402).

With b examples, c outputs and d weights, L = (1/b) Σ l_i, g = Jᵀr/b and H = JᵀQJ/b (r and Q the first and second
derivatives of l by the outputs), the identity of Duncan and Guttman turns a d x d system into a bc x bc one:

    -(H + λI)⁻¹g = -Jᵀ(Q J Jᵀ + bλI)⁻¹r

somax 1.0.1, the authors' JAX library, factors Q + 1e-6·I = L Lᵀ for cross-entropy and then builds L J where Lᵀ J is
right, so that its curvature is JᵀLᵀLJ: read in its source and recomputed here (JAX was not run), on a 10-17-5 network
with b = 8 its direction is off by 18 % at λ = 1 and by 137 % at λ = 0.1, with the factor in place by 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from batchlab.core.checks import check_count, holds
from batchlab.core.errors import InputError, NonFiniteError
from batchlab.optim.egn.kernel import (
    Network,
    Ranks,
    check_buffers,
    check_layers,
    dual_solve,
    gram,
    outputs_of,
    pull_back,
    push_forward,
    times,
)
from batchlab.optim.egn.loss import SQUARED, Loss, terms_of
from batchlab.optim.egn.search import SEARCHES, first_share, gain_ratio, next_damping, search
from batchlab.optim.leaf import asks_for_state
from batchlab.optim.state_hooks import attributes_of_a_copy
from batchlab.parallel.shards import is_spread

MEMORY_BYTES = 2**30


class EGNStep(NamedTuple):
    """What the last step did. loss: before it. loss_after: None where nothing asked for it.

    share: the step over lr times the direction, 1 without a search. damping: the λ of the step. ratio: ρ, the loss's
    change over the model's; None without adaptive damping, and where the model's change is within rounding.
    """

    loss: float
    loss_after: float | None
    share: float
    damping: float
    ratio: float | None


class EGN(torch.optim.Optimizer):
    """w ← w + α·d, d = -(H + λI)⁻¹g of the batch, exact up to rounding. `.grad` is neither read nor written.

    model: gives a tensor [b, ...] for inputs [b, ...], each example on its own: batch normalisation and dropout that
    are active are refused, and so is a model whose outputs for an example alone are others. loss: "mse", "half_mse",
    "cross_entropy", "binary_cross_entropy" (`egn.loss` has their factors), or `(outputs, targets) -> (losses [b],
    r [b, c], Q [b, c, c] or its diagonal [b, c])`. params: parameters of the model or groups of them; all by default.
    What is frozen at a step stays, and counts as a constant.

    lr: α, or its upper limit with a search. damping: λ > 0 in units of H; 0 is possible for squared errors. momentum:
    v ← m·v + (1 - m)·d, and v/(1 - mᵗ) in place of d. All three are read from `param_groups` at each step; groups may
    differ in lr, which then scales their part of d, and in nothing else; a search needs one lr. Defaults are the
    authors'; the rates they chose lie between 0.001 and 0.5, and λ = 1 is often too much (see the docs).

    solver: "lu"; "cholesky", of a symmetric system (of a caller's Q, with Q + 1e-6·I); "auto" takes Cholesky for
    squared errors and LU else. line_search: on the same batch, a forward pass a try; "armijo" starts from 1.5 times
    the last step, "conservative" from the last one, "goldstein" can grow within a step. Where momentum's direction
    does not descend, the plain one is searched. adaptive_damping: "trust_region" writes λ into the groups after each
    step, by ρ on the batch; no step is taken back, and on small noisy batches λ can shrink until the run diverges (see
    the docs). solve_dtype: of K and the solve.
    chunk: examples differentiated together. memory_bytes: bound on one block of J and on one chunk's Jacobian, 1 GiB.
    max_rows: largest bc. process_group: the ranks that hold the batch together, from the same weights; None is this
    process alone, with or without torchrun. Every rank calls `step` and takes the same step, that of one process with
    the whole batch.

    State: d elements with momentum, else nothing. Time O(b²c²d + (bc)³) and b·c backward passes of one example; memory
    3 (bc)² of solve_dtype, and J in blocks. Ranks exchange J once, split the product, and solve alike.
    Not for language-model heads or large batches (bc is limited), noisy targets or classes without tuning of λ and α,
    or sharded (DTensor) parameters, which are refused. With more rows than weights and λ < 1e-4, Jᵀz loses digits in
    float32: take float64 weights. `InputError` for bad input, `TypeError` for a loss without curvature,
    `NonFiniteError` where loss, J, direction or new loss is not finite; the weights then are as they were.

    >>> x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    >>> model = nn.Linear(3, 1)
    >>> optimizer = EGN(model, "half_mse", damping=1e-9)
    >>> loss = optimizer.step(x, torch.tensor([[3.0], [5.0]]))  # fewer examples than weights: one step fits them
    >>> [round(y, 4) for y in model(x).flatten().tolist()]
    [3.0, 5.0]
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | Callable[[Tensor, Tensor], Any] = "mse",
        *,
        params: Iterable[Any] | None = None,
        lr: float = 1.0,
        damping: float = 1.0,
        momentum: float = 0.0,
        solver: Literal["auto", "lu", "cholesky"] = "auto",
        line_search: Literal["armijo", "conservative", "goldstein"] | None = None,
        adaptive_damping: Literal["trust_region"] | bool = False,
        solve_dtype: torch.dtype = torch.float64,
        chunk: int | None = None,
        memory_bytes: int = MEMORY_BYTES,
        max_rows: int = 4096,
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module) or isinstance(model, nn.parallel.DistributedDataParallel):
            hint = ": give model.module, and process_group" if isinstance(model, nn.Module) else ""
            raise InputError(f"model must be a plain torch.nn.Module, got {type(model).__name__}{hint}")
        _check_choice("solver", solver, ("auto", "lu", "cholesky"))
        _check_choice("line_search", line_search, (None, *SEARCHES))
        _check_choice("adaptive_damping", adaptive_damping, (False, "trust_region"))
        _check_choice("solve_dtype", solve_dtype, (torch.float64, torch.float32))
        check_count(memory_bytes=memory_bytes, max_rows=max_rows, **({} if chunk is None else {"chunk": chunk}))
        self._terms: Loss = terms_of(loss)
        self._squared = isinstance(loss, str) and loss in SQUARED
        self.solver: str = solver if solver != "auto" else "cholesky" if self._squared else "lu"
        self.line_search, self.adaptive_damping = line_search, adaptive_damping
        self.solve_dtype, self.chunk, self.memory_bytes, self.max_rows = solve_dtype, chunk, memory_bytes, max_rows
        self.model, self.process_group, self.last = model, process_group, None
        floating = [(name, p) for name, p in model.named_parameters() if p.is_floating_point() or p.is_complex()]
        defaults = dict(lr=lr, damping=damping, momentum=momentum, step_share=1.0)
        super().__init__(floating if params is None else params, defaults)

    last: EGNStep | None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes further parameters of the model; their numbers but lr are those of the other groups."""
        for first in self.param_groups[:1]:
            shared = {key: first[key] for key in ("damping", "momentum", "step_share")}
            param_group = {**shared, **param_group}
        super().add_param_group(param_group)
        names = {id(p): name for name, p in self.model.named_parameters()}
        try:
            for i, p in enumerate(self.param_groups[-1]["params"]):
                name = names.get(id(p))
                if name is None:
                    raise InputError(f"params must be parameters of model, entry {i} of the new group is none")
                if not p.is_floating_point() or is_spread(p):
                    kind = "a DTensor: EGN needs whole parameters" if is_spread(p) else f"{p.dtype}"
                    raise InputError(f"EGN takes real parameters that each rank holds whole, {name} is {kind}")
            self._numbers()
        except InputError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, inputs: Any = None, targets: Any = None, *, closure: Callable[[], Any] | None = None
    ) -> Tensor | None:
        """One step on a batch; returns its loss before the step, a mean over the examples of all ranks, detached.

        inputs, targets: tensors [b, ...]. Or lists or tuples of such, the micro-batches of one batch, of any sizes:
        the step is that of the joined batch, and the activations of one are held at once. Or, alone, a closure that
        returns the two, by place or by name. Where torch.distributed.checkpoint asks for a state that is not there
        yet, it is made, no step is taken and None returned.
        """
        if closure is not None and inputs is not None:
            raise InputError("step takes inputs and targets or a closure that returns them, got both")
        closure = inputs if targets is None and callable(inputs) else closure
        if inputs is None and closure is None and asks_for_state(self):
            self._make_state()
            return None
        if closure is not None:
            found = closure()
            if not isinstance(found, tuple | list) or len(found) != 2:
                raise InputError(f"a closure must return (inputs, targets), got {type(found).__name__}")
            inputs, targets = found
        parts, y = _micro_batches(inputs, targets)
        damping, momentum = self._numbers()
        net = self._network()
        ranks = Ranks.of(self.process_group, len(y))
        batch = _Batch(net, parts, y, ranks, self._terms, self.solve_dtype, self.max_rows)
        K = gram(net, parts, batch.outputs, ranks, chunk=self.chunk, memory_bytes=self.memory_bytes)
        if not (math.isfinite(batch.loss) and bool(K.isfinite().all()) and bool(batch.terms.r.isfinite().all())):
            raise NonFiniteError(f"the loss, {batch.loss}, its r or J is not finite: no weight was moved")
        z = dual_solve(K, batch.terms, damping, self.solver)
        plain = pull_back(net, parts, -z, ranks)
        check_buffers(net)
        if not all(bool(part.isfinite().all()) for part in plain.values()):
            raise NonFiniteError(
                "the direction is not finite, from Q or beyond the weights' dtype: no weight was moved"
            )
        self._move(batch, plain, -(K @ z), damping, momentum)
        return torch.tensor(batch.loss, dtype=batch.dtype, device=K.device)

    def _make_state(self) -> None:
        if self._numbers()[1]:
            for p in (p for group in self.param_groups for p in group["params"] if p.requires_grad):
                self.state[p].update(direction=torch.zeros_like(p), step=torch.tensor(0.0))

    def __getstate__(self) -> dict[str, Any]:
        return attributes_of_a_copy(self)  # with the model, which a copy of both together shares

    def _move(self, batch: _Batch, plain: dict[str, Tensor], moved: Tensor, damping: float, momentum: float) -> None:
        """Momentum, search, weights, λ, in that order; moved: J times the plain direction."""
        averages = self._averaged(plain, momentum) if momentum else {}
        direction = {name: v / (1 - momentum**t) for name, (v, t) in averages.items()} or plain
        watched = bool(self.line_search or self.adaptive_damping)
        line = self._line(batch, direction, None if momentum else moved, watched)
        last = float(self.param_groups[0]["step_share"])
        share, after, ratio = 1.0, None, None
        if self.line_search:
            if momentum and not line.slope < 0:
                line = self._line(batch, plain, moved, watched)
            share = first_share(self.line_search, last)
            if line.slope < 0:
                eps, wide = torch.finfo(batch.dtype).eps, self.line_search == "goldstein"
                loss_at = partial(batch.loss_at, line.delta)
                share, after = search(share, batch.loss, line.slope, loss_at, goldstein=wide, eps=eps)
        if self.adaptive_damping:
            after = batch.loss_at(line.delta, share) if after is None else after
            ratio = gain_ratio(batch.loss, after, share * line.slope, share**2 * line.curvature)
        if after is not None and not math.isfinite(after):
            raise NonFiniteError(
                f"the step would make the loss {after}: raise damping or lower lr; no weight was moved"
            )
        self._write(line.delta, share, averages)
        for group in self.param_groups:
            group.update({"step_share": share} if self.line_search else {})
            group.update({"damping": next_damping(damping, ratio)} if self.adaptive_damping else {})
        self.last = EGNStep(batch.loss, after, share, damping, ratio)

    def _line(self, batch: _Batch, direction: dict[str, Tensor], moved: Tensor | None, watched: bool) -> _Line:
        """δ, each group's rate times its part; and, where watched, the loss's slope and curvature along it.

        moved: J times the direction, which spares a pass where all rates are one.
        """
        rates = {name: group["lr"] for group in self.param_groups for name in self._names(group)}
        delta = {name: d * rates[name] for name, d in direction.items()}
        if not watched:
            return _Line(delta, math.nan, math.nan)
        used = {float(rates[name]) for name in direction}
        if moved is not None and len(used) == 1:
            along = used.pop() * moved
        else:
            along = push_forward(batch.net, batch.parts, delta, batch.ranks)
        along = along.to(batch.outputs.dtype).view_as(batch.terms.r)
        bend = times(batch.terms.Q, along)
        return _Line(delta, float((batch.terms.r * along).sum()) / len(along), float((bend * along).sum()) / len(along))

    def _averaged(self, plain: dict[str, Tensor], momentum: float) -> dict[str, tuple[Tensor, int]]:
        """v ← m·v + (1 - m)·d and its count t, by parameter; the state is left alone until the step is sure."""
        found = {}
        for name, p in self.model.named_parameters():
            if name in plain:
                state = self.state.get(p, {})
                v = state.get("direction", torch.zeros_like(plain[name]))
                found[name] = momentum * v + (1 - momentum) * plain[name], int(state.get("step", 0)) + 1
        return found

    def _write(self, delta: dict[str, Tensor], share: float, averages: dict[str, tuple[Tensor, int]]) -> None:
        for name, p in self.model.named_parameters():
            if name in delta:
                p.add_(delta[name], alpha=share)
            if name in averages:
                v, t = averages[name]
                self.state[p].update(direction=v, step=torch.tensor(float(t)))

    def _names(self, group: dict[str, Any]) -> list[str]:
        """Of the group's parameters that are trained now."""
        own = {id(p) for p in group["params"] if p.requires_grad}
        return [name for name, p in self.model.named_parameters() if id(p) in own]

    def _numbers(self) -> tuple[float, float]:
        """λ and m, which all groups must share; every group's numbers are checked."""
        for group in self.param_groups:
            _check_number("lr", group["lr"], "be finite and >= 0", lambda v: 0 <= v < math.inf)
            least = "be finite and >= 0" if self._squared else "be finite and > 0 where Q can be singular"
            allowed = partial(_inside, open_at_zero=not self._squared)
            _check_number("damping", group["damping"], least, allowed)
            _check_number("momentum", group["momentum"], "lie in [0, 1)", lambda v: 0 <= v < 1)
        first = self.param_groups[0]
        for key in ("damping", "momentum", *(["lr"] if self.line_search else [])):
            if len({float(group[key]) for group in self.param_groups}) > 1:
                why = " with a line search" if key == "lr" else ""
                values = [float(group[key]) for group in self.param_groups]
                raise InputError(f"{key} must be the same in all param_groups{why}, got {values}")
        return float(first["damping"]), float(first["momentum"])

    def _network(self) -> Network:
        check_layers(self.model)
        trained = {name for group in self.param_groups for name in self._names(group)}
        if not trained:
            raise InputError("no parameter of the param_groups requires a gradient: there is nothing to train")
        named = dict(self.model.named_parameters())
        weights = {name: p.detach() for name, p in named.items() if name in trained}
        fixed = {name: p.detach() for name, p in named.items() if name not in trained}
        return Network(self.model, weights, fixed, {name: each.clone() for name, each in self.model.named_buffers()})


class _Line(NamedTuple):
    """delta: δ, by parameter. slope: gᵀδ. curvature: δᵀHδ."""

    delta: dict[str, Tensor]
    slope: float
    curvature: float


class _Batch:
    """A batch at the weights of a step: its joined outputs, their loss terms, and its loss at other weights."""

    def __init__(
        self, net: Network, parts: Sequence[Tensor], y: Tensor, ranks: Ranks, terms: Loss, dtype: torch.dtype, most: int
    ) -> None:
        self.net, self.parts, self.ranks, self._terms = net, parts, ranks, terms
        raw = outputs_of(net, net.weights, parts)
        self.dtype, self.outputs, self._y = raw.dtype, ranks.join(raw).to(dtype), ranks.join(y)
        n = self.outputs.numel()
        if n > most:
            b, gib = len(self.outputs), 3 * n**2 * self.outputs.element_size() / 2**30
            raise InputError(
                f"max_rows={most} must be at least b*c = {b} * {n // b} = {n}: the step would solve a {n} x {n} "
                f"system, about {gib:.3g} GiB. Take a smaller batch, fewer outputs, or raise max_rows"
            )
        self.terms = terms(self.outputs, self._y)
        self.loss = self.terms.losses.mean().item()

    def loss_at(self, delta: dict[str, Tensor], share: float) -> float:
        """L(w + share·δ), over the whole batch: one forward pass."""
        weights = {name: w.add(delta[name], alpha=share) for name, w in self.net.weights.items()}
        outputs = self.ranks.join(outputs_of(self.net, weights, self.parts)).to(self.outputs.dtype)
        return self._terms(outputs, self._y).losses.mean().item()


def _micro_batches(inputs: Any, targets: Any) -> tuple[list[Tensor], Tensor]:
    """The micro-batches' inputs, and all targets."""
    many = isinstance(inputs, (list, tuple))
    xs, ys = (list(inputs), list(targets)) if many and isinstance(targets, (list, tuple)) else ([inputs], [targets])
    if not all(isinstance(each, Tensor) and each.ndim for each in [*xs, *ys]):
        kinds = f"{type(inputs).__name__} and {type(targets).__name__}"
        raise InputError(f"step takes inputs and targets, two tensors or two lists of tensors, got {kinds}")
    if not xs or [len(x) for x in xs] != [len(y) for y in ys]:
        counts = f"{[len(x) for x in xs]} and {[len(y) for y in ys]}"
        raise InputError(f"inputs and targets must hold as many examples, micro-batch by micro-batch, got {counts}")
    return [x.detach() for x in xs if len(x)], torch.cat(ys).detach()


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise InputError(f"{name} must be one of {list(choices)}, got {value!r}")


def _inside(value: float, open_at_zero: bool) -> bool:
    return 0 < value < math.inf if open_at_zero else 0 <= value < math.inf


def _check_number(name: str, value: Any, right: str, allowed: Callable[[Any], bool]) -> None:
    if not holds(allowed, value):
        raise InputError(f"{name} must {right}, got {value!r}")
