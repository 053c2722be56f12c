import numpy as np
import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.data.mining.similarity_graph import inside_edges, mutual_graph, rank_windows


def _pairs(n=300, d=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)


def _naive(query, target, p, m, labels=None):
    scores = (query.double() @ target.double().T).float().numpy()
    labels = np.arange(len(query)) if labels is None else np.asarray(labels)
    rows = []
    for i, row in enumerate(scores):
        best = [j for j in np.argsort(-row, kind="stable") if labels[j] != labels[i]]
        rows.append(best[p : p + m])
    return np.array(rows)


def _edges(windows):
    inside = [set(row) for row in windows.tolist()]
    return {(i, j) for i, row in enumerate(inside) for j in row if i < j and i in inside[j]}


def _edges_of(graph):
    return {(i, int(j)) for i in range(graph.nodes) for j in graph.neighbours(i) if i < j}


@pytest.mark.parametrize("block", [1, 7, 300, 4096])
def test_windows_and_graph_equal_a_sort(block):
    query, target = _pairs()
    target[200:220] = target[:20]  # equal targets tie: by index
    windows = rank_windows(query, target, p=5, m=40, block=block)
    right = _naive(query, target, 5, 40)
    assert np.array_equal(windows, right)
    graph = mutual_graph(windows)
    assert _edges_of(graph) == _edges(right) and len(_edges(right)) == graph.edges > 100
    assert all((np.diff(graph.neighbours(node)) > 0).all() for node in range(graph.nodes))


def test_the_golden_target_is_left_out_before_ranks_are_skipped():
    points = _pairs()[0]
    windows = rank_windows(points, points, p=0, m=1)
    scores = points @ points.T
    scores.fill_diagonal_(-torch.inf)
    assert np.array_equal(windows[:, 0], scores.argmax(1).numpy())
    for p in (0, 3):
        assert all(node not in row for node, row in enumerate(rank_windows(points, points, p=p, m=50)))


def test_labels_leave_out_the_whole_class():
    query, target = _pairs()
    labels = torch.arange(300) % 7
    windows = rank_windows(query, target, p=0, m=30, labels=labels)
    assert np.array_equal(windows, _naive(query, target, 0, 30, labels))
    assert (labels.numpy()[windows] != labels.numpy()[:, None]).all()


def test_zeros_of_either_sign_tie():
    query, target = torch.ones(6, 1), torch.tensor([[0.0], [-0.0], [0.0], [-0.0], [1.0], [-1.0]])
    assert rank_windows(query, target, p=0, m=5)[5].tolist() == [4, 0, 1, 2, 3]


def test_low_precision_and_negative_scores():
    query, target = (each.bfloat16() for each in _pairs(seed=3))
    assert np.array_equal(rank_windows(query, -target.abs(), p=2, m=20), _naive(query, -target.abs(), 2, 20))


def test_inside_edges():
    graph = mutual_graph(np.array([[1, 2], [0, 2], [0, 1], [0, 1]]))
    assert graph.edges == 3
    assert inside_edges(graph, [[0, 1, 2], [3]]) == 3 and inside_edges(graph, [[0, 1]]) == 1
    assert inside_edges(graph, [[0, 3], [1, 2]]) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"p": 250, "m": 50}, "p + m must be at most N - 1 = 299, got p=250, m=50"),
        ({"m": 0}, "m must be an integer of at least 1, got 0"),
        ({"p": -1}, "p must be an integer of at least 0, got -1"),
        ({"block": 0}, "block must be an integer of at least 1, got 0"),
        ({"labels": [0] * 299}, "labels must have shape (300,), got (299,)"),
        ({"labels": [0] * 280 + [1] * 20}, "p + m must be at most the 20 targets of other labels, got p=5, m=40"),
        (
            {"query": torch.full((300, 12), torch.nan)},
            "query must be finite, got 300 rows that are not, the first at 0",
        ),
        ({"target": torch.ones(299, 12)}, "query and target must have one shape (N, d)"),
        ({"query": torch.ones(300, 12, dtype=torch.int64)}, "query must be a floating-point tensor (N, d)"),
        ({"query": np.ones((300, 12))}, "query must be a floating-point tensor (N, d), got ndarray"),
    ],
)
def test_bad_input(given, message):
    query, target = _pairs()
    with pytest.raises(InputError) as caught:
        rank_windows(**({"query": query, "target": target, "p": 5, "m": 40} | given))
    assert message in str(caught.value)
