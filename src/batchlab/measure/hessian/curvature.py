"""The curvature of a loss at the model's weights, of all examples and of batches, and the learning rate it allows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlab.core.checks import check_count, check_inside
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.core.random import derive_seed
from batchlab.measure.hessian.lanczos import (
    CONVERGED,
    Density,
    Eigenvalue,
    density,
    extremes,
    lanczos,
    mean_interval,
    rademacher,
    trace,
)
from batchlab.measure.hessian.loss_surface import Loss
from batchlab.measure.hessian.sample import Sample
from batchlab.measure.hessian.stability_limit import SpikeFit, effective_batch, fit_spike, stable_rate

_POINTS = 512
_ROUNDING = 1e-6


@dataclass(frozen=True)
class BatchEdge(JsonNoun):
    """The edges of the Hessians of random batches of `batch_size` examples, drawn without replacement.

    largest, smallest: the mean over draws of the largest and of the most negative eigenvalue, Student's intervals.
    samples: the largest of each draw. noise_kappa_sq: κ² as the norm of the noise has it, 𝔟·|(H_b - H)z|² averaged
    over draws, z a random unit vector. unconverged: draws whose λ₁ may be above what is reported.
    """

    batch_size: int
    largest: Estimate
    smallest: Estimate
    noise_kappa_sq: Estimate
    samples: tuple[float, ...]
    unconverged: int = 0


@dataclass(frozen=True)
class Curvature(JsonNoun):
    """The Hessian H of the mean loss, at the weights where it was measured. Eigenvalues are per unit of weight².

    parameters: P. examples: N, those that were given. largest, smallest: extreme eigenvalues, the most extreme first.
    trace: tr(H). density: of the spectrum. batches: the same edges for batches, ascending in size. spike: the law
    through them, None where there are too few. note: what the reader must know; "" for nothing.
    """

    parameters: int
    examples: int
    largest: tuple[Eigenvalue, ...]
    smallest: tuple[Eigenvalue, ...]
    trace: Estimate
    density: Density
    batches: tuple[BatchEdge, ...]
    spike: SpikeFit | None
    steps: int
    probes: int
    repeats: int
    seed: int
    coverage: float
    note: str = ""

    def max_learning_rate(self, batch_size: float, momentum: float = 0.0) -> Estimate:
        """The learning rate above which SGD on random batches leaves these weights, in mean square, along the steepest
        direction: `rate_ceiling` by the fitted spike law.

        batch_size: in examples, at most those that were measured. momentum: heavy ball's μ, without dampening.

        How near it is: on an MLP of digits from three seeds, at batch sizes from 8 to all 1797 and μ of 0 and 0.9, with
        ceilings from 0.08 to 1.9, the loss doubled within 200 steps from 0.7 to 1.9 times the ceiling on, and ended
        higher than it began from 1.0 to 2.7 times on. The interval is the fit's and holds none of that.

        A ceiling and a diagnosis, not a rate to train with, and none for Adam (there it grows as √b at most). It
        belongs to these weights: curvature falls or grows during training, and a path that leaves may settle elsewhere.
        """
        effective_batch(batch_size, self.examples)
        if not _is_positive(self.largest[0], self.smallest[0]):
            reason = "undefined: no direction has positive curvature"
            return Estimate(math.nan, 0.0, math.inf, reason, self.coverage)
        if self.spike is not None:
            return self.spike.max_learning_rate(batch_size, momentum)
        if batch_size < self.examples:
            reason = "undefined: too few batch sizes were measured for the spike law"
            return Estimate(math.nan, 0.0, math.inf, reason, self.coverage)
        full = self.largest[0]
        value, low = stable_rate(full.value, momentum), stable_rate(full.value + full.residual, momentum)
        low = low if full.converged else 0.0
        return Estimate(value, low, value, f"{2 * (1 + momentum):g}/λ of the full Hessian", self.coverage)

    @property
    def noise_kappa_sq(self) -> float:
        """κ² by the norm of the noise, the mean over batch sizes; NaN where none was measured."""
        values = [edge.noise_kappa_sq.value for edge in self.batches if edge.noise_kappa_sq.defined]
        return math.fsum(values) / len(values) if values else math.nan

    @property
    def kappa_sq_ratio(self) -> float:
        """κ² that the edges show over κ² that the noise's norm has: 1 for noise alike in all directions, and some
        hundreds for real noise, which lies along the large eigenvalues."""
        return math.nan if self.spike is None else self.spike.kappa_sq.value / self.noise_kappa_sq

    def summary(self) -> str:
        """The numbers in a few lines of text."""
        top, bottom = self.largest[0], self.smallest[0]
        lines = [
            f"{self.parameters} parameters, {self.examples} examples",
            f"largest eigenvalue {top.value:.4g} (residual {top.residual:.1g}), "
            f"most negative {bottom.value:.4g} (residual {bottom.residual:.1g}), trace {self.trace.value:.4g}",
        ]
        for edge in self.batches:
            ceiling = self.max_learning_rate(edge.batch_size).value
            shown = f"λ₁ {edge.largest.value:.4g} [{edge.largest.low:.4g}, {edge.largest.high:.4g}]"
            lines.append(f"batch size {edge.batch_size}: {shown}, learning rate at most {ceiling:.4g}")
        if self.spike is not None:
            lines.append(
                f"κ² {self.spike.kappa_sq.value:.4g} from the edges, {self.noise_kappa_sq:.4g} from the noise's norm, "
                f"ratio {self.kappa_sq_ratio:.3g}; knee at batch size {self.spike.knee().value:.4g}"
            )
        return "\n".join([*lines, self.note] if self.note else lines)


def curvature(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Any],
    *,
    top: int = 3,
    steps: int = 30,
    probes: int = 5,
    batch_sizes: Sequence[int] | None = None,
    repeats: int = 10,
    count: Callable[[Any], int] | None = None,
    group: dist.ProcessGroup | None = None,
    seed: int = 0,
    coverage: float = 0.95,
) -> Curvature:
    """Extreme eigenvalues, trace and spectral density of the loss's Hessian, and its largest eigenvalue in batches.

    model: in evaluation mode while it is measured; weights, gradients, flags and generators are left as they were.
    Frozen parameters are left out, shared ones count once. loss: `(model, batch) -> scalar`, the mean over the batch's
    examples, as in `Job`. data: batches that fit in memory twice differentiated (some four forward passes' worth), of
    any sizes; all of them are held and together are what "full" means. Some thousand examples are enough.
    top: eigenvalues of each sign. steps: of Lanczos (20 to 30 for the extremes). probes: random vectors for trace and
    density. batch_sizes: in examples, from 1 to all of them; by default a fourth of the examples, a fourth of that, and
    so on to 4 at least, at most five; () for none. repeats: random batches of each size, at least 2.
    count: examples in a batch, or whatever `loss` is the mean over (tokens); by default its tensors' first dimension.
    group: ranks that each bring a part of the data, all calling this with the same arguments; the default group
    where one is initialised. Each product is summed over them, and all get the same result. coverage: of intervals.

    Cost: about (1 + probes)·steps products with all data, each some four passes, and repeats·steps for each batch size.
    Memory: `steps` vectors as long as the parameters.

    Raises `InputError` for no trainable parameter, half precision, sharded parameters, a loss that is not a scalar or
    has an operation without a double backward. What Lanczos did not converge on is said in `note`.

    Not during training steps, and not for batch norm in training mode, whose Hessian is another one.

    >>> from torch import nn
    >>> line = nn.Linear(2, 1, bias=False).double()
    >>> x = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    >>> found = curvature(line, lambda model, x: model(x).square().mean(), [x], batch_sizes=())
    >>> [round(eigenvalue.value, 9) for eigenvalue in found.largest], round(found.trace.value, 9)
    ([4.0, 1.0], 5.0)
    """
    check_count(top=top, probes=probes)
    check_count(2, steps=steps, repeats=repeats)
    check_inside(coverage=coverage)
    sample = Sample(model, loss, data, count, group, seed)
    sizes = sample.sizes(batch_sizes)
    with sample.surface.still():
        full = _full(sample, top, steps, probes, coverage)
        edges = tuple(_edge(sample, size, steps, repeats, full, coverage) for size in sizes)
    spike = _spike(edges, full, sample.examples, coverage)
    note = "; ".join(_notes(full, edges, spike, sample.note))
    found = (full.largest, full.smallest, full.trace, full.density, edges, spike)
    return Curvature(sample.surface.size, sample.examples, *found, steps, probes, repeats, seed, coverage, note)


def _generator(seed: int, *labels: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "curvature", *labels))


class _Full(NamedTuple):
    """What is known of the Hessian of all examples. directions: z and Hz for random z, |z| = 1."""

    largest: tuple[Eigenvalue, ...]
    smallest: tuple[Eigenvalue, ...]
    trace: Estimate
    density: Density
    directions: list[tuple[Tensor, Tensor]]


def _full(sample: Sample, top: int, steps: int, probes: int, coverage: float) -> _Full:
    H = sample.surface.hessian(sample.pieces)
    run = lanczos(H, steps, _generator(sample.seed, "full"))
    largest, smallest = extremes(H, run, top)
    total = trace(H, run, probes, _generator(sample.seed, "trace"), coverage)
    generator, runs, directions = _generator(sample.seed, "density"), [], []
    for _ in range(probes):
        run = lanczos(H, steps, generator, rademacher(H, generator))
        directions.append((run.basis[0].clone(), run.first_product()))
        runs.append(run._replace(basis=run.basis[:0].clone()))
    return _Full(largest, smallest, total, density(runs, _POINTS), directions)


def _edge(sample: Sample, size: int, steps: int, repeats: int, full: _Full, coverage: float) -> BatchEdge:
    top, bottom = full.largest[0], full.smallest[0]
    if size == sample.examples:
        ends = [Estimate(e.value, e.value - e.residual, e.value + e.residual, "all", coverage) for e in (top, bottom)]
        nothing = Estimate(math.nan, 0.0, math.inf, "undefined: all examples have no noise", coverage)
        return BatchEdge(size, ends[0], ends[1], nothing, (top.value,), int(not top.converged))
    effective, tops, bottoms, norms, lost = effective_batch(size, sample.examples), [], [], [], 0
    for repeat in range(repeats):
        H = sample.surface.hessian(sample.draw(size, repeat))
        run = lanczos(H, steps, _generator(sample.seed, "start", size, repeat))
        tops.append(float(run.values[-1]))
        bottoms.append(float(run.values[0]))
        lost += run.residual(-1) > CONVERGED * run.scale
        squares = [float((H @ z - Hz).square().sum()) for z, Hz in full.directions]
        norms.append(effective * math.fsum(squares) / len(squares))
    method = f"{repeats} random batches"
    ends = [mean_interval(values, coverage, method) for values in (tops, bottoms)]
    return BatchEdge(size, ends[0], ends[1], mean_interval(norms, coverage, method), tuple(tops), lost)


def _is_positive(top: Eigenvalue, bottom: Eigenvalue) -> bool:
    """Whether the largest eigenvalue is more than rounding or what Lanczos has not resolved."""
    return top.value > max(top.residual, _ROUNDING * abs(bottom.value))


def _spike(edges: Sequence[BatchEdge], full: _Full, examples: int, coverage: float) -> SpikeFit | None:
    """The law through the batches' means and the full edge, as good as its residual."""
    part, top = [edge for edge in edges if edge.batch_size < examples], full.largest[0]
    if len(part) < 2 or not _is_positive(top, full.smallest[0]) or any(edge.largest.value <= 0 for edge in part):
        return None
    sizes = [edge.batch_size for edge in part]
    variances = [statistics.variance(edge.samples) / len(edge.samples) for edge in part]
    values = [edge.largest.value for edge in part]
    return fit_spike(
        [*sizes, examples], [*values, top.value], [*variances, top.residual**2], examples, coverage=coverage
    )


def _notes(full: _Full, edges: Sequence[BatchEdge], spike: SpikeFit | None, note: str) -> list[str]:
    notes = [note] if note else []
    for name, values in (("largest", full.largest), ("most negative", full.smallest)):
        if lost := [value.residual for value in values if not value.converged]:
            how = f"{len(lost)} of the {len(values)} {name} eigenvalues"
            notes.append(f"{how} not converged, residual up to {max(lost):.2g}: more steps")
    for edge in edges:
        if edge.unconverged:
            notes.append(f"batch size {edge.batch_size}: λ₁ of {edge.unconverged} batches not converged: more steps")
    if spike is not None and spike.misfit > 2:
        notes.append(f"the spike law misses the measured edges by {spike.misfit:.2g} standard errors")
    return notes
