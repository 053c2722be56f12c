"""The constants of the surge law from runs, beside those of its SGD-like rivals (Li et al. 2024, arXiv 2405.14578).

At each of several batches B the best learning rate ε_opt(B), and the updates S to a target with it; E = B·S examples.
B_noise is taken as the critical batch of (S, E): ln S = ln S_min + ln(1 + B_crit/B) ("log"), or the source's straight
line 1/S = 1/S_min - B_crit·(1/E), plain ("reciprocal") or weighted by S² ("weighted"). Then

  surge        ε_max = mean over B of ½ε_opt(B)·(√(B_noise/B) + √(B/B_noise))
  saturating   ε_max = mean over B of ε_opt(B)·(1 + B_noise/B)^α,  α = 1 (SGD) or ½ (the old rule for Adam)

and each curve's error on a batch that was left out says which to believe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import check_inside, check_positive
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.curves.tradeoff_fit import fit_tradeoff
from batchlab.rules import learning_rate as rates
from batchlab.rules.fit.power_laws import Values, checked, plain

Array = NDArray[np.float64]
Form = Literal["log", "reciprocal", "weighted"]
FEWEST = 3
_SHAPES: dict[str, Callable[[Array], Array]] = {  # ε(B)/ε_max at B/B_noise
    "surge": lambda relative: 2 / (np.sqrt(1 / relative) + np.sqrt(relative)),
    "linear": lambda relative: 1 / (1 + 1 / relative),
    "root": lambda relative: 1 / np.sqrt(1 + 1 / relative),
}


@dataclass(frozen=True)
class SurgeFit(JsonNoun):
    """B_noise and the largest best rate of three curves. Batches in the unit given, rates as given.

    noise_scale: B_noise, the fitted critical batch. peak: ε_max of the surge law, at B = B_noise. linear, root: that of
    the saturating law with α = 1 and ½, its limit for large B. batch_sizes, learning_rates: those fitted.
    surge_errors, linear_errors, root_errors: ln(measured/predicted) at each batch by constants fitted without it.
    note: what the reader must know; "" for nothing.
    """

    noise_scale: Estimate
    peak: Estimate
    linear: Estimate
    root: Estimate
    batch_sizes: tuple[float, ...]
    learning_rates: tuple[float, ...]
    surge_errors: tuple[float, ...]
    linear_errors: tuple[float, ...]
    root_errors: tuple[float, ...]
    note: str = ""

    @property
    def errors(self) -> dict[str, float]:
        """The mean of |ln(measured/predicted)| on batches left out, by curve: "surge", "linear", "root"."""
        sets = {"surge": self.surge_errors, "linear": self.linear_errors, "root": self.root_errors}
        return {name: float(np.mean(np.abs(errors))) for name, errors in sets.items()}

    def learning_rate(self, batch_size: float, *, beyond_peak: Literal["hold", "fall"] = "hold") -> float:
        """ε(B) of the surge law; past B_noise held at its peak, for the falling branch is no guide there."""
        noise = self.noise_scale.value
        return rates.surge(self.peak.value, noise, batch_size, noise_scale=noise, beyond_peak=beyond_peak)


def surge(
    batch_size: Values,
    steps: Values,
    learning_rate: Values,
    *,
    at_edge: Sequence[bool] | NDArray[np.bool_] | None = None,
    form: Form = "log",
    coverage: float = 0.95,
) -> SurgeFit:
    """B_noise and ε_max from one (B, S, ε) a run: the batch, the updates to a target, the best learning rate there.

    batch_size: examples or tokens. steps: with the best rate of each batch; several runs a batch are welcome.
    learning_rate: the best of a grid, or `learning_rate_optimum`'s vertex. at_edge: whether it lies at the edge of the
    grid; such batches count for B_noise and not for ε_max. form: how B_noise is fitted.

    B_noise's interval is that of its form (`fit_tradeoff`'s profile, or Student's). ε_max's is Student's of the mean,
    widened over the interval of B_noise: too wide rather than too narrow.

    Raises `InputError` for fewer than three batches, and where the steps do not bound B_noise: then the law is the
    square-root rule. Not for noticeable ε, weight decay or clipping of Adam, which are outside the law.

    >>> sizes = [16, 64, 256, 1024]
    >>> found = surge(sizes, [500, 200, 125, 106.25], [2e-3 / ((64 / b) ** 0.5 + (b / 64) ** 0.5) for b in sizes])
    >>> round(found.noise_scale.value, 6), round(found.peak.value, 9)
    (64.0, 0.001)
    """
    check_inside(coverage=coverage)
    if form not in ("log", "reciprocal", "weighted"):
        raise InputError(f'form must be "log", "reciprocal" or "weighted", got {form!r}')
    sizes, best = map(np.array, checked(batch_size, learning_rate, "batch_size", "learning_rate"))
    counts, edge = _checked_steps(steps, len(sizes), form), _checked_edge(at_edge, len(sizes))
    noise, batches = _noise_scale(sizes, counts, form, coverage), np.unique(sizes[~edge])
    if len(batches) < FEWEST:
        raise InputError(
            f"batch_size must hold at least {FEWEST} batches with a best rate inside its grid, got {len(batches)}"
        )
    tuned = np.array([best[(sizes == batch) & ~edge].mean() for batch in batches])
    peak, linear, root = (_largest(batches, tuned, noise, shape, coverage) for shape in _SHAPES.values())
    (of_surge, of_linear, of_root), why = _held_out(sizes, counts, batches, tuned, noise.value, form)
    left = np.unique(sizes[edge])
    notes = [f"the best rate lies at its grid's edge at {_listed(left)}: left out of ε_max"] if len(left) else []
    fitted = tuple(map(float, batches)), tuple(map(float, tuned))
    note = "; ".join([*notes, *why])
    return SurgeFit(noise, peak, linear, root, *fitted, tuple(of_surge), tuple(of_linear), tuple(of_root), note)


def _checked_steps(steps: Values, rows: int, form: Form) -> Array:
    counts = plain(steps, "steps")
    if len(counts) != rows:
        raise InputError(f"steps and batch_size must be of one length, got {len(counts)} and {rows}")
    for value in counts:
        if not (value == math.inf and form == "log"):  # not reached: the fit in logarithms knows what to do
            check_positive(steps=value)
    return np.array([float(value) for value in counts])


def _checked_edge(at_edge: Sequence[bool] | NDArray[np.bool_] | None, rows: int) -> NDArray[np.bool_]:
    edge = np.zeros(rows, dtype=bool) if at_edge is None else np.asarray(at_edge, dtype=bool)
    if len(edge) != rows:
        raise InputError(f"at_edge and batch_size must be of one length, got {len(edge)} and {rows}")
    return edge


def _noise_scale(sizes: Array, steps: Array, form: Form, coverage: float) -> Estimate:
    if len(np.unique(sizes)) < FEWEST:
        raise InputError(f"batch_size must hold at least {FEWEST} different batches, got {len(np.unique(sizes))}")
    if form == "log":
        found = fit_tradeoff(sizes.tolist(), steps.tolist(), coverage=coverage).b_crit
    else:
        found = _reciprocal(sizes, steps, form, coverage)
    if not 0 < found.value < math.inf:
        raise InputError(
            f"steps do not bound B_noise up to batch_size {sizes.max():g}, it is fitted as {found.value:g}: "
            + ("the law is then the square-root rule; add larger batches" if found.value > 0 else "add smaller batches")
        )
    return found


def _reciprocal(sizes: Array, steps: Array, form: Form, coverage: float) -> Estimate:
    """B_crit of 1/S = 1/S_min - B_crit/E by least squares, each row times S where weighted."""
    from scipy.special import stdtrit

    weight = steps if form == "weighted" else np.ones_like(steps)
    design = np.stack([weight, -weight / (sizes * steps)], 1)
    wanted = weight / steps
    (_, b_crit), *_ = np.linalg.lstsq(design, wanted, rcond=None)
    left = wanted - design @ np.linalg.lstsq(design, wanted, rcond=None)[0]
    free = len(sizes) - 2
    variance = float(left @ left) / free * float(np.linalg.inv(design.T @ design)[1, 1])
    half = float(stdtrit(free, 0.5 + coverage / 2)) * math.sqrt(variance)
    how = "weighted by S²" if form == "weighted" else "unweighted"
    method = f"straight line of 1/S on 1/E over {len(sizes)} runs, {how}, Student's interval"
    value = float(b_crit) if b_crit > 0 else 0.0
    return Estimate(value, min(value, max(0.0, value - half)), value + half, method, coverage)


def _largest(
    batches: Array, tuned: Array, noise: Estimate, shape: Callable[[Array], Array], coverage: float
) -> Estimate:
    """The mean of ε_opt(B)/shape(B/B_noise), and its Student's interval at every B_noise believed."""
    from scipy.special import stdtrit

    def ends(noise_scale: float) -> tuple[float, float, float]:
        each = tuned / shape(batches / noise_scale)
        half = float(stdtrit(len(each) - 1, 0.5 + coverage / 2)) * float(each.std(ddof=1)) / math.sqrt(len(each))
        return float(each.mean()) - half, float(each.mean()), float(each.mean()) + half

    value = ends(noise.value)[1]
    method = f"mean over {len(batches)} batches, Student's interval widened over that of B_noise"
    if noise.low <= 0 or not math.isfinite(noise.high):
        return Estimate(value, 0.0, math.inf, f"{method}, which is not bounded", coverage)
    believed = [ends(float(each)) for each in np.geomspace(noise.low, noise.high, 25)] + [ends(noise.value)]
    low, high = min(end[0] for end in believed), max(end[2] for end in believed)
    return Estimate(value, max(low, 0.0), high, method, coverage)


def _held_out(
    sizes: Array, steps: Array, batches: Array, tuned: Array, noise: float, form: Form
) -> tuple[list[list[float]], list[str]]:
    """ln(measured/predicted) at each batch, by curve, from the other batches; B_noise too where they are three."""
    errors: list[list[float]] = [[] for _ in _SHAPES]
    kept = False
    for batch, rate in zip(batches, tuned, strict=True):
        rest, own = batches != batch, noise
        try:
            own = _noise_scale(sizes[sizes != batch], steps[sizes != batch], form, 0.95).value
        except InputError:
            kept = True
        for place, shape in enumerate(_SHAPES.values()):
            largest = float((tuned[rest] / shape(batches[rest] / own)).mean())
            errors[place].append(math.log(rate / (largest * float(shape(np.array(batch / own))))))
    why = "errors on a batch left out keep the B_noise of all, where the others do not bound it"
    return errors, [why] if kept else []


def _listed(values: Array) -> str:
    return ", ".join(f"{value:g}" for value in values)
