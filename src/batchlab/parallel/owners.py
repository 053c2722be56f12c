"""Functions of whole tensors that are spread over ranks (DTensor), each computed once, on one rank of its mesh.

Every tensor has an owner: the ranks send it their parts, it computes, and each gets back its part of the result. The
owners' work is balanced. Each rank sends and receives a few times what it holds, and holds at most the whole tensors
that it owns. Parts go point to point, one message a pair of ranks and direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from batchlab.core.errors import InputError
from batchlab.parallel.shards import Mesh
from batchlab.parallel.sums import Layout

Function = Callable[[list[Tensor]], tuple[list[Tensor], Tensor]]
Runs = tuple[tuple[int, int], ...]  # (start, length) of consecutive places along one dimension


@dataclass(frozen=True)
class Whole:
    """A request of a rule: a function of whole tensors; the answer is this rank's part of its results, and its notes.

    parts: this rank's, of tensors of one `shape`. of: takes a list of whole tensors; returns as many of the same shape
    and dtype, and for each a row of `notes` numbers. It is called with those of the list that have the same owner.
    """

    parts: Sequence[Tensor]
    shape: torch.Size
    of: Function
    notes: int = 0

    def here(self) -> tuple[list[Tensor], Tensor]:
        """The answer where the parts are the whole tensors."""
        return self.of(list(self.parts))


class _Job(NamedTuple):
    """One tensor. owner: its place in the mesh. pieces: what each place holds. sources: the places that send."""

    request: int
    part: Tensor
    owner: int
    pieces: tuple[tuple[Runs, ...], ...]
    sources: tuple[int, ...]


def at_owners(requests: Sequence[Whole], layouts: Sequence[Layout]) -> list[tuple[list[Tensor], Tensor]]:
    """The answer to each request; every rank of a mesh must call with the same ones in order."""
    together: dict[tuple[Mesh, torch.dtype], list[int]] = {}
    for index, (request, layout) in enumerate(zip(requests, layouts, strict=True)):
        if request.parts:
            together.setdefault((layout.mesh, request.parts[0].dtype), []).append(index)
    answers: list[tuple[list[Tensor], Tensor]] = [([], torch.empty(0, each.notes)) for each in requests]
    for (mesh, _), indices in together.items():
        if mesh is None:
            answers = [requests[i].here() if i in indices else answer for i, answer in enumerate(answers)]
            continue
        jobs = _jobs(requests, layouts, indices, mesh)
        ranks = mesh.mesh.flatten().tolist()
        me = ranks.index(dist.get_rank())
        results = _computed(requests, jobs, _gathered(requests, jobs, ranks, me), me)
        for index, found, notes in _handed_back(requests, jobs, results, ranks, me):
            answers[index] = (found, notes)
    return answers


def pieces_of(shape: Sequence[int], sizes: Sequence[int], layout: Layout) -> tuple[tuple[Runs, ...], ...]:
    """For each place in a mesh of these sizes, row by row: which places of each dimension of a tensor it holds."""
    return _pieces(tuple(shape), tuple(sizes), layout.dims, layout.blocks)


@lru_cache(maxsize=4096)
def _pieces(
    shape: tuple[int, ...], sizes: tuple[int, ...], dims: tuple[int | None, ...], blocks: tuple[int, ...]
) -> tuple[tuple[Runs, ...], ...]:
    pieces = []
    for place in product(*map(range, sizes)):
        held: list[Runs] = [((0, length),) for length in shape]
        for size, at, dim, count in zip(sizes, place, dims, blocks, strict=True):
            if dim is not None:
                each = [_chunk(_chunk(held[dim], count, block), size, at) for block in range(count)]
                held[dim] = tuple(run for runs in each for run in runs)
        pieces.append(tuple(held))
    return tuple(pieces)


def _chunk(runs: Runs, count: int, at: int) -> Runs:
    """As torch.chunk: equal ones but for the last, which are shorter or empty."""
    length = sum(size for _, size in runs)
    step = -(-length // count)
    low, high = min(at * step, length), min((at + 1) * step, length)
    found, before = [], 0
    for start, size in runs:
        first, last = max(low - before, 0), min(high - before, size)
        if first < last:
            found.append((start + first, last - first))
        before += size
    return tuple(found)


def _jobs(requests: Sequence[Whole], layouts: Sequence[Layout], indices: Sequence[int], mesh: Mesh) -> list[_Job]:
    sizes = tuple(mesh.mesh.shape)
    places = list(product(*map(range, sizes)))
    here = places.index(tuple(mesh.get_coordinate()))
    every = [(index, part) for index in indices for part in requests[index].parts]
    load, owners = [0.0] * len(places), [0] * len(every)
    costs = [_cost(requests[index].shape) for index, _ in every]
    for i in sorted(range(len(every)), key=lambda i: -costs[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    jobs = []
    for (index, part), owner in zip(every, owners, strict=True):
        layout = layouts[index]
        pieces = pieces_of(requests[index].shape, sizes, layout)
        if _shape(pieces[here]) != tuple(part.shape):
            raise InputError(
                f"a tensor of shape {tuple(requests[index].shape)} is spread in an unknown way: this rank should hold "
                f"{_shape(pieces[here])}, it holds {tuple(part.shape)}"
            )
        copies = [d for d, dim in enumerate(layout.dims) if dim is None]
        sources = [i for i, place in enumerate(places) if all(place[d] == places[owner][d] for d in copies)]
        jobs.append(_Job(index, part, owner, pieces, tuple(sources)))
    return jobs


def _gathered(requests: Sequence[Whole], jobs: Sequence[_Job], ranks: Sequence[int], me: int) -> list[Tensor]:
    """The whole tensors of the jobs that are this rank's, in order."""
    outgoing = {
        to: [job.part.reshape(-1) for job in jobs if job.owner == to and me in job.sources] for to in range(len(ranks))
    }
    mine = [job for job in jobs if job.owner == me]
    sizes = {
        source: [math.prod(_shape(job.pieces[source])) for job in mine if source in job.sources]
        for source in range(len(ranks))
    }
    arrived = {source: iter(flat) for source, flat in _swapped(outgoing, sizes, ranks, me, jobs[0].part).items()}
    wholes = []
    for job in mine:
        whole = job.part.new_empty(requests[job.request].shape)
        for source in job.sources:
            piece = next(arrived[source]).view(_shape(job.pieces[source]))
            for of_whole, of_piece in _boxes(job.pieces[source]):
                whole[of_whole] = piece[of_piece]
        wholes.append(whole)
    return wholes


def _computed(
    requests: Sequence[Whole], jobs: Sequence[_Job], wholes: Sequence[Tensor], me: int
) -> list[tuple[Tensor, Tensor]]:
    """Of each tensor of this rank the result and its row of notes, in order."""
    mine = [job.request for job in jobs if job.owner == me]
    results: list[tuple[Tensor, Tensor]] = []
    for index in dict.fromkeys(mine):
        found, notes = requests[index].of([whole for whole, of in zip(wholes, mine, strict=True) if of == index])
        results += zip(found, notes, strict=True)
    return results


def _handed_back(
    requests: Sequence[Whole],
    jobs: Sequence[_Job],
    results: Sequence[tuple[Tensor, Tensor]],
    ranks: Sequence[int],
    me: int,
) -> list[tuple[int, list[Tensor], Tensor]]:
    """For each request its index, and this rank's parts and the notes of its results."""
    outgoing: dict[int, list[Tensor]] = {to: [] for to in range(len(ranks))}
    for job, (result, notes) in zip([job for job in jobs if job.owner == me], results, strict=True):
        for to, runs in enumerate(job.pieces):
            outgoing[to] += [_taken(result, runs).reshape(-1), notes.to(result.dtype)]
    sizes: dict[int, list[int]] = {source: [] for source in range(len(ranks))}
    for job in jobs:
        sizes[job.owner] += [math.prod(_shape(job.pieces[me])), requests[job.request].notes]
    arrived = {source: iter(flat) for source, flat in _swapped(outgoing, sizes, ranks, me, jobs[0].part).items()}
    answers: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    for job in jobs:
        parts, rows = answers.setdefault(job.request, ([], []))
        parts.append(next(arrived[job.owner]).view(job.part.shape))
        rows.append(next(arrived[job.owner]))
    return [(index, parts, torch.stack(rows)) for index, (parts, rows) in answers.items()]


def _swapped(
    outgoing: dict[int, list[Tensor]], sizes: dict[int, list[int]], ranks: Sequence[int], me: int, like: Tensor
) -> dict[int, Sequence[Tensor]]:
    """Sends each list of flat tensors to its place, and returns those that came, of these sizes."""
    operations = []
    came: dict[int, Sequence[Tensor]] = {me: outgoing[me]}
    for place, rank in enumerate(ranks):
        if place == me:
            continue
        if any(each.numel() for each in outgoing[place]):
            operations.append(dist.P2POp(dist.isend, torch.cat(outgoing[place]), rank))
        buffer = like.new_empty(sum(sizes[place]))
        came[place] = torch.split(buffer, sizes[place])
        if buffer.numel():
            operations.append(dist.P2POp(dist.irecv, buffer, rank))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return came


def _taken(whole: Tensor, runs: tuple[Runs, ...]) -> Tensor:
    piece = whole.new_empty(_shape(runs))
    for of_whole, of_piece in _boxes(runs):
        piece[of_piece] = whole[of_whole]
    return piece


def _boxes(runs: tuple[Runs, ...]) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """The boxes that a piece is made of: where they are in the whole, and where in the piece."""
    found = []
    lows = [list(accumulate((size for _, size in each), initial=0)) for each in runs]
    for box in product(*(range(len(each)) for each in runs)):
        chosen = [(each[i], low[i]) for each, low, i in zip(runs, lows, box, strict=True)]
        of_whole = tuple(slice(start, start + size) for (start, size), _ in chosen)
        found.append((of_whole, tuple(slice(low, low + size) for (_, size), low in chosen)))
    return found


def _shape(runs: tuple[Runs, ...]) -> tuple[int, ...]:
    return tuple(sum(size for _, size in each) for each in runs)


def _cost(shape: Sequence[int]) -> float:
    """Of a function that multiplies a matrix with itself, as most do that need the whole of one."""
    rows, size = shape[0], math.prod(shape)
    return float(size * min(rows, size // max(rows, 1)))
