"""|g_i|² of every example's own gradient from one forward and backward pass of the mean loss, as the pass goes on.

A function mode sees every call that uses a parameter, a hook on its output the gradient that comes back, and the two
give each example's squared norm (`ghost_norms`). Nothing in the graph is changed, so `.grad` keeps every bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.measure.examples.example_pass import Pass, PassMode
from batchlab.measure.examples.factors import Vectors, draw_vectors
from batchlab.measure.examples.ghost_norms import Means
from batchlab.measure.examples.layer_uses import Part
from batchlab.measure.examples.projected_norms import Projections

MEMORY_BYTES = 2**26
_WATCHED: set[int] = set()  # the parameters, by id, that a watch is around now
NORM_LAYERS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass
class ExampleRecord:
    """What one pass told of its n examples; filled when `ExampleNorms.watch` ends.

    by_parameter: |g_i|² of each parameter's own part of the gradient, [n], float32 at least, by the parameter's first
    name; one that got no gradient is absent. rules: "ghost" where no gradient was made, "instantiated" where those
    of a few examples were held at a time, "projected" where it is an unbiased estimate. uncovered: parameters whose
    part is not known, and why. eps: of the coarsest numbers that came back, 0 if none did.
    """

    examples: int
    by_parameter: dict[str, Tensor] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    uncovered: dict[str, str] = field(default_factory=dict)
    eps: float = 0.0

    def sq_norms(self, names: Iterable[str] | None = None) -> Tensor:
        """|g_i|² over the named parameters, all that are covered by default: [n], float64."""
        chosen = self.by_parameter if names is None else {k: self.by_parameter[k] for k in names if k in self}
        if not chosen:
            return torch.zeros(self.examples, dtype=torch.float64)
        return torch.stack([part.double() for part in chosen.values()]).sum(0)

    def __contains__(self, name: object) -> bool:
        return name in self.by_parameter


def norm_layer_names(model: nn.Module) -> list[str]:
    """The parameters of the model's normalisation layers (layer, RMS, group and instance), for `parameters=`."""
    return [
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if isinstance(module, NORM_LAYERS)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]


class ExampleNorms:
    """Squared norms of per-example gradients in any training loop, without holding a gradient.

        norms = ExampleNorms(model)
        with norms.watch(len(batch)) as record:
            loss_mean(model, batch).backward()
        record.sq_norms()                            # [n], float64

    model: its parameters that require a gradient are watched, a shared one once and with all its uses. parameters:
    only these, by name; the others cost nothing (`norm_layer_names` for a cheap subset). strict: refuse a pass in
    which some watched parameter is not covered; else it is named in `record.uncovered` and left out. memory_bytes: of
    temporary tensors for one layer, 64 MiB by default; one example's are held in any case. projections: 0 for exact
    norms; else |g_i|² is estimated without bias from so many random projections of g_i, in layers where that is
    cheaper (`projected_norms`; 8 are enough for means over examples, none is for a single example's norm). Their signs
    depend on `passes`, the number of the pass, alone.

    Example i's contribution c_i is what `.grad` gets through the layer inputs of example i. With a loss that is the
    mean over n examples, c_i = g_i/n. `watch(n, scale=s)` gives |s·c_i|²: s = n by default; N if the loss of n
    examples was weighted by n/N; divided by a loss scale or multiplied by the accumulation steps as the loss was.
    With a mean over tokens, c_i holds the example's share of the tokens and is left so.

    Covered: every use, also of a shared parameter, in `F.linear`, `@`, `addmm`, `F.embedding`, convolutions (not
    transposed), layer, RMS, group, instance and (in eval mode) batch normalisation, `nn.MultiheadAttention`, sums and
    products that broadcast a parameter, and a position embedding without a dimension of examples that is added.
    Examples are dim 0 of a layer's output, or dim 1, or equal groups of dim 0. Not covered: recurrent layers, weights
    that are computed from parameters, a shared weight whose uses have different slices.

    Two checks stand against a silent wrong answer. A random projection of each parameter's gradient must be that of
    the uses that were seen: for all parameters in a pass with a new sequence of uses, else for one in eight in turn.
    In a pass with a new sequence of uses, and before its backward pass, gradients of two single rows are sent back
    through the graph, and must stay in their rows at every layer: examples that are mixed, or taken for another
    dimension, are found by that. It costs about two backward passes, once.

    Not for compiled or scripted models, sharded parameters (DTensor), reentrant checkpointing, and losses that
    compare examples. Non-reentrant checkpointing is exact, but the inputs of covered layers then stay in memory. In
    half precision norms are taken in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        parameters: Iterable[str] | None = None,
        strict: bool = True,
        memory_bytes: int = MEMORY_BYTES,
        projections: int = 0,
    ) -> None:
        check_count(memory_bytes=memory_bytes)
        check_count(0, projections=projections)
        _refuse(model)
        self.parameters = _chosen(model, parameters)
        self.names, self._model, self.constants = list(self.parameters), model, set[int]()
        norms = nn.modules.batchnorm._BatchNorm
        self._batch_norms = {name: module for name, module in model.named_modules() if isinstance(module, norms)}
        self.strict, self._projections = strict, Projections(projections) if projections else None
        self.means = Means(memory_bytes, self._projections)
        self._vectors: dict[Part, Vectors] = {}
        self.verified: set[tuple[Any, ...]] = set()
        self.complete: set[tuple[Any, ...]] = set()
        self.passes, self._busy = 0, False

    @contextlib.contextmanager
    def watch(self, examples: int, *, scale: float | None = None) -> Iterator[ExampleRecord]:
        """Around the forward and `loss.backward()` of one micro-batch of `examples` examples; see the class."""
        check_count(examples=examples)
        factor = float(examples if scale is None else scale)
        if not math.isfinite(factor):
            raise InputError(f"scale must be finite, got {scale!r}")
        if self._busy:
            raise InputError("watch must not be entered twice at once")
        mine = set(map(id, self.parameters.values()))
        if not _WATCHED.isdisjoint(mine):
            raise InputError("another watch of per-example norms is around the same parameters: use one at a time")
        _refuse_batch_norm(self._batch_norms)
        record, self._busy = ExampleRecord(examples), True
        self.constants = _constants(self._model)
        self.passes += 1
        if self._projections is not None:
            self._projections.begin(self.passes)
        watched = Pass(self, examples)
        _WATCHED.update(mine)
        try:
            with watched.hooked(), PassMode(watched):
                yield record
            found = watched.norms_by_name()
        finally:
            self._busy = False
            _WATCHED.difference_update(mine)
        if not found.squares and not found.uncovered:
            raise InputError("no watched parameter got a gradient: watch must be around the forward pass and backward")
        record.uncovered, record.eps = found.uncovered, found.eps
        record.by_parameter = {name: squares.mul_(factor**2) for name, (squares, _) in found.squares.items()}
        record.rules = {name: rule for name, (_, rule) in found.squares.items()}
        if self.strict and record.uncovered:
            told = "; ".join(f"{name}: {reason}" for name, reason in list(record.uncovered.items())[:3])
            raise InputError(
                f"{len(record.uncovered)} of {len(self.names)} parameters have no exact per-example norm here ({told});"
                " leave them out (parameters=, strict=False) or use per_example_sq_norms; in GradientNoise, use "
                'method="micro_batch"'
            )

    def vectors(self, part: Part) -> Vectors:
        """The random u and v of that part."""
        if part not in self._vectors:
            like = part.of(self.parameters[self.names[part.place]].detach())
            self._vectors[part] = draw_vectors(like.shape, like.device, like.dtype, len(self._vectors))
        return self._vectors[part]


def _chosen(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    every = dict(model.named_parameters(remove_duplicate=False))
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if names is not None:
        names = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in names if name not in every or not every[name].requires_grad]
        if unknown:
            raise InputError(
                f"parameters must name parameters of the model that require a gradient, got {unknown[0]!r}"
            )
        ids = {id(every[name]) for name in names}
        wanted = {n: p for n, p in wanted.items() if id(p) in ids}
    if not wanted:
        raise InputError("the model has no parameter that requires a gradient")
    for name, parameter in wanted.items():
        if parameter.is_complex():
            raise InputError(f"per-example norms of complex parameters are not defined here, got {name}")
        if hasattr(parameter, "placements"):
            raise InputError(f"per-example norms need whole parameters, but {name} is sharded (DTensor)")
    return wanted


def _constants(model: nn.Module) -> set[int]:
    return {id(b) for b in model.buffers()} | {id(p) for p in model.parameters() if not p.requires_grad}


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"per-example norms need the model as it was before compiling: {name or 'it'} is compiled")


def _refuse_batch_norm(layers: Mapping[str, nn.modules.batchnorm._BatchNorm]) -> None:
    for name, module in layers.items():
        if module.training or module.running_mean is None:
            raise InputError(
                f"{name or type(module).__name__} normalises over the batch: there an example has no gradient of its "
                "own; put it in eval mode or use another normalisation"
            )
