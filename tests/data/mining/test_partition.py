import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import BatchlabError, InputError
from batchlab.data.mining.partition import partition, repaired
from batchlab.data.mining.similarity_graph import Graph, inside_edges, mutual_graph, rank_windows

pytest.importorskip("pymetis")


def _graph(kind, n=2048, seed=0):
    """topics: 64 of them, noisy; random: no structure at all."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "topics":
        points = torch.randn(64, 32, generator=generator)[torch.randint(64, (n,), generator=generator)]
        query = target = points + 0.7 * torch.randn(n, 32, generator=generator)
    else:
        query, target = torch.randn(2, n, 16, generator=generator)
    return mutual_graph(rank_windows(query, target, p=5, m=50))


def _is_partition(found, nodes, size):
    everyone = np.concatenate([found.clusters.ravel(), found.leftover])
    return found.clusters.shape == (nodes // size, size) and np.array_equal(np.sort(everyone), np.arange(nodes))


def test_metis_keeps_far_more_edges_inside_than_chance():
    graph = _graph("topics")
    found = partition(graph, 16)
    chance = inside_edges(graph, np.random.default_rng(0).permutation(2048).reshape(-1, 16))
    assert found.method == "metis" and _is_partition(found, 2048, 16) and not len(found.leftover)
    assert inside_edges(graph, found.clusters) >= 4 * chance > 400


@pytest.mark.parametrize("kind", ["topics", "random"])
def test_the_fallback_is_within_a_tenth_of_metis(kind):
    graph = _graph(kind, n=1024)
    metis, louvain = (partition(graph, 16, method=method) for method in ("metis", "louvain"))
    assert louvain.method == "louvain" and _is_partition(louvain, 1024, 16)
    assert inside_edges(graph, louvain.clusters) >= 0.9 * inside_edges(graph, metis.clusters)


@pytest.mark.parametrize("method", ["metis", "louvain"])
@pytest.mark.parametrize(("n", "size"), [(301, 16), (310, 300), (300, 300), (97, 3), (50, 1), (40, 39)])
def test_every_node_is_in_one_place_and_clusters_are_exact(method, n, size):
    graph = _graph("random", n=n) if n > 60 else mutual_graph(np.array([[(i + 1) % n, (i - 1) % n] for i in range(n)]))
    found = partition(graph, size, method=method)
    assert _is_partition(found, n, size)
    again = partition(graph, size, method=method)
    assert np.array_equal(found.clusters, again.clusters)


@pytest.mark.parametrize("method", ["metis", "louvain"])
def test_isolated_nodes_are_legal(method):
    empty = Graph(np.zeros(41, np.int64), np.empty(0, np.int64))
    assert _is_partition(partition(empty, 8, method=method), 40, 8)
    few = mutual_graph(np.array([[1], [0]] + [[0]] * 38))
    found = partition(few, 8, method=method)
    assert _is_partition(found, 40, 8) and inside_edges(few, found.clusters) == 1


@given(data=st.data())
def test_repair_moves_as_few_as_it_must(data):
    parts, size = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 6))
    n = parts * size + data.draw(st.integers(0, size - 1))
    member = np.array(data.draw(st.lists(st.integers(0, parts - 1), min_size=n, max_size=n)))
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    graph = mutual_graph(np.array([draw.choice(n, size=min(n, 4), replace=False) for _ in range(n)]))
    clusters, leftover = repaired(graph, member, parts, size)
    everyone = np.concatenate([clusters.ravel(), leftover])
    assert clusters.shape == (parts, size) and np.array_equal(np.sort(everyone), np.arange(n))
    stayed = sum((member[cluster] == part).sum() for part, cluster in enumerate(clusters))
    assert stayed == np.minimum(np.bincount(member, minlength=parts), size).sum()


def test_bad_input(monkeypatch):
    graph = _graph("random", n=100)
    with pytest.raises(InputError, match="size must be at most the 100 nodes, got 101"):
        partition(graph, 101)
    with pytest.raises(InputError, match='method must be "auto", "metis" or "louvain", got \'kmeans\''):
        partition(graph, 4, method="kmeans")
    monkeypatch.setitem(sys.modules, "pymetis", None)
    with pytest.raises(BatchlabError, match=r"pip install 'batchlab\[mining\]'"):
        partition(graph, 4, method="metis")
    assert partition(graph, 4).method == "louvain"
