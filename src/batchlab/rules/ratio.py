"""Is it the ratio ρ = η/B alone that decides a score, or do learning rate and batch size count separately?

After the study of Alrashed 2024 (SmolTulu, arXiv 2412.08347) of fine-tuned small models, in which reasoning was better
at a high ratio and pattern tasks at a low one. Its headline pair of recipes differs 116 times in ρ, but also 7 times in
ηB, so that it cannot tell the two apart; a grid over both can. For each task

  y = a + b·ln ρ + c·ln(ηB) + quadratic terms,   ln ρ = ln η - ln B and ln(ηB) = ln η + ln B, both from the centre,

is fitted to all cells of the grid, and nested against each regression on one quantity q alone, y = a + q + q²: those
that the seeds' scatter rejects do not suffice. y goes with ln η - e·ln B, e = (b - c)/(b + c): 1 where the ratio alone
counts, as for SGD near its minimum; 0.5 for sign-like optimizers as Adam; 0 where the batch does not matter. So η/B is
no law, and the share that ln ρ explains does not show it: it is 0.91 on a common grid where e is 0.5.

With equal examples a small batch also makes more updates, which nothing here can tell from the batch: run a grid of
equal updates too, and hold both against each other by `compare`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from batchlab.core.checks import check_count, check_inside
from batchlab.core.errors import InputError
from batchlab.rules.ratio_grid import Direction, RatioTable
from batchlab.rules.ratio_grid import RatioRun as RatioRun
from batchlab.rules.ratio_grid import ratio as ratio
from batchlab.rules.ratio_grid import sweep as sweep
from batchlab.rules.ratio_nouns import LrToBatch, RatioCell, RatioPoint, TaskRatio, TaskSplit, Verdict
from batchlab.rules.replicates import Array, beyond, mean_of, p_value, ratio_of

_SAME = 1e-6  # of a logarithm: ratios closer than this are one
_SURE = 0.9


def lr_to_batch(
    runs: Iterable[RatioRun],
    *,
    directions: Mapping[str, Direction] | None = None,
    coverage: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> LrToBatch:
    """The verdict on each task of a grid of runs, on each pair of tasks, and the cell that suits them all best.

    runs: every cell with the same two seeds or more (five are better), all with equal examples (steps times batch size)
    or all with equal steps. Cells as `sweep` lays them out, or any that tell a quadratic in ln η and ln B.
    directions: task -> "min" where a lower score is better; "max" for all others.
    coverage: of intervals, and 1 - coverage is the level of each test: of tasks with nothing to find 5 % have a slope,
    and 8 % some verdict. draws, seed: of the bootstrap over seeds for the places of two tasks' best ratios.

    A diverged run has no finite score: leave its cell out for all seeds, or give the score that it counts as.
    Raises `InputError` for cells on one line (ratio and product not separable), fewer than 3 learning rates or batch
    sizes, a missing or doubled seed, unequal budgets, scores that are not finite.

    >>> from math import log
    >>> cells = sweep([8, 16, 32], learning_rates=[0.1, 0.2, 0.4], examples=64)
    >>> runs = [RatioRun(c.learning_rate, c.batch_size, c.steps, s, {"a": log(c.ratio) + 0.01 * s * (c.batch_size % 7)})
    ...     for c in cells for s in range(3)]
    >>> found = lr_to_batch(runs).task("a")
    >>> found.verdict, found.sufficient, found.best, found.interior
    ('high', ('ratio',), 6, False)
    """
    check_inside(coverage=coverage)
    check_count(draws=draws)
    check_count(0, seed=seed)
    table = RatioTable.of(runs, directions or {})
    designs = _designs(table.cells)
    tasks = tuple(_task(table, name, designs, coverage) for name in table.scores)
    picks = _bootstrap(table, draws, seed)
    pairs = itertools.combinations(tasks, 2)
    splits = tuple(_split(table, first, second, picks, 1 - coverage) for first, second in pairs)
    ranks = np.mean([_ranks(table.goodness(name)) for name in table.scores], axis=0)
    best = int(np.argmin(ranks))
    prices = {name: float(table.goodness(name).max() - table.goodness(name)[best]) for name in table.scores}
    return LrToBatch(table.cells, tasks, splits, table.budget, table.seeds, best, prices, _notes(table, tasks))


def _quantities(cells: Sequence[RatioCell]) -> dict[str, Array]:
    """Logarithms from the centre of the grid, one for each cell."""
    rate, size = np.log([cell.learning_rate for cell in cells]), np.log([cell.batch_size for cell in cells])
    raw = {"ratio": rate - size, "product": rate + size, "learning_rate": rate, "batch_size": size}
    return {name: values - values.mean() for name, values in raw.items()}


def _designs(cells: Sequence[RatioCell]) -> dict[str, Array]:
    """The columns of each regression: "both", "constant", and each quantity alone."""
    q = _quantities(cells)
    one, x, z = np.ones(len(cells)), q["ratio"], q["product"]
    if np.linalg.matrix_rank(np.stack([one, x, z])) < 3:
        raise InputError("ratio and product are not separable: all cells lie on one line in log η and log B")
    both = np.stack([one, x, z, x * x, z * z, x * z], axis=1)
    if np.linalg.matrix_rank(both) < 6:
        raise InputError("the grid must have at least 3 learning rates and 3 batch sizes, crossed")
    alone = {name: np.stack([one, values, values**2], axis=1) for name, values in q.items()}
    return {"both": both, "constant": both[:, :1], **alone}


def _task(table: RatioTable, name: str, designs: Mapping[str, Array], coverage: float) -> TaskRatio:
    scores = table.scores[name]
    fits = scores @ np.linalg.pinv(designs["both"]).T
    b, c, method = fits[:, 1], fits[:, 2], f"regression of each of {len(scores)} seeds"
    slopes = [mean_of(values, coverage, method) for values in (b, c)]
    exponent = ratio_of(b - c, b + c, coverage, method)
    p = {key: p_value(scores, beyond(designs["both"], design)) for key, design in designs.items() if key != "both"}
    along = np.linalg.pinv(designs["both"])[1]
    p["slope"] = p_value(scores, along[:, None] / np.linalg.norm(along))
    misfit = p_value(scores, beyond(np.eye(scores.shape[1]), designs["both"]))
    shares = {key: _share(scores.mean(axis=0), design) for key, design in designs.items() if key != "constant"}
    means = tuple(mean_of(scores[:, i], coverage, f"{len(scores)} seeds") for i in range(scores.shape[1]))
    best = int(table.goodness(name).argmax())
    return TaskRatio(
        name,
        table.direction(name),
        _verdict(slopes[0].value * table.sign(name), p, 1 - coverage),
        slopes[0],
        slopes[1],
        exponent,
        p["constant"],
        {key: value for key, value in p.items() if key not in ("constant", "slope")},
        shares,
        misfit,
        best,
        _interior(table.cells)[best],
        means,
        _by_ratio(table.cells, scores, coverage),
    )


def _verdict(slope: float, p: Mapping[str, float], level: float) -> Verdict:
    """From the slope of what is better along ln ρ, and whether any regression, and any without the ratio, holds."""
    if p["slope"] < level:
        return "high" if slope > 0 else "low"
    if p["constant"] >= level:
        return "none"
    return "curved" if p["product"] < level else "not the ratio"


def _share(means: Array, design: Array) -> float:
    """The share of the cells' variance that a regression explains; NaN where they do not vary."""
    centred = means - means.mean()
    total = float(centred @ centred)
    fitted = design @ (np.linalg.pinv(design) @ centred)
    return float(1 - ((centred - fitted) @ (centred - fitted)) / total) if total > 0 else math.nan


def _by_ratio(cells: Sequence[RatioCell], scores: Array, coverage: float) -> tuple[RatioPoint, ...]:
    """The mean over the cells of each ratio, ascending."""
    logs = np.log([cell.ratio for cell in cells])
    order = np.argsort(logs)
    groups = np.split(order, np.flatnonzero(np.diff(logs[order]) > _SAME) + 1)
    method = f"{len(scores)} seeds"
    return tuple(
        RatioPoint(math.exp(logs[group].mean()), mean_of(scores[:, group].mean(axis=1), coverage, method), len(group))
        for group in groups
    )


def _interior(cells: Sequence[RatioCell]) -> list[bool]:
    """Whether a cell lies inside the hull of all, in log η and log B."""
    from scipy.spatial import ConvexHull

    q = _quantities(cells)
    points = np.stack([q["learning_rate"], q["batch_size"]], axis=1)
    facets = ConvexHull(points).equations
    return [bool((facets[:, :2] @ point + facets[:, 2] < -_SAME).all()) for point in points]


def _bootstrap(table: RatioTable, draws: int, seed: int) -> dict[str, Array]:
    """ln ρ of the best cell of each task in each draw of seeds, the same draws for all tasks."""
    count = len(table.seeds)
    picks = np.random.default_rng(seed).integers(0, count, (draws, count))
    logs = np.log([cell.ratio for cell in table.cells])
    return {t: logs[(table.sign(t) * table.scores[t][picks].mean(axis=1)).argmax(axis=1)] for t in table.scores}


def _split(
    table: RatioTable, first: TaskRatio, second: TaskRatio, picks: Mapping[str, Array], level: float
) -> TaskSplit:
    """Whether two tasks want different ratios.

    Opposite slopes, both sure; or best ratios more than a step of the grid apart in 90 % of the draws, where the scores
    of both need the ratio: of two tasks of pure noise and 5 seeds, 4 % have best ratios that far apart so often.
    """
    apart = float((np.abs(picks[first.task] - picks[second.task]) > _step(table.cells) + _SAME).mean())
    if {first.verdict, second.verdict} == {"high", "low"}:
        return TaskSplit(first.task, second.task, True, "opposite slopes", apart)
    needed = all(each.p_alone["product"] < level and each.p_any < level for each in (first, second))
    found = apart >= _SURE and needed
    return TaskSplit(first.task, second.task, found, "best ratios apart" if found else "no evidence of a split", apart)


def _step(cells: Sequence[RatioCell]) -> float:
    """A step of the grid: the median over cells of the larger difference, in ln η or ln B, to the nearest other."""
    q = _quantities(cells)
    points = np.stack([q["learning_rate"], q["batch_size"]], axis=1)
    away = np.abs(points[:, None] - points[None]).max(axis=-1) + np.diag(np.full(len(points), np.inf))
    return float(np.median(away.min(axis=1)))


def _ranks(goodness: Array) -> Array:
    """1 for the best cell; the mean rank for equal ones."""
    from scipy.stats import rankdata

    ranks: Array = rankdata(-goodness)
    return ranks


def _notes(table: RatioTable, tasks: Sequence[TaskRatio]) -> tuple[str, ...]:
    notes = []
    if table.budget == "examples":
        notes.append("with equal examples a smaller batch makes more updates: batch size and updates are one variable")
    else:
        notes.append("with equal steps a larger batch sees more examples: batch size and examples are one variable")
    if edge := [each.task for each in tasks if not each.interior]:
        notes.append(f"the best cell lies at the edge of the grid, and is no optimum, for {', '.join(edge)}")
    return tuple(notes)


def compare(equal_examples: LrToBatch, equal_steps: LrToBatch) -> dict[str, tuple[Verdict, Verdict]]:
    """The verdicts of the two budgets for each task of both, in this order: only where they agree is it the batch.

    Where they differ, the number of updates (or of examples) may be what counts.
    """
    for name, found, budget in (
        ("equal_examples", equal_examples, "examples"),
        ("equal_steps", equal_steps, "steps"),
    ):
        if found.budget != budget:
            raise InputError(f"{name} must be of cells with equal {budget}, got equal {found.budget}")
    others = {each.task: each.verdict for each in equal_steps.tasks}
    return {each.task: (each.verdict, others[each.task]) for each in equal_examples.tasks if each.task in others}
