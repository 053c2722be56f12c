import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.data.mining.b3_batches import B3Batches, B3Header, B3Index, b3_batches, extra_negatives
from batchlab.data.mining.b3_measures import hard_negative_rate, loss_gap, purity
from batchlab.testing import samplers
from batchlab.testing.samplers import Subject
from tests.spine.forked import in_ranks


def _index(n=256, size=8, leftover=0, windows=True, seed=0):
    """Clusters of consecutive numbers; mining has tests of its own."""
    clusters = np.arange(n - leftover).reshape(-1, size)
    header = B3Header(n, size, 1, 12, False, "metis", seed, 100, 50)
    near = (np.arange(n)[:, None] + np.arange(2, 14)).astype(np.int32) % n
    return B3Index(header, clusters, np.arange(n - leftover, n), near if windows else None)


def _made(n, batch_size=48, **given):
    return B3Batches(_index(n, 8, n % 8), batch_size, **given)


SUBJECTS = {
    "B3": Subject(_made, huge=None),
    "B3, ragged": Subject(_made, visits="most", n=253, huge=None),
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("check", samplers.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SUBJECTS)
def test_contract(name, check):
    check(SUBJECTS[name])


def test_mining_is_graph_and_partition():
    query, target = torch.randn(2, 200, 8, generator=torch.Generator().manual_seed(0))
    index = b3_batches(query, target, cluster_size=8, p=3, m=20)
    assert index.clusters.shape == (25, 8) and index.windows.shape == (200, 20)
    assert index.header.n == 200 and index.header.p == 3 and index.header.edges > index.header.inside > 0
    labelled = b3_batches(query, target, cluster_size=8, m=20, labels=np.arange(200) % 5)
    assert labelled.header.labelled and labelled.header.p == 0
    assert b3_batches(query, target, cluster_size=8, keep_windows=False).header.p == 30


def test_each_epoch_takes_each_cluster_once_in_other_company():
    index = _index()
    batches = B3Batches(index, 32, seed=3)
    epochs = [list(batches) for _ in range(3)]
    assert len(batches) == 8
    for epoch in epochs:
        assert all(len(batch) == 32 for batch in epoch)
        taken = sorted(tuple(batch[at : at + 8]) for batch in epoch for at in range(0, 32, 8))
        assert taken == sorted(map(tuple, index.clusters.tolist()))
    company = [{frozenset(batch) for batch in epoch} for epoch in epochs]
    assert not company[0] & company[1] and not company[1] & company[2]


def test_leftover_examples_take_turns():
    index = _index(n=253, leftover=5)
    batches, seen = B3Batches(index, 8, seed=1), []
    for _ in range(3):
        epoch = list(itertools.chain.from_iterable(batches))
        assert len(epoch) == len(set(epoch)) == 248 and {248, 249, 250, 251, 252} <= set(epoch)
        seen.append(set(epoch))
    assert set.union(*seen) == set(range(253)) and len({frozenset(each) for each in seen}) == 3


def test_clusters_that_fill_no_batch_sit_out_in_turn():
    batches = B3Batches(_index(), 24, seed=0)  # 32 clusters, 3 a batch
    out = [set(range(256)) - set(itertools.chain.from_iterable(batches)) for _ in range(6)]
    assert all(len(each) == 16 for each in out) and len({frozenset(each) for each in out}) > 3


def test_tasks_do_not_mix():
    tasks = [_index(n=256), _index(n=64, seed=1)]
    batches = B3Batches(tasks, 16, seed=2)
    of = []
    for at, batch in enumerate(batches):
        assert len({example >= 256 for example in batch}) == 1
        assert batches.task_of(at) == int(batch[0] >= 256)
        of.append(int(batch[0] >= 256))
    assert len(of) == 20 and sum(of) == 4 and of != sorted(of)


def _of_rank(folder):
    import torch.distributed as dist

    batches = B3Batches(_index(), 32, seed=3, extra=1)
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(list(batches) + list(batches)))


def test_two_ranks_share_the_batches_of_one(tmp_path):
    assert in_ranks(2, tmp_path, _of_rank, tmp_path) == [0, 0]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    whole = B3Batches(_index(), 32, seed=3, extra=1)
    for alone, a, b in zip(list(whole) + list(whole), first, second, strict=True):
        assert a[:16] + b[:16] == alone[:32] and a[16:] + b[16:] == alone[32:]


def test_extra_negatives_come_by_how_often_they_are_in_windows():
    windows = np.array([[4, 5], [4, 6], [4, 7], [4, 5]] + [[0, 1]] * 96, dtype=np.int32)
    drawn = np.array([extra_negatives(np.arange(4), windows, 1, seed)[0] for seed in range(4000)])
    shares = np.bincount(drawn, minlength=8)[4:8] / 4000
    right = np.array([4, 2, 1, 1]) / 8
    assert (abs(shares - right) < 4 * np.sqrt(right * (1 - right) / 4000)).all() and set(drawn) <= {4, 5, 6, 7}
    many = extra_negatives(np.arange(4), windows, 50, 0)
    assert len(set(many.tolist())) == 50 and {4, 5, 6, 7} <= set(many.tolist()) and min(many) >= 4
    assert extra_negatives(np.arange(4), windows, 0).tolist() == []


def test_extra_negatives_follow_the_batch():
    index = _index()
    plain, more = B3Batches(index, 16, seed=5), B3Batches(index, 16, seed=5, extra=2)
    for a, b in zip(plain, more, strict=True):
        assert b[:16] == a and len(set(b)) == len(b) == 48
        near = set(index.windows[a].ravel().tolist()) - set(a)
        assert len(near & set(b[16:])) == min(len(near), 32)


def test_an_index_is_saved_whole(tmp_path):
    query, target = torch.randn(2, 101, 8, generator=torch.Generator().manual_seed(0))
    for keep in (True, False):
        index = b3_batches(query, target, cluster_size=8, p=3, m=20, keep_windows=keep)
        again = B3Index.load(index.save(tmp_path / "index.safetensors"))
        assert again.header == index.header and again.fingerprint() == index.fingerprint()
        assert np.array_equal(again.clusters, index.clusters) and np.array_equal(again.leftover, index.leftover)
        assert np.array_equal(again.windows, index.windows) if keep else again.windows is None
        assert list(B3Batches(again, 16)) == list(B3Batches(index, 16))
    (tmp_path / "other").write_text("text")
    with pytest.raises(InputError, match="is no safetensors file"):
        B3Index.load(tmp_path / "other")


def test_a_state_of_another_index_is_refused():
    state = B3Batches(_index(seed=0), 16).state_dict()
    with pytest.raises(InputError, match="state_dict must have indexes"):
        B3Batches(_index(seed=1), 16).load_state_dict(state)


def test_the_bound_holds():
    """Every case: random embeddings and batches, K up to the batch, three temperatures."""
    generator = torch.Generator().manual_seed(0)
    for n, size in ((12, 3), (60, 10), (200, 20)):
        for temperature in (1.0, 0.2, 0.02):
            query, target = torch.nn.functional.normalize(torch.randn(2, n, 6, generator=generator), dim=2)
            scores = query @ target.T
            batches = torch.randperm(n, generator=generator).view(-1, size).tolist()
            for k in {1, 2, size // 2, size}:
                found = loss_gap(scores, batches, k, temperature)
                assert 0 <= found.gap <= found.bound
            whole = loss_gap(scores, [list(range(n))], n, temperature)
            assert whole.gap == pytest.approx(0, abs=1e-9) and whole.bound == pytest.approx(0, abs=1e-9)


def test_a_default_device_elsewhere_changes_nothing():
    points, batches = torch.randn(40, 4), [list(range(at, at + 8)) for at in range(0, 40, 8)]
    for labels in (None, [at % 4 for at in range(40)]):
        found = []
        for device in ("cpu", "meta"):
            with torch.device(device):
                index = b3_batches(points, points, cluster_size=8, p=2, m=10, labels=labels)
                found.append((index.fingerprint(), index.windows.tolist(), loss_gap(points @ points.T, batches, 2)))
        assert found[0] == found[1]


def test_the_gap_is_of_cross_entropies():
    scores = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batches = [[0, 3, 5, 6], [1, 2, 4, 7]]
    right = torch.nn.functional.cross_entropy(scores, torch.arange(8), reduction="sum")
    for batch in batches:
        inside = scores[batch][:, batch]
        right = right - torch.nn.functional.cross_entropy(inside, torch.arange(4), reduction="sum")
    assert loss_gap(scores, batches, 2).gap == pytest.approx(float(right))


def test_mined_batches_are_harder_and_bounded_closer():
    generator = torch.Generator().manual_seed(0)
    topic = torch.randint(16, (512,), generator=generator)
    points = torch.randn(16, 16, generator=generator)[topic] + 0.5 * torch.randn(512, 16, generator=generator)
    points = torch.nn.functional.normalize(points, dim=1)
    index = b3_batches(points, points, cluster_size=16, p=2, m=24)
    mined = list(B3Batches(index, 16))
    chance = np.random.default_rng(0).permutation(512).reshape(-1, 16).tolist()
    assert hard_negative_rate(mined, index.windows) > 4 * hard_negative_rate(chance, index.windows)
    assert purity(mined, topic) > 2 * purity(chance, topic)
    scores = points @ points.T
    assert loss_gap(scores, mined, 4, 0.1).bound < loss_gap(scores, chance, 4, 0.1).bound
    assert abs(hard_negative_rate(chance, index.windows) - 24 / 511) < 0.01


def test_bad_input():
    index = _index()
    points = torch.randn(20, 4)
    for given, message in (
        ({"batch_size": 20}, "batch_size must be a multiple of the index's cluster_size 8, got 20"),
        ({"batch_size": 264}, "batch_size must be at most the 256 examples in clusters of an index, got 264"),
        ({"batch_size": 16, "extra": 16}, r"(1 + extra)·batch_size must be at most the 256 examples"),
        ({"batch_size": 16, "world_size": 3, "rank": 0}, "batch_size must be a multiple of the 3 ranks, got 16"),
        ({"indexes": [], "batch_size": 16}, "indexes must hold one index at least, got none"),
        ({"indexes": [3], "batch_size": 16}, "indexes must be of B3Index, got int"),
        (
            {"indexes": _index(windows=False), "batch_size": 16, "extra": 1},
            "extra must be 0 for an index without windows",
        ),
    ):
        with pytest.raises(InputError) as caught:
            B3Batches(**({"indexes": index} | given))
        assert message in str(caught.value)
    with pytest.raises(InputError, match="cluster_size must be at most the 20 examples, got 32"):
        b3_batches(points, points)
    with pytest.raises(InputError, match=r"p \+ m must be at most N - 1 = 19, got p=30, m=100"):
        b3_batches(points, points, cluster_size=4)
    with pytest.raises(InputError, match="target must be finite"):
        b3_batches(points, points * torch.nan, cluster_size=4)
    with pytest.raises(InputError, match="count must be at most the 240 other targets, got 241"):
        extra_negatives(np.arange(16), index.windows, 241)
    with pytest.raises(InputError, match="k must be at most the smallest batch of 2, got 3"):
        loss_gap(torch.ones(4, 4), [[0, 1], [2, 3]], 3)
    with pytest.raises(InputError, match="batches hold each of the N examples once"):
        loss_gap(torch.ones(4, 4), [[0, 1], [2, 2]], 1)


def test_other_things_than_labels_places_and_indexes_are_refused():
    x = torch.randn(64, 4)
    with pytest.raises(InputError, match="labels must be 64 integers, one for each example"):
        b3_batches(x, x, cluster_size=8, p=2, m=10, labels=["a"] * 64)
    for group in ([0, 5], [0, -1], [0.0, 1.0]):
        with pytest.raises(InputError, match="groups must hold places among the 2 labels, from 0"):
            purity([group], [1, 1])
    with pytest.raises(InputError, match="indexes must be a B3Index or several, got None"):
        B3Batches(None, 14)


def test_purity_of_groups_that_come_once():
    assert purity(([0, 1] for _ in range(2)), [0, 0]) == 1.0


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        ("clusters", lambda c: c + 1000, "its clusters do not hold each of 101 examples once"),
        ("clusters", lambda c: c * 0, "its clusters do not hold each of 101 examples once"),
        ("leftover", lambda c: c * 0, "its clusters do not hold each of 101 examples once"),
        ("windows", lambda c: c + 100, "its windows are not of 101 examples"),
        ("windows", lambda c: c[:7], "its windows are not of 101 examples"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, what, change, message):
    query, target = torch.randn(2, 101, 8, generator=torch.Generator().manual_seed(0))
    index = b3_batches(query, target, cluster_size=8, p=3, m=20)
    path = dataclasses.replace(index, **{what: change(getattr(index, what))}).save(tmp_path / "index.safetensors")
    with pytest.raises(InputError, match=f"is damaged: {message}$"):
        B3Index.load(path)


def test_seeds_and_methods_are_looked_at_before_the_scores(monkeypatch):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    given = {"cluster_size": np.int64(8), "p": np.int64(2), "m": np.int64(10)}
    for method in ("louvain", "auto"):
        ends = [b3_batches(x, x, **given, seed=seed, method=method) for seed in (3, np.int64(3), torch.tensor(3))]
        assert len({end.fingerprint() for end in ends}) == 1
    monkeypatch.setattr("batchlab.data.mining.b3_batches.rank_windows", lambda *_, **__: pytest.fail("scored"))
    for bad in ({"seed": "x"}, {"method": "kmeans"}):
        with pytest.raises(InputError, match=f"^{next(iter(bad))} must be"):
            b3_batches(x, x, **given | bad)


def test_measures_refuse_what_is_no_place_or_score():
    windows = np.array([[1], [0], [0], [1]])
    for batch, message in (
        ([-1, 0], "batches must hold places among the 4 examples of windows, from 0"),
        ([0, 4], "batches must hold places among the 4 examples of windows, from 0"),
        ([0.5, 1], "batches must hold places among the 4 examples of windows, from 0"),
        ([0, 0, 0], "batches must hold an example once"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            hard_negative_rate([batch], windows)
    assert hard_negative_rate([[], [0, 1]], windows) == 1.0
    with pytest.raises(InputError, match="groups must hold one place each at least"):
        purity([[]], [1, 2])
    with pytest.raises(InputError, match="scores must be finite"):
        loss_gap(torch.full((4, 4), torch.nan), [[0, 1], [2, 3]], 1)


@pytest.mark.parametrize("labels", [[0.5] * 64, torch.full((64,), torch.nan), torch.zeros(64, dtype=torch.bfloat16)])
def test_labels_are_integers(labels):
    x = torch.randn(64, 4)
    with pytest.raises(InputError, match="labels must be 64 integers, one for each example"):
        b3_batches(x, x, cluster_size=8, p=2, m=10, labels=labels)
