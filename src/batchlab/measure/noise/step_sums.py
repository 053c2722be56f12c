"""What the pieces of one step and its mean gradient add up to, over parameters, meshes and ranks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlab.core.errors import InputError
from batchlab.measure.noise.pieces import Piece
from batchlab.measure.noise.preconditioner import Preconditioner
from batchlab.measure.noise.witness import Witness
from batchlab.measure.norms import sq_norm, to_floats, total
from batchlab.parallel.shards import Mesh, over_meshes, share, whole

Places = Collection[int]


class Source(Protocol):
    """Where the pieces of a step come from: `PieceNorms`, `ExamplePieces`."""

    parameters: list[nn.Parameter]
    witness: Witness
    meshes: dict[int, Mesh]

    def take(self) -> list[Piece]: ...
    def unmet(self, pieces: Sequence[Piece]) -> list[int]: ...
    def choose_witness(self) -> bool: ...


class StepSums(NamedTuple):
    """small: for each subset of parameters Σ n_i|g_i|²/N, g_i the mean gradient of piece i. big: |g|² of each subset.

    examples, number: N and the number of pieces, over all ranks. told: how many pieces were looked at, of which the
    others are taken to be like them; where there was none, or nothing to check them by, it is 0 and `small` of no use.
    """

    small: list[float]
    big: list[float]
    examples: float
    number: int
    told: int


def step_sums(
    source: Source,
    gradients_of: Sequence[nn.Parameter],
    *,
    small: Sequence[Places],
    big: Sequence[Places],
    known: float | Tensor | None = None,
    weights: Preconditioner | None = None,
    group: dist.ProcessGroup | None = None,
) -> StepSums:
    """Takes the source's pieces and adds them up.

    gradients_of: the parameters whose `.grad` is the batch's mean gradient; places count in it for `big`, and in the
    source's own parameters for `small`. known: the last of `big`, if the caller knows it.

    A piece's contribution is c_i = f·(n_i/N)·g_i, f = 1 or the ranks, so that Σ n_i|g_i|²/N = N/f²·Σ|c_i|²/n_i.
    """
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    pieces, witnessed = source.take(), _witnessed(source.witness, known is None)
    if not pieces and world == 1:
        raise InputError("step needs at least one micro_batch before it")
    _check(source, gradients_of, pieces, group)
    own = _own_sums(source, gradients_of, pieces, small, big, known, weights)
    own = [*own[: len(small)], *(each / world for each in own[len(small) :])]
    counts = [float(sum(getattr(piece, name) for piece in pieces)) for name in ("examples", "number", "left_out")]
    sums, witnessed = _over_ranks([*own, *counts, float(len(pieces))], witnessed, group)
    examples, count, left_out, passes = sums[-4:]
    if not count:
        raise InputError("step needs at least one micro_batch before it")
    if known is None and all(p.grad is None for p in gradients_of):
        raise InputError("no parameter has a gradient: call step after backward and before zero_grad")
    finite = all(each - each == 0 for each in sums)
    blind = len(witnessed) > 0 and finite and not witnessed[-1]
    checked = len(witnessed) > 0 and finite and not blind
    factor = source.witness.factor(witnessed, int(passes), world) if checked else world
    if checked:
        source.witness.refuse_clipped(sums[len(own) - 1], factor / world)
    told = 0.0 if blind and source.choose_witness() else count - left_out
    scaled = [square * examples / factor**2 * count / (told or 1) for square in sums[: len(small)]]
    return StepSums(scaled, sums[len(small) : len(own)], examples, int(count), int(told))


def _check(
    source: Source, gradients_of: Sequence[nn.Parameter], pieces: Sequence[Piece], group: dist.ProcessGroup | None
) -> None:
    if pieces and (unmet := source.unmet(pieces)):
        raise InputError(
            f"{len(unmet)} sharded parameters have a gradient that no micro_batch saw: every backward pass must be "
            "in one, and the modules that hold parameters must be called, not their weights alone"
        )
    seen = {place for piece in pieces for place in piece.squares}
    if pieces and not seen and not any(piece.left_out for piece in pieces):
        raise InputError(
            "no backward pass was seen in micro_batch: it must be inside, and reach a parameter that required a "
            "gradient when this was made"
        )
    if len(source.parameters) == len(gradients_of) and (not dist.is_initialized() or dist.get_world_size(group) == 1):
        stale = [p for place, p in enumerate(gradients_of) if place not in seen and p.requires_grad and _nonzero(p)]
        if stale and seen:
            raise InputError(
                f"{len(stale)} parameters have a gradient that no micro_batch saw: every backward pass must be in one, "
                "and zero_grad must reach all parameters before the first"
            )
    ours = set(dist.get_process_group_ranks(group)) if source.meshes else set()
    for mesh in source.meshes.values():
        for ranks in map(dist.get_process_group_ranks, mesh.get_all_groups()):
            if len(ours & set(ranks)) > 1:
                raise InputError(
                    "process_group must hold the data-parallel ranks alone where a model is also split over "
                    f"tensor-parallel ones, got one with ranks of the mesh {mesh}"
                )


def _nonzero(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(share(parameter.grad.detach()).part.to_dense().any())


def _own_sums(
    source: Source,
    gradients_of: Sequence[nn.Parameter],
    pieces: Sequence[Piece],
    small: Sequence[Places],
    big: Sequence[Places],
    known: float | Tensor | None,
    weights: Preconditioner | None,
) -> list[float]:
    """Σ|c_i|²/n_i of each subset of `small`, |g|² of each of `big`, over the ranks of meshes, not of the group."""
    count = len(small) + len(big)
    sums: dict[Mesh | None, list[list[float]]] = {None: [[] for _ in range(count)]}

    def add(mesh: Mesh | None, place: int, number: float, subsets: Sequence[Places], first: int) -> None:
        held = sums.setdefault(mesh, [[] for _ in range(count)])
        for index, places in enumerate(subsets):
            if place in places:
                held[first + index].append(number)

    squares = iter(to_floats([square for piece in pieces for square in piece.squares.values()]))
    for piece in pieces:
        for place in piece.squares:
            add(source.meshes.get(place), place, next(squares) * piece.number / piece.examples, small, 0)
    wanted = big if known is None else big[:-1]
    for place, norm, mesh in _gradient_sq_norms(gradients_of, wanted, weights):
        add(mesh, place, norm, wanted, len(small))
    found = over_meshes({mesh: [total(each) for each in held] for mesh, held in sums.items()})
    if known is not None:
        found[-1] = float(whole(torch.as_tensor(known)))
        if found[-1] < 0:
            raise InputError(f"grad_sq_norm is a squared norm and must be >= 0, got {found[-1]:g}")
    return found


def _gradient_sq_norms(
    parameters: Sequence[nn.Parameter], subsets: Sequence[Places], weights: Preconditioner | None
) -> list[tuple[int, float, Mesh | None]]:
    """|g|² of the gradients in some subset; this rank's share of one that is spread over a mesh.

    A parameter that was frozen since has none, whatever lies in its `.grad`.
    """
    if not subsets:
        return []
    trained = [i for i, p in enumerate(parameters) if p.grad is not None and p.requires_grad]
    wanted = [i for i in trained if any(i in places for places in subsets)]
    shares = [share(gradient) for i in wanted if (gradient := parameters[i].grad) is not None]
    known = weights is not None and weights.known
    weight = [share(weights[i]).part if known and weights is not None else None for i in wanted]
    norms = [sq_norm(held.part, each) / held.holders for held, each in zip(shares, weight, strict=True)]
    return list(zip(wanted, to_floats(norms), [held.mesh for held in shares], strict=True))


def _witnessed(witness: Witness, wanted: bool) -> Tensor:
    """What the witness saw in this step; nothing if it is not wanted, as after a step in which it was not."""
    listened, witness.wanted = witness.wanted, wanted
    if wanted and listened:
        return witness.take()
    witness.forget()
    return witness.nothing


def _over_ranks(sums: list[float], witnessed: Tensor, group: dist.ProcessGroup | None) -> tuple[list[float], Tensor]:
    """Both over all ranks of the group."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return sums, witnessed
    both = torch.cat([torch.tensor(sums, dtype=torch.float64, device=witnessed.device), witnessed])
    dist.all_reduce(both, group=group)
    return both[: len(sums)].tolist(), both[len(sums) :]
