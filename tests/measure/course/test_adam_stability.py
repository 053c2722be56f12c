"""The monitor on gradients whose updates are known, on every form of Adam, over ranks, and what it leaves alone."""

import functools
import itertools
import json
import math

import diptest
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.data.fetch import fetch
from batchlab.measure.course.adam_reading import AlarmLimits, StabilityReading
from batchlab.measure.course.adam_stability import AdamStability
from batchlab.measure.course.adam_update import UpdateSums, adam_update, expected_variance, update_sums
from batchlab.workloads.digits import digits
from tests.spine.forked import in_ranks

N, STEPS = 4000, 3000


def run(gradient_at, *, steps=STEPS, n=N, betas=(0.9, 0.999), eps=1e-8, dtype=torch.float32, **options):
    """Adam on given gradients: the monitor's last reading of the one layer."""
    p = nn.Parameter(torch.zeros(n, dtype=dtype))
    optimizer = torch.optim.Adam([p], lr=0.0, betas=betas, eps=eps, foreach=False)
    readings = []
    with AdamStability(optimizer, on_reading=readings.append, **options) as stability:
        for step in range(steps):
            p.grad = gradient_at(step)
            optimizer.step()
    return readings, stability


def white(seed=0, scale=1.0, n=N):
    generator = torch.Generator().manual_seed(seed)
    return lambda step: scale * torch.randn(n, generator=generator)


def autoregressive(r, n=N):
    generator = torch.Generator().manual_seed(0)
    state = [torch.randn(n, generator=generator)]

    def gradient_at(step):
        state[0] = r * state[0] + math.sqrt(1 - r**2) * torch.randn(n, generator=generator)
        return state[0].clone()

    return gradient_at


def last(readings):
    return readings[-1].layers[0]


@pytest.mark.parametrize(
    ("betas", "variance", "low", "high"),
    [((0.9, 0.999), 0.0526, 2.9, 3.05), ((0.9, 0.95), 0.0512, 2.6, 2.8), ((0.95, 0.99), 0.0256, 2.7, 3.05)],
)
def test_independent_gradients_make_the_narrow_bell(betas, variance, low, high):
    """var u has a standard error of 2.2 % at a reading, 4000 coordinates: the mean of twenty readings, of 0.5 %."""
    readings, _ = run(white(), betas=betas, steps=STEPS if betas[1] == 0.999 else 1200)
    tail = [reading.layers[0] for reading in readings[-20:]]
    reference = (1 - betas[0]) / (1 + betas[0])
    assert np.mean([each.variance_ratio for each in tail]) * reference == pytest.approx(variance, rel=0.02)
    kurtoses = [(1 + 0.0) / each.sarle for each in tail]  # skewness is about 0
    assert low < np.mean(kurtoses) < high
    assert all(each.high_share < 0.003 and abs(each.lag1) < 0.02 and each.alarms == () for each in tail)
    assert np.mean([each.cosine for each in tail]) == pytest.approx(math.sqrt(1 - betas[0] ** 2), abs=0.02)


@pytest.mark.parametrize(
    ("r", "variance", "share", "kurtosis", "tolerance"),
    [
        (0.5, 0.139, None, None, 0.006),
        (0.9, 0.487, None, None, 0.02),
        (0.99, 0.90, None, None, 0.03),
        (0.999, 1.03, 0.51, 2.2, 0.08),
    ],
)
def test_correlated_gradients_widen_it_as_published(r, variance, share, kurtosis, tolerance):
    """The values of the specification, from a run of its own: 5 standard errors of one run's readings."""
    readings, _ = run(autoregressive(r))
    tail = [reading.layers[0] for reading in readings[-20:]]
    assert np.mean([each.variance_ratio for each in tail]) / 19 == pytest.approx(variance, abs=tolerance)
    assert tail[-1].lag1 == pytest.approx(r, abs=0.01)
    if share is not None:
        assert np.mean([each.high_share for each in tail]) == pytest.approx(share, abs=0.06)
        assert np.mean([1 / each.sarle for each in tail]) == pytest.approx(kurtosis, abs=0.1)


def test_gradients_of_the_order_of_epsilon_freeze_the_layer():
    expected = {1e-7: 0.043, 1e-8: 0.013, 1e-9: 0.0004}
    shares, roots = [], []
    for scale, variance in expected.items():
        readings, _ = run(white(scale=scale), steps=400, betas=(0.9, 0.99))
        layer = last(readings)
        assert layer.variance_ratio / 19 == pytest.approx(variance, rel=0.1)
        shares.append(layer.eps_share)
        roots.append(layer.root_over_eps)
        assert ("frozen" in layer.alarms) == (scale == 1e-9 or layer.eps_share > 0.5)
        mended, _ = run(white(scale=scale), steps=400, betas=(0.9, 0.99), eps=1e-15)
        assert last(mended).variance_ratio == pytest.approx(1, rel=0.08)
    assert shares[0] == 0.0 and shares[-1] == 1.0 and shares == sorted(shares)
    assert roots == pytest.approx([10, 1, 0.1], rel=0.05)


def test_a_constant_gradient_is_a_sign_update_and_alarms_at_the_second_reading():
    signs = torch.where(torch.arange(N) % 2 == 0, 1.0, -1.0)
    readings, stability = run(lambda step: signs * 0.3, steps=300, betas=(0.9, 0.95), every=10)
    layer = last(readings)
    assert stability.updates(layer.name).abs().sub(1).abs().max() < 1e-6
    assert layer.sarle == pytest.approx(1, abs=1e-6) and layer.variance_ratio == pytest.approx(19, rel=1e-5)
    assert layer.rms == pytest.approx(1, abs=1e-6) and layer.cosine == pytest.approx(1, abs=1e-6)
    warm = [reading.step for reading in readings if reading.step > 3 / 0.05]
    alarmed = [reading.step for reading in readings if reading.alarms]
    assert alarmed == warm[1:] and warm[0] == 70
    assert readings[-1].alarms == (("group0.0", "bimodal"),)


def test_one_sign_for_all_has_no_spread_but_still_alarms():
    readings, _ = run(lambda step: torch.ones(N), steps=100, betas=(0.9, 0.95), every=5)
    layer = last(readings)
    assert math.isnan(layer.sarle) and layer.variance_ratio < 1e-6 and layer.high_share == 1.0
    assert layer.alarms == ("bimodal",)


BATCHES = (1, 16, 64, 256, 400, 1024, 4096)


@functools.cache
def _at_batch(batch, equal):
    """The last reading at a batch size, its updates, and the mean var u of the last twenty readings."""
    signs = torch.where(torch.arange(N) % 2 == 0, 0.05, -0.05)
    mean = signs if equal else 0.05 * torch.randn(N, generator=torch.Generator().manual_seed(1))
    noise = white()
    steps = STEPS + 100
    readings, stability = run(lambda step: mean + noise(step) / math.sqrt(batch), lag_memory=1.0, steps=steps)
    spread = np.mean([reading.layers[0].variance_ratio / 19 for reading in readings[-20:]])
    return last(readings), stability.updates("group0.0"), spread


def test_the_batch_size_predicts_correlation_and_variance():
    """|G_i| = 0.05 and noise 1 make B_simple = 400. 62 pairs of 4000 coordinates: a standard error of 0.002."""
    for batch in BATCHES:
        layer, _, spread = _at_batch(batch, True)
        assert layer.lag1 == pytest.approx(batch / (batch + 400), abs=0.01)
        assert spread == pytest.approx(expected_variance(batch, 400), abs=0.01)


@pytest.mark.parametrize("equal", [True, False])
def test_the_three_detectors_fire_in_their_order_as_the_batch_grows(equal):
    """The dip rejects first, where var u is still small; the alarm's thresholds come with r near a half and beyond."""
    layers = [_at_batch(batch, equal)[0] for batch in BATCHES]
    for column in ("sarle", "high_share", "variance_ratio", "rms", "lag1"):
        values = [getattr(layer, column) for layer in layers]
        assert all(b > a - 0.01 for a, b in itertools.pairwise(values)), (column, values)
    first = lambda fires: next(i for i, layer in enumerate(layers) if fires(layer))  # noqa: E731
    dips = next(i for i, b in enumerate(BATCHES) if diptest.diptest(_at_batch(b, equal)[1].double().numpy())[1] < 1e-3)
    assert dips <= first(lambda layer: layer.high_share > 0.3) <= first(lambda layer: layer.variance_ratio > 10)
    assert dips == BATCHES.index(64 if equal else 400)
    assert first(lambda layer: layer.sarle > 0.8) >= BATCHES.index(400 if equal else 4096)
    assert layers[0].alarms == () and layers[-1].alarms == ("bimodal",)


def test_the_dip_is_that_of_the_updates():
    readings, stability = run(autoregressive(0.97), steps=200, dip=True)
    m, v = (next(iter(stability._state.optimizer.state.values()))[key].double() for key in ("exp_avg", "exp_avg_sq"))
    u = (m / (1 - 0.9**200)) / ((v / (1 - 0.999**200)).sqrt() + 1e-8)
    dip, p = diptest.diptest(u.float().double().numpy())
    assert last(readings).dip == pytest.approx(dip, abs=1e-6) and last(readings).dip_p == pytest.approx(p, abs=1e-3)
    exact = diptest.diptest(stability.updates("group0.0").double().numpy())
    assert (last(readings).dip, last(readings).dip_p) == pytest.approx(exact, abs=1e-12)


def test_disaligned_updates_of_an_unusual_size_alarm():
    """A long calm, then strong gradients one way, then small ones the other way while m still points the first."""
    noise = white(n=500)

    def gradient_at(step):
        if step < 200:
            return noise(step)
        return torch.full((500,), 5.0 if step < 207 else -0.01)

    readings, _ = run(gradient_at, steps=210, n=500, betas=(0.9, 0.95), every=10)
    assert [reading.step for reading in readings if ("group0.0", "disaligned") in reading.alarms] == [210]
    assert last(readings).cosine < 0 and last(readings).rms > 2 * readings[10].layers[0].rms


def test_nothing_alarms_while_v_still_forms():
    readings, _ = run(lambda step: torch.ones(100), steps=3300, every=100, n=100)
    assert [reading.step for reading in readings if reading.alarms] == [3200, 3300]


@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=40),
    cut=st.integers(0, 40),
    eps=st.sampled_from([0.0, 1e-8, 0.5]),
)
def test_moments_are_those_of_the_coordinates_and_add_over_parts(values, cut, eps):
    u = torch.tensor(values, dtype=torch.float64)
    root, g, p = u.abs() + 0.25, u.flip(0) + 1, u.square() - 1
    active = torch.ones_like(u, dtype=torch.bool)
    cut = min(cut, len(u))
    parts = update_sums(u, root, g, p, active, eps, [cut, len(u) - cut]).tolist()
    sums = UpdateSums(*parts[0]).plus(parts[1])
    (alone,) = update_sums(u, root, g, p, active, eps, [len(u)]).tolist()
    assert list(sums) == pytest.approx(alone, rel=1e-9, abs=1e-9)
    x = np.array(values)
    assert sums.n == len(x) and sums.rms == pytest.approx(math.sqrt((x**2).mean()), abs=1e-9)
    assert sums.variance == pytest.approx(x.var(), rel=1e-7, abs=1e-9)
    assert sums.high == (np.abs(x) > 0.8).sum() and sums.below == (np.abs(x) + 0.25 < eps).sum()
    if x.var() > 1e-2 * (x**2).mean() > 0:
        central = x - x.mean()
        b = ((central**3).mean() ** 2 / x.var() ** 3 + 1) / ((central**4).mean() / x.var() ** 2)
        assert sums.sarle == pytest.approx(b, rel=1e-6) and 0 < b <= 1 + 1e-9
        assert sums.cosine == pytest.approx(F.cosine_similarity(u, g, dim=0).item(), rel=1e-7, abs=1e-9)


def test_two_points_make_sarles_coefficient_one():
    u = torch.tensor([0.3] * 7 + [-0.9] * 5, dtype=torch.float64)
    sums = UpdateSums(*update_sums(u, u.abs(), u, u, u != 0, 1e-8, [12]).tolist()[0])
    assert sums.sarle == pytest.approx(1, rel=1e-9) and sums.lag1 == pytest.approx(1, rel=1e-12)


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2)])
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return F.linear(x, self.embedding.weight)


def _train(make, steps=12, model=None, **options):
    torch.manual_seed(1)
    model = model or _Net()
    optimizer = make(model.parameters())
    readings = []
    stability = AdamStability(optimizer, model=model, on_reading=readings.append, **options) if options else None
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(10, (6, 5), generator=generator)
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, readings, stability


FORMS = [
    lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=False),
    lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=True),
    lambda ps: torch.optim.Adam(ps, lr=torch.tensor(0.01), betas=(0.9, 0.95), capturable=False),
    lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True, weight_decay=0.1),
    lambda ps: torch.optim.AdamW(ps, lr=0.01, amsgrad=True),
    lambda ps: torch.optim.NAdam(ps, lr=0.01),
    lambda ps: torch.optim.RAdam(ps, lr=0.01),
    lambda ps: torch.optim.Adam(ps, lr=0.01, maximize=True),
    lambda ps: torch.optim.Adam([{"params": list(ps)[:2], "eps": 1e-6}, {"params": []}], lr=0.01, betas=(0.0, 0.9)),
]


@pytest.mark.parametrize("make", FORMS)
def test_every_form_of_adam_is_read_and_left_as_it_is(make):
    plain, _, _ = _train(make)
    watched, readings, stability = _train(make, every=3, coordinates=50)
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [reading.step for reading in readings] == [3, 6, 9, 12]
    optimizer = stability._state.optimizer
    for layer in readings[-1].layers:
        assert 0 < layer.rms <= layer.bound * (1 + 1e-6) and layer.t == 12 and layer.coordinates <= 50
        assert math.isfinite(layer.lag1) and layer.cosine > 0
    hooks = len(optimizer._optimizer_step_post_hooks)
    stability.close()
    assert len(optimizer._optimizer_step_post_hooks) == hooks - 1


def test_update_is_what_the_optimizer_adds():
    model = _Net().double()
    _, _, stability = _train(lambda ps: torch.optim.Adam(ps, lr=0.01), model=model, every=1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = stability._state.optimizer
    tokens = torch.randint(10, (6, 5), generator=torch.Generator().manual_seed(9))
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        if p.requires_grad and name != "embedding.weight":
            torch.testing.assert_close(stability.updates(name), ((old - p) / 0.01).flatten(), rtol=1e-9, atol=1e-9)


def test_rows_that_are_idle_now_do_not_narrow_the_rest():
    """All rows have gradients at first, later a few alone: theirs is the variance of a layer of those rows."""
    readings = []
    for rows in (200, 20):
        weight, noise = nn.Parameter(torch.zeros(rows, 50)), white(n=1000)
        optimizer = torch.optim.Adam([weight], lr=0.0)
        with AdamStability(optimizer, every=300) as stability:
            for step in range(300):
                weight.grad = torch.zeros(rows, 50)
                weight.grad[:20] = noise(step).view(20, 50)
                weight.grad[20:] = 1.0 if step < 3 else 0.0
                optimizer.step()
        readings.append(last([stability.reading]))
        assert len(stability.updates("group0.0")) == 1000
    for column in ("coordinates", "variance_ratio", "sarle", "high_share", "rms", "eps_share", "root_over_eps"):
        assert getattr(readings[0], column) == pytest.approx(getattr(readings[1], column), rel=1e-6)
    assert readings[0].coordinates == 1000 and readings[0].variance_ratio > 0.8


def test_squares_that_underflow_freeze_the_layer_and_stay_finite():
    """Below 1e-23 v = g² is 0 in float32: u = m/ε, whatever ε is."""
    for eps in (1e-8, 1e-30):
        readings, _ = run(white(scale=1e-25), steps=200, betas=(0.9, 0.95), eps=eps)
        layer = last(readings)
        assert layer.coordinates == N and layer.eps_share == 1.0 and "frozen" in layer.alarms
        assert all(math.isfinite(value) for value in (layer.variance_ratio, layer.rms, layer.cosine, layer.lag1))


def test_rows_that_never_had_a_gradient_are_left_out():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(20, 8))

    model = Rows()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    stability = AdamStability(optimizer, model=model, every=1)
    for _ in range(3):
        optimizer.zero_grad()
        model.weight[:5].square().sum().backward()
        optimizer.step()
    assert stability.reading.layer("weight").coordinates == 40
    assert len(stability.updates("weight")) == 40


def test_layers_gather_their_parameters():
    make = lambda ps: torch.optim.Adam(ps, lr=0.01)  # noqa: E731
    _, by_parameter, _ = _train(make, every=6)
    _, by_layer, _ = _train(make, every=6, by="layer")
    assert [layer.name for layer in by_layer[-1].layers] == [
        "embedding",
        *(f"blocks.{i}.{j}" for i in range(2) for j in (0, 2)),
    ]
    weight, bias = (by_parameter[-1].layer(f"blocks.0.0.{each}") for each in ("weight", "bias"))
    whole = by_layer[-1].layer("blocks.0.0")
    assert whole.coordinates == 128 + 16 == weight.coordinates + bias.coordinates
    assert whole.rms**2 * 144 == pytest.approx(weight.rms**2 * 128 + bias.rms**2 * 16, rel=1e-6)


def test_an_optimizer_that_knows_its_names_needs_no_model():
    model = _Net()
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.01)
    stability = AdamStability(optimizer, every=1, by="layer")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [layer.name for layer in stability.reading.layers][:2] == ["embedding", "blocks.0.0"]


def test_a_subset_stands_for_the_whole_and_follows_from_the_seed():
    whole, _ = run(autoregressive(0.9, n=40_000), n=40_000, steps=300)
    parts = [run(autoregressive(0.9, n=40_000), n=40_000, steps=300, coordinates=4000, seed=s)[0] for s in (0, 0, 1)]
    assert last(parts[0]) == last(parts[1]) != last(parts[2])
    assert last(parts[0]).coordinates == 4000
    assert last(parts[0]).variance_ratio == pytest.approx(last(whole).variance_ratio, rel=0.12)  # 4 × 2.2 % and tails


def test_state_goes_round_and_a_resumed_run_reads_the_same():
    make = lambda ps: torch.optim.Adam(ps, lr=0.01, betas=(0.9, 0.7))  # noqa: E731

    def go(cuts):
        torch.manual_seed(1)
        model, readings = _Net(), []
        optimizer = make(model.parameters())
        stability = AdamStability(optimizer, model=model, every=5, coordinates=40, on_reading=readings.append)
        generator = torch.Generator().manual_seed(0)
        for step in range(30):
            if step in cuts:
                state = stability.state_dict()
                plain = json.loads(json.dumps({key: value for key, value in state.items() if key != "before"}))
                stability.close()
                stability = AdamStability(optimizer, model=model, every=5, coordinates=40, on_reading=readings.append)
                stability.load_state_dict(plain | {"before": state["before"]})
            tokens = torch.randint(20, (6, 5), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
        return readings

    assert [each.to_json() for each in go({4, 9, 16})] == [each.to_json() for each in go(set())]


def test_a_state_of_other_coordinates_is_refused():
    _, _, stability = _train(FORMS[0], every=3, coordinates=50)
    _, _, other = _train(FORMS[0], every=3, coordinates=40)
    with pytest.raises(InputError, match="this state was read with .*'coordinates': 50.*, got .*'coordinates': 40"):
        other.load_state_dict(stability.state_dict())


def test_json_both_ways():
    _, readings, _ = _train(FORMS[0], every=3)
    assert StabilityReading.from_json(readings[-1].to_json()) == readings[-1]


def test_a_gradient_that_is_not_finite_is_no_correlation():
    gradients = iter([*[torch.randn(200) for _ in range(9)], torch.full((200,), math.inf), torch.randn(200)])
    p = nn.Parameter(torch.zeros(200))
    optimizer = torch.optim.Adam([p], lr=0.0)
    stability = AdamStability(optimizer, every=1)
    seen = []
    for gradient in gradients:
        p.grad = gradient
        optimizer.step()
        seen.append(stability.reading.layers[0])
    assert math.isfinite(seen[8].lag1) and seen[9].lag1 == seen[8].lag1
    assert math.isnan(seen[10].rms) and seen[10].alarms == ()


def test_training_digits_is_the_same_in_every_bit():
    def weights(monitored):
        job = digits()
        torch.manual_seed(0)
        model = job.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        stability = AdamStability(optimizer, every=5) if monitored else None
        for step in range(20):
            batch = fetch(job.train, list(range(step * 32, step * 32 + 32)), job.collate)
            job.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        assert stability is None or stability.reading.step == 20
        return [p.detach().clone() for p in model.parameters()], torch.get_rng_state()

    (with_it, generator), (without, other) = weights(True), weights(False)
    assert all(map(torch.equal, with_it, without)) and torch.equal(generator, other)


def test_half_precision_states_are_read_in_float32():
    p = nn.Parameter(torch.zeros(3000, dtype=torch.bfloat16))
    optimizer = torch.optim.Adam([p], lr=0.0, foreach=False)
    stability, noise = AdamStability(optimizer, every=100), white(n=3000)
    for step in range(200):
        p.grad = noise(step).bfloat16()
        optimizer.step()
    layer = stability.reading.layers[0]
    assert stability.updates(layer.name).dtype == torch.float32 and 0.5 < layer.variance_ratio < 1.6


def test_shapes_that_break_things():
    shapes = [(0,), (1,), (), (3, 0), (2, 3, 4)]
    ps = [nn.Parameter(torch.randn(shape)) for shape in shapes] + [nn.Parameter(torch.randn(6, 5).t())]
    optimizer = torch.optim.Adam(ps, lr=0.01, foreach=False)
    stability = AdamStability(optimizer, every=1, coordinates=4)
    for step in range(3):
        for p in ps[: len(ps) - (step == 0)]:
            p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.zero_grad()
    layers = {layer.name: layer for layer in stability.reading.layers}
    assert layers["group0.0"].coordinates == 0 and math.isnan(layers["group0.0"].rms)
    assert layers["group0.1"].coordinates == 1 and math.isnan(layers["group0.1"].sarle)
    assert layers["group0.5"].t == 2 and layers["group0.5"].coordinates == 4
    assert not any(layer.alarms for layer in layers.values())


def _halves(folder):
    """Plain tensors that each hold half of a layer, as flat shards do."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(300 if rank else 700))
    optimizer = torch.optim.Adam([p], lr=0.0)
    stability = AdamStability(optimizer, every=5, process_group=dist.group.WORLD)
    for _ in range(20):
        p.grad = torch.randn(1000, generator=generator).split([700, 300])[rank].clone()
        optimizer.step()
    (folder / f"{rank}.json").write_text(stability.reading.to_json())


def _close(ours, theirs):
    for name, value in theirs.__dict__.items():
        if isinstance(value, float):
            assert getattr(ours, name) == pytest.approx(value, rel=1e-6, nan_ok=True), name
        else:
            assert getattr(ours, name) == value, name


def test_moments_over_ranks_are_those_of_one_process(tmp_path):
    assert in_ranks(2, tmp_path, _halves, tmp_path) == [0, 0]
    expected = last(run(white(n=1000), n=1000, steps=20, every=5)[0])
    for rank in range(2):
        reading = StabilityReading.from_json((tmp_path / f"{rank}.json").read_text())
        _close(reading.layers[0], expected)


def _fully_sharded(folder):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    model = _Net().double()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    stability = AdamStability(optimizer, model=model, every=4)
    _steps(model, optimizer, dist.get_rank())
    (folder / f"{dist.get_rank()}.json").write_text(stability.reading.to_json())


def _steps(model, optimizer, rank=None):
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        tokens = torch.randint(20, (6, 5), generator=generator)
        tokens = tokens if rank is None else tokens.split(3)[rank]
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_fully_sharded_layers_are_read_as_one_process_reads_them(tmp_path):
    assert in_ranks(2, tmp_path, _fully_sharded, tmp_path) == [0, 0]
    torch.manual_seed(1)
    model = _Net().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    stability = AdamStability(optimizer, model=model, every=4)
    _steps(model, optimizer)
    for rank in range(2):
        reading = StabilityReading.from_json((tmp_path / f"{rank}.json").read_text())
        assert [layer.name for layer in reading.layers] == [layer.name for layer in stability.reading.layers]
        for ours, theirs in zip(reading.layers, stability.reading.layers, strict=True):
            _close(ours, theirs)


def test_an_optimizer_that_is_no_adam_is_named():
    ps = [nn.Parameter(torch.ones(3))]
    for make in (lambda: torch.optim.SGD(ps, lr=0.1), lambda: torch.optim.RMSprop(ps), lambda: torch.optim.Adagrad(ps)):
        with pytest.raises(TypeError, match=r'keeps no "exp_avg_sq" in its state: its updates are not Adam\'s'):
            AdamStability(make())
    optimizer = torch.optim.Adamax(ps)
    AdamStability(optimizer, every=1)
    ps[0].grad = torch.ones(3)
    with pytest.raises(TypeError, match='Adamax keeps no "exp_avg_sq" in its state'):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "tensor"}, 'by must be "parameter" or "layer", got \'tensor\''),
        ({"by": "layer"}, 'by="layer" needs the parameters. names: give model'),
        ({"every": 0}, "every must be an integer of at least 1, got 0"),
        ({"coordinates": 1.5}, "coordinates must be an integer of at least 1, got 1.5"),
        ({"lag_memory": 1.1}, r"lag_memory must lie in \[0, 1\], got 1.1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        AdamStability(torch.optim.Adam([nn.Parameter(torch.ones(3))]), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sarle": 0.0}, "sarle must be > 0, got 0.0"),
        ({"consecutive": 0}, "consecutive must be an integer of at least 1, got 0"),
        ({"cosine": 2.0}, r"cosine must lie in \[-1, 1\], got 2.0"),
    ],
)
def test_bad_limits_are_named(options, message):
    with pytest.raises(InputError, match=message):
        AlarmLimits(**options)


def test_names_and_complex_parameters():
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    with pytest.raises(InputError, match="view them as real ones"):
        AdamStability(optimizer)
    _, readings, stability = _train(FORMS[0], every=3)
    for call in (stability.updates, readings[-1].layer):
        with pytest.raises(InputError, match="name must be one of .*, got 'nothing'"):
            call("nothing")


def test_a_zero_epsilon_is_no_update_where_there_is_no_gradient():
    u, root = adam_update(torch.zeros(2), torch.zeros(2), (0.9, 0.99), 0.0, 1)
    assert u.tolist() == [0.0, 0.0] and root.tolist() == [0.0, 0.0]
