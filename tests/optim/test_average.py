"""Averages of the weights against their closed forms, however the examples are cut into updates."""

import itertools
import math
import pickle  # noqa: TID251 - as users' trainers do to spawn ranks

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.average import WeightAverage

KINDS = st.one_of(
    st.builds(lambda h: {"half_life": h}, st.floats(1.0, 1e4)), st.builds(lambda p: {"power": p}, st.floats(0.0, 10.0))
)
UPDATES = st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(1, 500)), min_size=1, max_size=12)


def scalar():
    return nn.Linear(1, 1, bias=False).double()


def averaged(updates, **kind):
    """The average after updates of (weight, examples)."""
    model = scalar()
    average = WeightAverage(model, **kind)
    for value, examples in updates:
        nn.init.constant_(model.weight, value)
        average.update(model, examples)
    return average.module.weight.item()


@given(updates=UPDATES, kind=KINDS)
def test_it_is_the_weighted_mean_of_its_definition(updates, kind):
    """Over positions x: by 2^(-(X - x)/h), or by (x/X)^(p + 1); each weight stands for what x grew by at its update."""
    ends = [sum(examples for _, examples in updates[: t + 1]) for t in range(len(updates))]
    if "half_life" in kind:
        growth = [2.0 ** ((x - ends[-1]) / kind["half_life"]) for x in [0, *ends]]
    else:
        growth = [(x / ends[-1]) ** (kind["power"] + 1) for x in [0, *ends]]
    shares = [after - before for before, after in itertools.pairwise(growth)]
    mean = sum(share * value for share, (value, _) in zip(shares, updates, strict=True)) / sum(shares)
    assert averaged(updates, **kind) == pytest.approx(mean, rel=1e-8, abs=1e-8)


@given(updates=UPDATES, kind=KINDS, data=st.data())
def test_splitting_an_update_changes_nothing(updates, kind, data):
    cut = []
    for value, examples in updates:
        first = data.draw(st.integers(0, examples - 1))
        cut += [(value, first), (value, examples - first)] if first else [(value, examples)]
    assert averaged(cut, **kind) == pytest.approx(averaged(updates, **kind), rel=1e-8, abs=1e-8)


@given(power=st.floats(0.0, 10.0), unit=st.integers(2, 50), updates=UPDATES)
def test_a_polynomial_average_knows_no_unit(power, unit, updates):
    longer = [(value, unit * examples) for value, examples in updates]
    assert averaged(longer, power=power) == pytest.approx(averaged(updates, power=power), rel=1e-8, abs=1e-8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()


def train(model, average, steps, start=0):
    """Updates of 5, 6, 7 ... examples, each a function of its number."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(start, start + steps):
        x = torch.randn(step + 5, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x[:, :1]).square().mean().backward()
        optimizer.step()
        average.update(model, step + 5)


@pytest.mark.parametrize("kind", [{"half_life": 20.0}, {"power": 2.0}])
def test_state_goes_round_and_averaging_goes_on_the_same(kind):
    whole, first = network(), network()
    one, two = WeightAverage(whole, **kind), WeightAverage(first, **kind)
    train(whole, one, 12)
    train(first, two, 5)
    second = network()
    second.load_state_dict(first.state_dict())
    resumed = WeightAverage(network(), **kind)
    assert resumed.empty
    resumed.load_state_dict({key: _copied(value) for key, value in two.state_dict().items()})
    assert not resumed.empty
    train(second, resumed, 7, start=5)
    for name, value in one.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], value), name
    assert not torch.equal(one.module[0].weight, whole[0].weight)


def _copied(value):
    return {name: tensor.clone() for name, tensor in value.items()} if isinstance(value, dict) else value


def test_statistics_and_counts_are_the_models_own_and_the_model_stays_as_it_is():
    model = network()
    average = WeightAverage(model, half_life=10.0)
    train(model, average, 6)
    for name, buffer in model.named_buffers():
        assert torch.equal(average.module.get_buffer(name), buffer), name
    assert model[1].num_batches_tracked == 6
    before = [p.clone() for p in model.parameters()]
    average.update(model, 5)
    assert all(map(torch.equal, before, model.parameters()))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in average.module.parameters()}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({}, "give one of half_life and power, got half_life=None, power=None"),
        ({"half_life": 8.0, "power": 1.0}, "give one of half_life and power, got half_life=8.0, power=1.0"),
        ({"half_life": 0.0}, "half_life must be finite and > 0 examples, got 0.0"),
        ({"half_life": math.nan}, "half_life must be finite and > 0 examples, got nan"),
        ({"power": -0.5}, "power must be finite and >= 0, got -0.5"),
        ({"power": math.inf}, "power must be finite and >= 0, got inf"),
    ],
)
def test_bad_input_is_named(kind, message):
    with pytest.raises(InputError, match=message):
        WeightAverage(scalar(), **kind)


def test_it_goes_through_pickle_after_an_update():
    model = network()
    average = WeightAverage(model, half_life=10.0)
    train(model, average, 2)
    again = pickle.loads(pickle.dumps(average))
    for each in (average, again):
        each.update(model, 5)
    assert all(map(torch.equal, again.module.parameters(), average.module.parameters()))


@pytest.mark.parametrize("examples", [0, -8, math.nan, math.inf, None])
def test_an_update_has_examples(examples):
    model = nn.Linear(1, 1)
    with pytest.raises(InputError, match=f"examples must be at least 1, got {examples}"):
        WeightAverage(model, power=1.0).update(model, examples)


def test_a_half_life_beyond_all_examples_weighs_all_alike():
    assert averaged([(1.0, 8), (2.0, 8), (6.0, 8)], half_life=1e18) == pytest.approx(3.0, rel=1e-12)
    with pytest.raises(InputError, match="half_life must be finite and > 0 examples, got inf"):
        WeightAverage(nn.Linear(1, 1), half_life=float("inf"))
