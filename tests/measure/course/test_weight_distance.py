"""The distance against the plain norm, its records and state, shards over ranks, and the paper's early phase."""

import copy
import itertools
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.course.diffusion import mean_slope
from batchlab.measure.course.weight_distance import WeightDistance
from tests.spine.forked import in_ranks


def network(dtype=torch.float64, tied=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).to(dtype)
    if tied:
        model[2].weight = model[0].weight
    return model


def moved(model, optimizer):
    x = torch.randn(16, 6, dtype=model[0].weight.dtype)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def test_it_is_the_norm_of_what_changed():
    model = network(tied=True)
    model[4].bias.requires_grad_(False)
    start = copy.deepcopy(model)
    distance = WeightDistance(model, per_layer=True, per_decade=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        moved(model, optimizer)
        with torch.no_grad():
            model[4].bias.add_(1.0)
        got = distance.step()
    pairs = zip(model.named_parameters(), start.parameters(), strict=True)
    parts = {name: (p - q).norm().item() for (name, p), q in pairs if name != "4.bias"}
    assert got == pytest.approx(math.hypot(*parts.values()), rel=1e-12)
    assert [t for t, _ in distance.points()] == [1, 2, 3] and distance.points()[-1] == (3, got)
    for name, value in parts.items():
        assert distance.points(name)[-1] == (3, pytest.approx(value, rel=1e-12))


def test_updates_are_recorded_evenly_in_their_logarithm():
    model = nn.Linear(1, 1)
    distance = WeightDistance(model, per_decade=10)
    returned = [distance.step() for _ in range(10_000)]
    times = [t for t, _ in distance.points()]
    assert times[:6] == [1, 2, 3, 4, 6, 7] and len(times) == sum(each is not None for each in returned)
    for decade in (100, 1000):
        assert sum(decade <= t < 10 * decade for t in times) == 10
    gaps = [math.log10(b / a) for a, b in itertools.pairwise(times) if a >= 100]
    assert max(gaps) < 0.11 and min(gaps) > 0.09


def test_small_steps_in_low_precision_are_not_lost():
    """bf16 weights near 1 that change by one unit in the last place: the difference is exact in float32."""
    model = nn.Linear(300, 300, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    distance = WeightDistance(model)
    with torch.no_grad():
        model.weight.add_(2**-7)
    assert distance.step() == pytest.approx(300 * 2**-7, rel=1e-6)


def test_a_copy_elsewhere_and_other_layouts_change_nothing():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    near, far = WeightDistance(model), WeightDistance(model, device="cpu")
    model.weight.data = model.weight.data.contiguous() + 0.5
    model.bias.data.zero_()
    assert near.step() == far.step() == pytest.approx(math.sqrt(108 * 0.25 + near._start[1].norm().item() ** 2))


def test_measuring_changes_no_bit():
    def trained(followed):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        distance = WeightDistance(model) if followed else None
        torch.manual_seed(1)
        for _ in range(5):
            moved(model, optimizer)
            if distance is not None:
                distance.step()
        return [*model.parameters(), *model.buffers()], torch.get_rng_state()

    (plain, before), (followed, after) = trained(False), trained(True)
    assert all(map(torch.equal, plain, followed)) and torch.equal(before, after)


def test_a_run_that_went_on_from_its_state_is_the_run():
    courses = []
    for stopped in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        distance = WeightDistance(model, per_layer=True)
        torch.manual_seed(1)
        for step in range(12):
            if stopped and step == 7:
                state = copy.deepcopy(distance.state_dict())
                distance = WeightDistance(model, per_layer=True)
                distance.load_state_dict(state)
            moved(model, optimizer)
            distance.step()
        courses.append((distance.points(), distance.points("0.weight"), distance.updates))
    assert courses[0] == courses[1]
    with pytest.raises(InputError, match=r"the state is of another model .*: '0.bias' differs"):
        WeightDistance(nn.Linear(2, 2)).load_state_dict(distance.state_dict())
    with pytest.raises(InputError, match="the state is of per_layer=True, this is of per_layer=False"):
        WeightDistance(model).load_state_dict(distance.state_dict())


def test_a_weight_that_is_not_finite_is_not_a_distance():
    model = nn.Linear(2, 2)
    distance = WeightDistance(model)
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    assert math.isnan(distance.step())
    with pytest.raises(InputError, match="a finite distance"):
        distance.fit()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightDistance(nn.Tanh()), "the model has no parameter that requires a gradient"),
        (lambda: WeightDistance(nn.Linear(1, 1), per_decade=0), "per_decade must be an integer of at least 1, or None"),
        (lambda: WeightDistance(nn.Linear(1, 1)).points("weight"), "layer must be None: per_layer was not asked for"),
        (
            lambda: WeightDistance(nn.Linear(1, 1), per_layer=True).points("w"),
            r"layer must be one of \['weight', 'bias'\], got 'w'",
        ),
        (
            lambda: WeightDistance(nn.ParameterList([nn.Parameter(torch.zeros(1, dtype=torch.complex64))])),
            "complex parameters is not defined here",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def _course(model, followed):
    distance = WeightDistance(followed, per_layer=True, per_decade=None)
    optimizer = torch.optim.SGD(followed.parameters(), lr=0.05)
    torch.manual_seed(1)
    for _ in range(4):
        moved(model, optimizer)
        distance.step()
    return distance


def _sharded(expected):
    from torch.distributed.fsdp import fully_shard

    model = _plain()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    distance = _course(model, model)
    for (t, got), (_, wanted) in zip(distance.points(), expected["whole"], strict=True):
        assert got == pytest.approx(wanted, rel=1e-12), t
    for (_, got), (_, wanted) in zip(distance.points("0.weight"), expected["layer"], strict=True):
        assert got == pytest.approx(wanted, rel=1e-12)
    state = distance.state_dict()
    again = WeightDistance(model, per_layer=True)
    again.load_state_dict(state)
    assert again.step() is not None and again.updates == 5


def _plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)).double()


@pytest.mark.parametrize("world", [2, 3])
def test_shards_give_the_whole_distance(world, tmp_path):
    """Odd sizes, so that ranks hold unequal shards and some nothing."""
    model = _plain()
    alone = _course(model, model)
    expected = {"whole": alone.points(), "layer": alone.points("0.weight")}
    assert in_ranks(world, tmp_path, _sharded, expected) == [0] * world


def digits_course(seed, batch_size, rate, *, images=1437, fitted=(3, 100)):
    """A small conv net with batch norm over ghosts of 32, SGD with momentum 0.9, gradients clipped at 5."""
    data = load_digits()
    x, y = torch.tensor(data.data[:images] / 16.0, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(data.target)
    torch.manual_seed(seed)
    blocks = [
        part
        for i, o in ((1, 8), (8, 16))
        for part in (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
    ]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    distance, order = WeightDistance(model, per_decade=None), torch.tensor([], dtype=torch.long)
    for _ in range(fitted[1]):
        if len(order) < batch_size:
            order = torch.randperm(images)
        batch, order = order[:batch_size], order[batch_size:]
        optimizer.zero_grad()
        for ghost in batch.split(32):
            (nn.functional.cross_entropy(model(x[ghost]), y[ghost]) * (len(ghost) / batch_size)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        distance.step()
    return distance.fit(low=fitted[0], high=fitted[1])


@pytest.mark.slow
def test_the_early_distance_on_digits_grows_about_as_a_logarithm():
    """Updates 3 to 100, three seeds. Measured: R² 0.93 to 0.97, slopes 0.92 (batch 32, rate 0.005), 1.21 (128, 0.01).

    A power law with exponent 0.6 to 0.8 explains as much here. At one and the same rate the two batch sizes share one
    slope, 0.92, and √B scaling raises it: so early the weights drift more than they diffuse.
    """
    runs = {
        (size, rate): [digits_course(seed, size, rate) for seed in range(3)]
        for size, rate in ((32, 0.005), (128, 0.01), (128, 0.005))
    }
    assert min(fit.r2 for fits in runs.values() for fit in fits) > 0.9
    slopes = {key: mean_slope(fits).value for key, fits in runs.items()}
    assert slopes[32, 0.005] == pytest.approx(0.92, rel=0.3) and slopes[128, 0.01] == pytest.approx(1.21, rel=0.3)
    assert slopes[128, 0.005] == pytest.approx(slopes[32, 0.005], rel=0.15) and slopes[128, 0.01] > slopes[128, 0.005]


@pytest.mark.slow
def test_the_logarithm_ends_when_the_loss_has_vanished():
    """Updates 10 to 576 on 500 images at four times the rate, three seeds. Early, R² is above 0.92 and the slopes rise.

    Measured: R² 0.87 to 0.89 and slopes 0.74 to 0.81 (batch 32), 0.77 to 0.80 and 0.62 to 0.64 (128); the sheet's run
    gave 0.6 to 0.8, 0.48 and 0.33.
    """
    slopes = []
    for size, rate in ((32, 0.02), (128, 0.04)):
        late = [digits_course(seed, size, rate, images=500, fitted=(10, 576)) for seed in range(3)]
        assert max(fit.r2 for fit in late) < 0.92
        slopes.append(mean_slope(late).value)
    assert slopes[1] < slopes[0] < 0.9  # early: 0.92 and 1.21, and the larger batch the faster
