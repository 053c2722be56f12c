"""Cuts a graph into clusters of exactly K nodes that keep many edges inside: METIS, or a fallback of networkx.

METIS (Karypis and Kumar 1998) cuts the graph into N // K parts of unit weights, by multilevel k-way partitioning, which
the paper names, and by recursive bisection; that with more edges inside is taken. With clusters as small as these
k-way often loses: 2,048 pairs in 64 topics, K = 16: 5,143 edges inside, by bisection 11,789. The parts differ in size,
so they are repaired here. The rule, ours: each part above K lets go its nodes of fewest edges inside, of equals the
greater index; then pairs of a free node and a part below K are taken by the number of edges between them, most first,
of equals the smaller node and part, and each node joins the first of its parts that has room. Nodes without
such a part fill what room is left, by index; the N mod K last ones without room are left over.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchlab.core.checks import as_count
from batchlab.core.errors import BatchlabError, InputError
from batchlab.data.mining.similarity_graph import Graph, inside_edges

Method = Literal["auto", "metis", "louvain"]
_SWEEPS = 4


class Partition(NamedTuple):
    """clusters: (N // K, K), nodes sorted in each. leftover: (N mod K,), sorted. method: "metis" or "louvain"."""

    clusters: NDArray[np.int64]
    leftover: NDArray[np.int64]
    method: str


def partition(graph: Graph, size: int, *, method: Method = "auto", seed: int = 0) -> Partition:
    """Clusters of exactly `size` nodes.

    method: "metis" needs PyMetis, the extra "mining"; "louvain" takes networkx, which torch brings along, keeps fewer
    edges inside and is slower; "auto" is "metis" where it is installed. The same graph, size, method and seed
    give the same clusters.
    Raises `InputError` where there are fewer than `size` nodes.
    """
    size, seed = as_count(size=size), as_count(0, seed=seed)
    check_method(method)
    if graph.nodes < size:
        raise InputError(f"size must be at most the {graph.nodes} nodes, got {size}")
    metis = _pymetis(required=method == "metis") if method != "louvain" else None
    parts = graph.nodes // size
    if parts == 1 or size == 1 or not graph.edges:
        found = [repaired(graph, np.arange(graph.nodes) % parts, parts, size)]
    elif metis is not None:
        members = (_metis(metis, graph, parts, seed, recursive) for recursive in (False, True))
        found = [repaired(graph, member, parts, size) for member in members]
    else:
        found = [_swapped(graph, *repaired(graph, _grown(graph, parts, size, seed), parts, size))]
    clusters, leftover = max(found, key=lambda each: inside_edges(graph, each[0]))
    return Partition(clusters, leftover, "louvain" if metis is None else "metis")


def check_method(method: Method) -> None:
    """Refuses one that is not known, or not installed."""
    if method not in ("auto", "metis", "louvain"):
        raise InputError(f'method must be "auto", "metis" or "louvain", got {method!r}')
    if method == "metis":
        _pymetis(required=True)


def _metis(metis: Any, graph: Graph, parts: int, seed: int, recursive: bool) -> NDArray[np.int64]:
    adjacency = metis.CSRAdjacency(graph.indptr, graph.indices)
    _, member = metis.part_graph(parts, adjacency, recursive=recursive, options=metis.Options(seed=seed))
    return np.asarray(member, dtype=np.int64)


def repaired(
    graph: Graph, member: NDArray[np.int64], parts: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Parts made equal by the rule above: clusters (parts, size) and the nodes left over.

    member: (N,) the part of each node, below `parts`. N must be from parts·size to parts·size + size - 1.
    """
    member = member.copy()
    counts = np.bincount(member, minlength=parts)
    start = np.repeat(np.arange(graph.nodes), np.diff(graph.indptr))
    inside = np.bincount(start[member[start] == member[graph.indices]], minlength=graph.nodes)
    order = np.lexsort((-np.arange(graph.nodes), inside, member))  # by part, fewest inside first, greater index first
    place = np.arange(graph.nodes) - np.concatenate([[0], np.cumsum(counts)])[member[order]]
    free = np.sort(order[place < (counts - size)[member[order]]])
    member[free] = -1
    room = size - np.bincount(member[member >= 0], minlength=parts)
    for node, part in _wishes(graph, member, free, room):
        if member[node] < 0 and room[part]:
            member[node] = part
            room[part] -= 1
    free = free[member[free] < 0]
    filled = np.repeat(np.arange(parts), room)
    member[free[: len(filled)]] = filled
    leftover = free[len(filled) :]
    clusters = np.argsort(member, kind="stable")[len(leftover) :].reshape(parts, size)
    return clusters, leftover


def _wishes(
    graph: Graph, member: NDArray[np.int64], free: NDArray[np.int64], room: NDArray[np.int64]
) -> list[tuple[int, int]]:
    """Pairs of a free node and a part with room that edges join, most edges first."""
    found = []
    for node in free.tolist():
        near = member[graph.neighbours(node)]
        near = near[near >= 0]
        parts, edges = np.unique(near[room[near] > 0], return_counts=True)
        found += [(-edge, node, part) for part, edge in zip(parts.tolist(), edges.tolist(), strict=True)]
    return [(node, part) for _, node, part in sorted(found)]


def _grown(graph: Graph, parts: int, size: int, seed: int) -> NDArray[np.int64]:
    """Louvain's communities, the largest first, each cut into runs of `size` nodes that grow along edges.

    A cluster starts at the community's free node of fewest free neighbours and takes the free node with the most edges
    into it; where the community has none left it goes on in the next one.
    """
    member = np.full(graph.nodes, -1, dtype=np.int64)
    free_degree = np.diff(graph.indptr).copy()
    cluster, have = 0, 0
    edges_in: dict[int, int] = {}
    for community in _communities(graph, seed):
        free = set(community)
        while free and cluster < parts:
            joined = {node: count for node, count in edges_in.items() if node in free}
            node = (
                max(joined, key=lambda v: (joined[v], -v)) if joined else min(free, key=lambda v: (free_degree[v], v))
            )
            free.remove(node)
            member[node] = cluster
            edges_in.pop(node, None)
            for other in graph.neighbours(node).tolist():
                free_degree[other] -= 1
                if member[other] < 0:
                    edges_in[other] = edges_in.get(other, 0) + 1
            have += 1
            if have == size:
                cluster, have, edges_in = cluster + 1, 0, {}
    member[member < 0] = parts - 1
    return member


def _swapped(
    graph: Graph, clusters: NDArray[np.int64], leftover: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Exchanges nodes of two clusters while edges inside grow: each node is offered to the one it has most edges to."""
    member = np.full(graph.nodes, -1, dtype=np.int64)
    member[clusters] = np.arange(len(clusters))[:, None]
    for _ in range(_SWEEPS):
        changed = False
        for node in clusters.ravel().tolist():
            own, near = member[node], member[graph.neighbours(node)]
            counts = np.bincount(near[near >= 0], minlength=1)
            best = int(counts.argmax())
            gain = counts[best] - (counts[own] if own < len(counts) else 0)
            if best == own or gain <= 0:
                continue
            others = np.flatnonzero(member == best)
            gains = [gain + _gain(graph, member, int(other), best, int(own), node) for other in others]
            if max(gains) > 0:
                other = others[int(np.argmax(gains))]
                member[node], member[other] = best, own
                changed = True
        if not changed:
            break
    return np.argsort(member, kind="stable")[len(leftover) :].reshape(clusters.shape), leftover


def _gain(graph: Graph, member: NDArray[np.int64], node: int, start: int, end: int, partner: int) -> int:
    """Edges inside that a node adds by going from cluster `start` to `end` while its partner comes the other way."""
    near = graph.neighbours(node)
    of = member[near]
    return int((of == end).sum() - (of == start).sum() - 2 * (near == partner).sum())


def _communities(graph: Graph, seed: int) -> list[list[int]]:
    networkx = importlib.import_module("networkx")
    start = np.repeat(np.arange(graph.nodes), np.diff(graph.indptr))
    whole = networkx.Graph()
    whole.add_nodes_from(range(graph.nodes))
    whole.add_edges_from(zip(start.tolist(), graph.indices.tolist(), strict=True))
    found = networkx.community.louvain_communities(whole, seed=seed)
    return sorted((sorted(each) for each in found), key=lambda each: (-len(each), each[0]))


def _pymetis(required: bool) -> Any:
    try:
        return importlib.import_module("pymetis")
    except ImportError as error:
        if required:
            raise BatchlabError("method \"metis\" needs PyMetis: pip install 'batchlab[mining]'") from error
        return None
