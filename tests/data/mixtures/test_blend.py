import json
import math

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from batchlab.core.errors import InputError
from batchlab.data.mixtures.blend import Blend, temperature_weights
from batchlab.testing import samplers
from batchlab.testing.samplers import Subject
from tests.spine.forked import in_ranks


def _made(n, batch_size=16, **given):
    return Blend({"a": n - n // 3, "b": n // 3}, batch_size, weights={"a": 1, "b": 1}, **given)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("check", samplers.CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check(Subject(_made, visits="any"))


def _drawn(blend, count):
    return blend._stream.indices(0, count)


def test_shares_are_constant_through_the_run_and_when_a_source_wraps():
    """10^5 draws: every window of 1,000, at any place, within 4 standard errors of independent draws; c wraps."""
    shares = {"a": 0.6, "b": 0.3, "c": 0.1}
    blend = Blend({"a": 90_000, "b": 70_000, "c": 500}, 100, weights=shares)
    names = np.array(blend.sources(0, 100_000))
    for name, share in shares.items():
        sums = np.concatenate([[0], np.cumsum(names == name)])
        windows = (sums[1000:] - sums[:-1000]) / 1000
        assert abs(windows - share).max() < 4 * math.sqrt(share * (1 - share) / 1000)
    drawn = blend.report(1000)[2]
    assert drawn.examples == (names == "c").sum() and drawn.wraps == (drawn.examples - 1) // 500 >= 19


def test_token_shares_are_as_asked():
    """Sequences of other lengths by source; tokens by the sequences that were really drawn, to 0.5 % at 10^6 tokens."""
    draw = np.random.default_rng(0)
    lengths = {
        "web": draw.integers(50, 150, 4000),
        "code": draw.integers(300, 900, 900),
        "books": draw.integers(2, 40, 9000),
    }
    blend = Blend(
        {name: len(each) for name, each in lengths.items()},
        64,
        weights={"web": 0.5, "code": 0.3, "books": 0.2},
        by="tokens",
        tokens={name: int(each.sum()) for name, each in lengths.items()},
    )
    all_lengths, of = np.concatenate(list(lengths.values())), np.repeat(np.arange(3), [4000, 900, 9000])
    indices = _drawn(blend, 20_000)
    spent = np.bincount(of[indices], weights=all_lengths[indices])
    assert spent.sum() > 1e6
    assert abs(spent / spent.sum() - [0.5, 0.3, 0.2]).max() < 0.005
    report = blend.report(20_000 // 64)
    assert [each.share_of_tokens for each in report] == pytest.approx([0.5, 0.3, 0.2], abs=0.005)
    assert [each.tokens for each in report] == pytest.approx(spent.tolist(), rel=0.02)


def test_nothing_comes_again_before_its_source_is_out():
    blend = Blend({"a": 700, "b": 40}, 32, weights={"a": 3, "b": 1})
    indices = _drawn(blend, 4000)
    for low, size in ((0, 700), (700, 40)):
        mine = indices[(indices >= low) & (indices < low + size)]
        for epoch in range(len(mine) // size):
            assert len(set(mine[epoch * size : (epoch + 1) * size].tolist())) == size
    a, b = blend.report(4000 // 32)
    assert a.examples == (indices < 700).sum() and abs(a.examples - 3000) <= 3 and a.examples + b.examples == 4000
    assert a.wraps == 4 and b.wraps == (b.examples - 1) // 40 and b.epochs == b.examples / 40


def test_the_batch_size_may_change_and_cuts_the_same_stream():
    blend = Blend({"a": 700, "b": 40}, 32, seed=4)
    batches = iter(blend)
    seen = [next(batches) for _ in range(3)]
    blend.batch_size = 50
    seen += [next(batches) for _ in range(3)]
    assert [len(batch) for batch in seen] == [32] * 3 + [50] * 3
    assert np.concatenate(seen).tolist() == _drawn(Blend({"a": 700, "b": 40}, 7, seed=4), 246).tolist()
    assert sum(each.examples for each in blend.report()) == 246
    again = Blend({"a": 700, "b": 40}, 32, seed=4)
    again.load_state_dict(json.loads(json.dumps(blend.state_dict())))
    assert next(iter(again)) == next(batches)


def test_temperature():
    sizes = {"a": 1000, "b": 10}
    assert temperature_weights(sizes, 1.0) == pytest.approx({"a": 1000 / 1010, "b": 10 / 1010})
    assert temperature_weights(sizes, 1e9) == pytest.approx({"a": 0.5, "b": 0.5})
    assert Blend(sizes, 4, temperature=2.0).weights == pytest.approx({"a": 10 / 11, "b": 1 / 11})
    assert Blend(sizes, 4).weights == pytest.approx({"a": 1000 / 1010, "b": 10 / 1010})
    by_tokens = Blend(sizes, 4, temperature=1.0, by="tokens", tokens={"a": 1000, "b": 1000})
    assert by_tokens.weights == {"a": 0.5, "b": 0.5} and by_tokens._order.weights[0] == pytest.approx(1000 / 1010)


def test_a_loader_takes_it():
    data = ConcatDataset([TensorDataset(torch.zeros(30)), TensorDataset(torch.ones(10))])
    blend = Blend({"zeros": 30, "ones": 10}, 16, weights={"zeros": 1, "ones": 1})
    batches = iter(DataLoader(data, batch_sampler=blend))
    assert abs(torch.cat([next(batches)[0] for _ in range(64)]).mean().item() - 0.5) < 1e-9


def _of_rank(folder):
    import torch.distributed as dist

    batches = iter(_made(100, 16))
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps([next(batches) for _ in range(20)]))


def test_two_ranks_share_the_batches_of_one(tmp_path):
    assert in_ranks(2, tmp_path, _of_rank, tmp_path) == [0, 0]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert [a + b for a, b in zip(first, second, strict=True)] == [
        batch for batch, _ in zip(_made(100, 16), range(20), strict=False)
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sizes": {}}, "sizes must give the examples of each source"),
        ({"sizes": [10, 5]}, 'as {"web": 1000, "books": 200}, got [10, 5]'),
        ({"weights": [1, 2]}, "weights must name the sources ['a', 'b'], got [1, 2]"),
        ({"sizes": {"a": 0, "b": 1}}, "sizes['a'] must be an integer of at least 1, got 0"),
        ({"weights": {"a": 1}}, "weights must name the sources ['a', 'b'], got ['a']"),
        ({"weights": {"a": 1, "b": 0}}, "weights['b'] must be finite and > 0, got 0"),
        ({"weights": {"a": 1, "b": 1}, "temperature": 1.0}, "temperature must be None where weights are given"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"by": "tokens"}, 'tokens must give the total tokens of each source where by is "tokens", got None'),
        ({"by": "documents"}, 'by must be "examples" or "tokens", got \'documents\''),
        ({"tokens": {"a": 1}}, "tokens must name the sources ['a', 'b'], got ['a']"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(InputError) as caught:
        Blend(**({"sizes": {"a": 10, "b": 5}, "batch_size": 4} | given))
    assert message in str(caught.value)


def test_a_state_of_other_weights_is_refused():
    state = Blend({"a": 10, "b": 5}, 4).state_dict()
    with pytest.raises(InputError, match="state_dict must have weights"):
        Blend({"a": 10, "b": 5}, 4, weights={"a": 1, "b": 1}).load_state_dict(state)
    with pytest.raises(InputError, match="state_dict must have sources"):
        Blend({"b": 5, "a": 10}, 4).load_state_dict(state)


def test_integers_of_other_libraries_do_not_overflow():
    blend = Blend({"a": np.int32(2**31 - 1), "b": np.int32(5)}, 4)
    assert blend.n == 2**31 + 4 and sum(each.examples for each in blend.report(np.int32(5))) == 20
    assert len(blend.sources(np.int32(0), torch.tensor(3))) == 3
    for bad in ("x", 2.5):
        with pytest.raises(InputError, match=f"^batches must be an integer of at least 0, got {bad!r}$"):
            blend.report(bad)
