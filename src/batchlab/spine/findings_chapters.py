"""The parts of a run's report that show single facts measured at its weights, and the same as rows for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.measure.findings import EnergyFinding, Findings, LandscapeFinding, MemoryFinding, NoiseFinding
from batchlab.measure.hessian.curvature import Curvature
from batchlab.spine.words import duration, figure, interval
from batchlab.viz import curvature as curvature_plots
from batchlab.viz import landscape as landscape_plots
from batchlab.viz.blocks import Block, Bullets, Chart, Paragraph, Row, Section, Table, Tiles

Line = tuple[str, str, str]


def lines(found: Findings) -> list[Line]:
    """(name, value, remark) of everything that was measured."""
    return [
        *(_noise_lines(found.noise) if found.noise else []),
        *(_memory_lines(found.memory) if found.memory else []),
        *(_curvature_lines(found.curvature) if found.curvature else []),
        *(_energy_lines(found.energy) if found.energy else []),
        *(_landscape_lines(found.landscape) if found.landscape else []),
    ]


def sections(found: Findings) -> list[Section]:
    """One section for each fact that the report has no other place for."""
    made = []
    if found.curvature is not None:
        made.append(_curvature(found.curvature, found.weights))
    if found.landscape is not None:
        made.append(_landscape(found.landscape, found.weights))
    if found.energy is not None:
        made.append(_energy(found.energy))
    rest = [*(_noise_lines(found.noise) if found.noise else []), *(_memory_lines(found.memory) if found.memory else [])]
    if rest:
        blocks: list[Block] = [Tiles(rest), Paragraph(f"Measured at: {found.weights}.", quiet=True)]
        made.append(Section("measured-alone", "Measured on its own", blocks))
    if made and found.notes:
        last = made[-1]
        made[-1] = Section(last.name, last.title, [*last.blocks, Bullets(list(found.notes))])
    return made


def _noise_lines(found: NoiseFinding) -> list[Line]:
    return [("Noise scale", interval(found.noise_scale), f"examples; {found.noise_scale.method}")]


def _memory_lines(found: MemoryFinding) -> list[Line]:
    return [("Largest micro-batch", f"{found.size:,}", f"examples; {found.why}")]


def _curvature_lines(found: Curvature) -> list[Line]:
    top, bottom = found.largest[0], found.smallest[0]
    rows = [
        ("Largest eigenvalue", figure(top.value), f"of the Hessian of {found.examples:,} examples"),
        ("Most negative", figure(bottom.value), "the other end of its spectrum"),
        ("Trace", interval(found.trace), found.trace.method),
    ]
    for edge in found.batches:
        ceiling = found.max_learning_rate(edge.batch_size)
        rows.append((f"Rate at batch {edge.batch_size:,}", interval(ceiling), "SGD is stable up to about this"))
    return rows


def _energy_lines(found: EnergyFinding) -> list[Line]:
    use, rate = found.use, found.use.per(steps=found.steps, examples=found.steps * found.batch_size)
    rows = [
        ("Energy of a step", f"{figure(rate.joules_per_step or 0.0)} J", f"{use.source}, batch {found.batch_size:,}"),
        (
            "Energy of an example",
            f"{figure(rate.joules_per_example or 0.0)} J",
            f"{figure(use.mean_watts)} W on average",
        ),
    ]
    if use.net_joules is not None and use.source != "estimated":
        rows.append(("Without the idle part", f"{figure(use.net_joules / found.steps)} J", "of a step"))
    return rows


def _landscape_lines(found: LandscapeFinding) -> list[Line]:
    wide = found.landscape
    remark = f"filter-normalised, where the loss is {figure(found.level)} above {figure(wide.origin)}"
    return [("Width of the minimum", interval(found.width), remark)]


def _curvature(found: Curvature, weights: str) -> Section:
    text = f"Of the Hessian at the weights of {weights}, {found.examples:,} examples."
    edges = [
        (float(e.batch_size), e.largest.value, e.largest.low, e.largest.high)
        for e in found.batches
        if e.largest.defined
    ]
    rows = [(f"{b:,.0f}", figure(v), figure(low), figure(high)) for b, v, low, high in edges]
    spectrum = Chart(
        "curvature-density",
        "Spectrum",
        f"{text} Most eigenvalues are near 0; the few large ones decide which learning rates are stable.",
        curvature_plots.spectral_density(
            found.density.grid, found.density.values, largest=found.largest[0].value, smallest=found.smallest[0].value
        ),
        Table("Extreme eigenvalues", ("Eigenvalue", "Residual"), _eigenvalues(found)),
    )
    charts = [spectrum]
    if edges:
        names = ("Batch size (examples)", "Largest eigenvalue", "Low", "High")
        charts.append(
            Chart(
                "curvature-edge",
                "Edge against batch size",
                "The smaller a random batch, the larger its edge: that is why small batches bear smaller rates.",
                curvature_plots.batch_edge(edges, law=_law(found, edges), full=found.largest[0].value),
                Table("Largest eigenvalue of random batches", names, rows),
            )
        )
    blocks: list[Block] = [Tiles(_curvature_lines(found)), Row(charts)]
    ceilings = [(edge.batch_size, found.max_learning_rate(edge.batch_size)) for edge in found.batches]
    known = [(float(b), e.value, e.low, e.high) for b, e in ceilings if e.defined]
    if known:
        cells = [(f"{b:,.0f}", figure(v), figure(low), figure(high)) for b, v, low, high in known]
        names = ("Batch size (examples)", "Learning rate", "Low", "High")
        blocks.append(
            Chart(
                "curvature-ceiling",
                "Largest stable learning rate of SGD",
                "Training left such weights from 0.7 to 1.9 times this rate on; a ceiling, not a rate to train with.",
                curvature_plots.learning_rate_ceiling(known),
                Table("Largest stable learning rate", names, cells),
            )
        )
    if found.note:
        blocks.append(Paragraph(found.note, quiet=True))
    return Section("curvature", "Curvature", blocks)


def _eigenvalues(found: Curvature) -> list[tuple[str, str]]:
    return [(figure(each.value), f"{each.residual:.1e}") for each in (*found.largest, *reversed(found.smallest))]


def _law(found: Curvature, edges: Sequence[tuple[float, float, float, float]]) -> list[tuple[float, float]]:
    spike = found.spike
    if spike is None:
        return []
    low, high = edges[0][0], edges[-1][0]
    sizes = [low * (high / low) ** (k / 40) for k in range(41)] if high > low else []
    return [(b, spike.edge(b).value) for b in sizes]


def _landscape(found: LandscapeFinding, weights: str) -> Section:
    wide = found.landscape
    level = wide.origin + found.level
    points = wide.profile()
    cells = [(f"{a:g}", figure(middle), figure(low), figure(high)) for a, middle, low, high in points]
    names = ("Step (filter norms)", "Median loss", "Least", "Largest")
    chart = Chart(
        "landscape-line",
        "Along random directions",
        f"Validation loss around the weights of {weights}; one step is as long as the weights, filter by filter.",
        landscape_plots.loss_curves({"this run": points}, level=level),
        Table(f"Loss along {len(wide.losses)} directions", names, cells),
    )
    return Section("landscape", "Loss landscape", [Tiles(_landscape_lines(found)), chart])


def _energy(found: EnergyFinding) -> Section:
    use = found.use
    cells = [(each.component, figure(each.joules), each.source) for each in use.components]
    title = f"{found.steps:,} training steps of {found.batch_size:,} examples in {duration(use.seconds)}"
    blocks: list[Block] = [Tiles(_energy_lines(found)), Table(title, ("Component", "Joules", "Source"), cells)]
    if use.note:
        blocks.append(Paragraph(f"How it was metered: {use.note}.", quiet=True))
    return Section("energy", "Energy", blocks)
