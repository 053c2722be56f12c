"""The path of training in the plane it needs most: PCA of checkpoints (Li et al. 2018, section 7).

M has a row θ_i - θ_n for each checkpoint i before the last. Its leading right singular vectors v₁, v₂ are the axes;
the share of ‖M‖² along each is what it explains. From the Gram matrix M·Mᵀ, which has one row a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.measure.surface.directions import Direction, ignored, trainable

_PARALLEL = 1e-6
_RANK = 1e-12
_COLUMNS = 2**20


@dataclass(frozen=True)
class Trajectory(JsonNoun):
    """A path of weights in a plane through its last point.

    points: (a, b) of each checkpoint, the last one at (0, 0): nearest to it is θ_n + a·d₁ + b·d₂, so that the path
    lies on a `landscape` along the same directions from θ_n.
    captured: the share of the squared distances to θ_n that lies in the plane, 0 to 1.
    explained: the shares of the variance along each axis, for PCA; empty for other planes. centered: whether that is
    the variance about the path's mean (as scikit-learn has it), or the squared distance to θ_n.
    """

    points: tuple[tuple[float, float], ...]
    captured: float
    explained: tuple[float, ...] = ()
    centered: bool = False

    def grid(self, points: int = 25, margin: float = 0.2) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Coordinates for `landscape` that hold the path, with a margin in shares of its extent; 0 is among them."""
        if isinstance(points, bool) or not isinstance(points, int) or points < 3 or not 0 <= margin < math.inf:
            raise InputError(f"points must be at least 3 and margin at least 0, got {points!r} and {margin!r}")
        extents = [[point[axis] for point in self.points] for axis in (0, 1)]
        longest = max(max(each) - min(each) for each in extents)
        first, second = (_axis(min(each), max(each), margin * longest, points) for each in extents)
        return first, second


class PcaTrajectory(NamedTuple):
    """trajectory: the path. directions: its axes, unit vectors, name -> tensor, as `landscape` takes them."""

    trajectory: Trajectory
    directions: tuple[dict[str, Tensor], dict[str, Tensor]]


def pca_trajectory(
    checkpoints: Sequence[Mapping[str, Tensor]],
    *,
    center: bool = False,
    model: nn.Module | None = None,
    ignore: str | None = None,
) -> PcaTrajectory:
    """The plane that holds most of a path of checkpoints, and the path in it.

    checkpoints: name -> tensor, first to last; at least 3. `state_dict()` gives the live tensors: clone them. They are
        read in float64, a million weights at a time.
    center: False takes the paper's matrix as it is, so that the share explained is of the squared distance to the last
        point. True subtracts the mean row first, as the reference code does through scikit-learn.
    model: says which entries are trainable parameters; the rest, as batch norm's statistics, is left out. Without it
        all floating-point entries count.
    ignore: "biasbn" leaves out biases and parameters of normalisation layers (without `model`: all of at most one
        dimension); None, as in the reference code, takes them.

    Two axes always explain most of a path that was drawn at random, too: a Gaussian random walk in many dimensions has
    61 % and 15 % (centred). A high share says little of the loss.

    Raises `InputError` for a path that lies on one line, or does not move at all.

    >>> path = [{"w": torch.tensor(point)} for point in ([3.0, 4.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0])]
    >>> trajectory, (first, second) = pca_trajectory(path)
    >>> round(trajectory.captured, 12), round(sum(trajectory.explained), 12)
    (1.0, 1.0)
    """
    if len(checkpoints) < 3:
        raise InputError(f"checkpoints must be at least 3, two of them span no plane, got {len(checkpoints)}")
    names = _names(checkpoints, model, ignore)
    gram = torch.zeros(len(checkpoints) - 1, len(checkpoints) - 1, dtype=torch.float64, device="cpu")
    for name in names:
        for _, rows in _blocks(checkpoints, name):
            gram += (rows @ rows.T).cpu()
    if not gram.isfinite().all():
        raise InputError("checkpoints must be finite, some of them hold NaN or infinite weights")
    if not gram.any():
        raise InputError("checkpoints must differ, all are equal: state_dict() gives the live tensors, clone them")
    mean = gram.new_full(gram.shape, 1 / len(gram)) if center else torch.zeros_like(gram)
    centring = torch.eye(len(gram), dtype=torch.float64, device="cpu") - mean
    squares, vectors = torch.linalg.eigh(centring @ gram @ centring)
    squares = squares.flip(0).clamp_min(0)
    total, leading = float(squares.sum()), vectors.flip(1)[:, :2]
    if not float(squares[1]) > _RANK * total:
        raise InputError("checkpoints must span a plane, these lie on one line")
    leading = leading * leading.gather(0, leading.abs().argmax(0, keepdim=True)).sign()
    weights = (centring @ leading) / squares[:2].sqrt()
    axes: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name in names:
        both = [weights.T.to(rows) @ rows for _, rows in _blocks(checkpoints, name)]
        for k, axis in enumerate(axes):
            last = checkpoints[-1][name]
            whole = torch.cat([part[k] for part in both]) if both else last.new_zeros(0, dtype=torch.float64)
            axis[name] = whole.reshape(last.shape)
    projected = project_trajectory(checkpoints, axes)
    explained = tuple(float(square) / total for square in squares[:2])
    return PcaTrajectory(Trajectory(projected.points, projected.captured, explained, center), axes)


def project_trajectory(checkpoints: Sequence[Mapping[str, Tensor]], directions: Sequence[Direction]) -> Trajectory:
    """Checkpoints in the plane of two directions through the last one, by least squares.

    directions: name -> tensor; only these entries are compared. (a, b) minimise ‖θ_i - θ_n - a·d₁ - b·d₂‖, which is
    <θ_i - θ_n, d>/‖d‖² along each of two orthogonal directions. The reference code's cosine projection is
    <θ_i - θ_n, d>/‖d‖: the same for orthogonal unit vectors, and in no other case the coordinates of a landscape.

    Raises `InputError` for parallel directions.

    >>> path = [{"w": torch.tensor([2.0, 3.0])}, {"w": torch.tensor([0.0, 0.0])}]
    >>> project_trajectory(path, [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}]).points
    ((-1.0, 3.0), (0.0, 0.0))
    """
    if len(checkpoints) < 1 or len(directions) != 2:
        raise InputError(f"needs a checkpoint or more and 2 directions, got {len(checkpoints)} and {len(directions)}")
    names = list(dict.fromkeys(name for d in directions for name in d))
    _check_entries(checkpoints, {name: d[name].shape for d in directions for name in d})
    A = torch.zeros(2, 2, dtype=torch.float64, device="cpu")
    products = torch.zeros(len(checkpoints) - 1, 2, dtype=torch.float64, device="cpu")
    squares = 0.0
    for name in names:
        for part, rows in _blocks(checkpoints, name):
            zero = rows.new_zeros(rows.shape[1])
            both = torch.stack([d[name].detach().reshape(-1)[part].to(zero) if name in d else zero for d in directions])
            A += (both @ both.T).cpu()
            products += (rows @ both.T).cpu()
            squares += float(rows.square().sum())
    size = float(A[0, 0] * A[1, 1])
    if not float(torch.linalg.det(A)) > _PARALLEL * size:
        raise InputError("directions must span a plane, these are parallel or zero")
    points = torch.linalg.solve(A, products.T).T
    captured = float((points * products).sum()) / squares if squares else math.nan
    path = tuple((float(a), float(b)) for a, b in points.tolist())
    return Trajectory((*path, (0.0, 0.0)), captured)


def _names(checkpoints: Sequence[Mapping[str, Tensor]], model: nn.Module | None, ignore: str | None) -> list[str]:
    if ignore not in ("biasbn", None):
        raise InputError(f'ignore must be "biasbn" or None, got {ignore!r}')
    last = checkpoints[-1]
    if model is None:
        names = [name for name, each in last.items() if each.is_floating_point() and (each.ndim > 1 or ignore is None)]
    else:
        left_out = ignored(model) if ignore else set()
        names = [name for name in trainable(model) if name not in left_out]
    if not names:
        raise InputError("checkpoints must hold weights to compare, these hold none")
    if missing := [name for name in names if name not in last]:
        raise InputError(f"checkpoints must hold the parameters of the model, {missing[0]!r} is not in the last one")
    _check_entries(checkpoints, {name: last[name].shape for name in names})
    return names


def _check_entries(checkpoints: Sequence[Mapping[str, Tensor]], shapes: Mapping[str, torch.Size]) -> None:
    for place, each in enumerate(checkpoints):
        for name, shape in shapes.items():
            if name not in each or each[name].shape != shape:
                had = tuple(each[name].shape) if name in each else "no such entry"
                raise InputError(f"checkpoints must have {name!r} with shape {tuple(shape)}, number {place} has {had}")


def _blocks(checkpoints: Sequence[Mapping[str, Tensor]], name: str) -> Iterator[tuple[slice, Tensor]]:
    """θ_i - θ_n of one tensor, a row for each checkpoint before the last, in float64; a part of its columns each."""
    flats = [each[name].detach().reshape(-1) for each in checkpoints]
    for start in range(0, len(flats[-1]), _COLUMNS):
        part = slice(start, start + _COLUMNS)
        last = flats[-1][part].to(torch.float64)
        rows = [each[part].to(last) - last for each in flats[:-1]]
        yield part, torch.stack(rows) if rows else last.new_zeros(0, len(last))


def _axis(low: float, high: float, margin: float, points: int) -> tuple[float, ...]:
    """Even steps that hold low - margin to high + margin, and 0 where that is between."""
    low, high = low - margin, high + margin
    step = (high - low) / (points - 2)
    if not step > 0:
        raise InputError("the path must have an extent along both axes, or a margin: it has none along one of them")
    first = math.floor(low / step)
    return tuple(k * step for k in range(first, first + points))
