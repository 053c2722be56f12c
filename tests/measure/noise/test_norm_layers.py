"""The noise scale from normalisation layers: their share of the trace, their own hooks, and what is not sound."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.measure.noise.example_pieces import ExamplePieces
from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.measure.noise.norm_layers import AGAIN, FIRST, NormLayers
from batchlab.measure.noise.norm_pieces import NormPieces
from tests.measure.noise.single_examples import gradient_rows, make_batch, make_model, naive_pair, run_passes


def test_norm_layers_give_all_layers_while_they_calibrate_and_their_share_of_the_trace_afterwards():
    model = make_model()
    norms = [model[i].bias for i in (1, 4)]
    noise, ratios = GradientNoise(model, method="norm_layers"), []
    for step in range(36):
        model.zero_grad()
        x, y = make_batch(step)
        whole, big = naive_pair(model, x, y, list(model.parameters()))
        own, _ = naive_pair(model, x, y, norms)
        run_passes(noise, model, x, y, [5, 7])
        noise.step()
        if step < 16 or step in (17, 19, 21, 23, 26, 29, 32):  # the first sixteen, then an eighth more steps each time
            ratios.append(whole.trace / own.trace)
            expected = whole
        else:
            weights = [0.7**k for k in reversed(range(len(ratios)))]
            alpha = sum(w * r for w, r in zip(weights, ratios, strict=True)) / sum(weights)
            expected = (big - alpha * own.trace / 12, alpha * own.trace)
        assert noise.pair == pytest.approx(expected, rel=1e-9)
    assert noise.skipped == 0
    assert "times that of its norms" in noise.estimate().method


def test_the_layers_are_measured_again_at_one_step_in_fifty_in_the_end():
    layers, due = NormLayers(make_model(), coverage=0.95), []
    for step in range(700):
        calibrates = layers.calibrates
        layers.turn += 1
        if calibrates:
            due.append(step)
            layers.calibrate(2.0, 1.0)
    assert [b - a for a, b in itertools.pairwise(due)][-5:] == [AGAIN] * 5 and len(due) < 60


def test_the_share_follows_where_it_moves_and_the_traces_fall():
    """The traces fall by half at each calibration, their ratio from 10 to 20: what is old must not outweigh the new."""
    layers = NormLayers(make_model(), coverage=0.95)
    for k in range(40):
        layers.turn += 1
        layers.calibrate((10.0 if k < 20 else 20.0) * 2.0**-k, 2.0**-k)
    assert layers.pair(1.0, 0.0, 1).trace == pytest.approx(20, rel=0.01)
    moved = layers._alpha.ratio(lowest=0.0)
    plain = Estimate(100.0, 80.0, 125.0, "")
    settled = layers.widened(plain, 100.0)
    for _ in range(3):
        layers.turn += 1
        layers.calibrate(10.0, 1.0)
    moving = layers.widened(plain, 100.0)
    assert moved.low <= 20 <= moved.high and moving.low < settled.low and moving.high > settled.high


def test_an_estimate_that_is_undefined_does_not_claim_more_than_the_share_allows():
    layers = NormLayers(make_model(), coverage=0.95)
    for k in range(20):
        layers.turn += 1
        layers.calibrate(10.0 + (-1) ** k, 1.0)
    undefined = Estimate(math.nan, 1000.0, math.inf, "undefined")
    found = layers.widened(undefined, 50.0)
    assert math.isnan(found.value) and found.low < 500 and found.high == math.inf
    alpha = layers._alpha.ratio(lowest=0.0)  # 𝓑 far below N moves by what α moves by, and by how far that lags
    lag = math.log(alpha.value / layers._behind)
    moved = math.hypot(math.log(alpha.value / alpha.low), lag)
    assert layers.widened(undefined, 1e9).low == pytest.approx(1000 / math.exp(moved), rel=1e-6)


def test_the_share_of_the_trace_widens_the_interval():
    layers = NormLayers(make_model(), coverage=0.95)
    for trace in (9.0, 10.0, 11.0, 10.5, 9.5):
        layers.turn += 1
        layers.calibrate(trace, 1.0)
    plain = Estimate(100.0, 80.0, 125.0, "")
    wide, at_large = layers.widened(plain, 50.0), layers.widened(plain, 1e9)
    assert wide.low < at_large.low < 80 and wide.high > at_large.high > 125 and wide.value == 100
    alpha = layers._alpha.ratio(lowest=0.0)
    lag = math.log(alpha.value / layers._behind)
    squares = math.log(1.25) ** 2 + 9 * (math.log(alpha.high / alpha.value) ** 2 + lag**2)
    assert math.log(wide.high / 100) == pytest.approx(math.sqrt(squares), rel=1e-9)
    unknown = NormLayers(make_model(), coverage=0.95)
    assert unknown.widened(plain, 50.0).low == 0 and unknown.widened(plain, 50.0).high == math.inf
    for traces in ((-1.0,), (5.0, -9.0)):  # a trace from projections can come out below 0, and the mean of α with it
        negative = NormLayers(make_model(), coverage=0.95)
        for trace in traces:
            negative.calibrate(trace, 1.0)
        assert negative.widened(plain, 50.0).low == 0 and negative.widened(plain, 50.0).high == math.inf
    assert unknown.pair(1.0, 1.0, 12) is None


class _Norms(nn.Module):
    """Every kind of norm, one used twice, in float64."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.twice, self.root = nn.Linear(6, 8), nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-5)
        self.group, self.bare, self.last = (
            nn.GroupNorm(2, 4),
            nn.LayerNorm(8, elementwise_affine=False),
            nn.Linear(8, 3),
        )
        for p in self.parameters():
            nn.init.normal_(p, 0.5)

    def forward(self, x):
        h = self.first(x).unsqueeze(1).repeat(1, 5, 1) * torch.arange(1, 6).view(1, 5, 1)
        h = self.root(torch.tanh(self.twice(torch.tanh(self.twice(h))))) + self.bare(h)
        h = self.group(h.unflatten(2, (4, 2)).transpose(1, 2)).transpose(1, 2).flatten(2)
        return self.last(h.mean(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_norms_own_hooks_have_what_the_general_rules_have(dtype):
    model, (x, y) = _Norms().to(dtype), make_batch(0)
    parameters = [p for name, p in model.named_parameters() if name.split(".")[0] in ("twice", "root", "group")]
    fast, general = NormPieces(model, parameters), ExamplePieces(model, parameters)
    for source in (fast, general):
        with source.watch(12):
            F.cross_entropy(model(x.to(dtype)), y).backward()
    assert fast.sound and len(parameters) == 5
    seen, expected = ({p: float(s) for p, s in source.take()[0].squares.items()} for source in (fast, general))
    assert seen == pytest.approx(expected, rel=1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("sizes", [[320], [80, 80, 80, 80], [32] * 10, [24, 96, 200], [56, 64], [720]])
def test_of_many_examples_few_are_looked_at_and_in_turn_each_once(sizes):
    """As many turns as give all: each place of each pass once, so that the mean over turns is that of all examples."""
    model, (x, y) = _Norms().double(), make_batch(0, sum(sizes))
    parameters = [p for name, p in model.named_parameters() if name.split(".")[0] in ("twice", "root", "group")]

    def step(source, **how):
        for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
            with source.watch(len(part_x), **how):
                (F.cross_entropy(model(part_x), part_y) * len(part_x) / len(x)).backward()
        model.zero_grad()
        pieces = source.take()
        assert [piece.number for piece in pieces] == [piece.examples for piece in pieces] == sizes
        return pieces

    norms = NormPieces(model, parameters)
    everyone = step(norms, every_one=True)
    assert not any(piece.left_out for piece in everyone)
    told, found = [0] * len(sizes), [dict.fromkeys(range(len(parameters)), 0.0) for _ in sizes]
    for _ in range(200):
        pieces = step(norms)
        assert sum(piece.examples - piece.left_out for piece in pieces) <= max(127, max(sizes))
        for place, piece in enumerate(pieces):
            told[place] += piece.examples - piece.left_out
            for parameter, square in piece.squares.items():
                found[place][parameter] += float(square)
        if told == sizes:
            break
        assert all(each <= size for each, size in zip(told, sizes, strict=True))
    for piece, sums in zip(everyone, found, strict=True):
        assert sums == pytest.approx({k: float(v) for k, v in piece.squares.items()}, rel=1e-10)


def test_norm_layers_find_the_noise_of_a_large_batch_from_few_of_its_examples():
    """At fixed weights: the mean over steps of the trace, within four of its standard errors of all layers' own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 3)).double()
    noise, traces = GradientNoise(model, method="norm_layers"), []
    for step in range(FIRST + 60):
        model.zero_grad()
        run_passes(noise, model, *make_batch(step, 512), [128, 128, 256])
        noise.step()
        traces.append(noise.pair.trace)
    rows = torch.cat([gradient_rows(model, *make_batch(step, 64)) for step in range(20)])
    known = (rows - rows.mean(0)).square().sum(1).mean().item()
    told = torch.tensor(traces[FIRST + 1 :])
    error = told.std().item() / len(told) ** 0.5
    assert abs(told.mean().item() - known) < 4 * error + 0.03 * known and error < 0.02 * known


def test_norms_that_do_not_see_examples_first_are_measured_by_the_general_rules():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.last = nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x):
            turned = torch.stack([x, 2 * x, x.square()])  # (3, n, 6)
            return self.last(self.norm(turned).mean(0))

    model = Turned().double()
    noise = GradientNoise(model, method="norm_layers")
    for step in range(FIRST + 3):
        model.zero_grad()
        x, y = make_batch(step)
        run_passes(noise, model, x, y, [12])
        noise.step()
    assert isinstance(noise._norm_layers.source, ExamplePieces)
    own, _ = naive_pair(model, x, y, [model.norm.bias])
    assert noise.pair.trace == pytest.approx(noise._norm_layers._alpha.means[0] * own.trace, rel=1e-9)


class _Sequence(nn.Module):
    """Its norm sees positions first; with as many positions as examples nothing tells the two apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.last = nn.LayerNorm(6).double(), nn.Linear(6, 3).double()

    def forward(self, x):
        turned = torch.stack([x * (1 + k) for k in range(4)])  # (4, n, 6)
        return self.last(self.norm(turned.square() + turned).mean(0))


def test_a_skipped_step_leaves_nothing_for_the_next_to_be_held_against():
    """At a step with all layers the norms' own hooks saw its pieces too."""
    model = make_model()
    noise = GradientNoise(model, method="norm_layers")
    for step in range(FIRST + 6):
        model.zero_grad()
        run_passes(noise, model, *make_batch(step), [12])
        if step == FIRST + 1:
            assert noise._norm_layers.calibrates
            noise.skip()
        else:
            noise.step()
    assert noise.skipped == 1 and isinstance(noise._norm_layers.source, NormPieces)


class _Named(nn.RMSNorm):
    pass


class _Scaled(nn.RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(("kind", "source"), [(_Scaled, ExamplePieces), (_Named, NormPieces)])
def test_a_subclass_of_a_norm_is_taken_for_what_it_is(kind, source):
    """Held against the general rules, and left to them where it does something else."""
    model = make_model()
    model[1] = kind(8).double()
    noise = GradientNoise(model, method="norm_layers")
    for step in range(FIRST + 1):
        model.zero_grad()
        x, y = make_batch(step)
        run_passes(noise, model, x, y, [12])
        noise.step()
    own, _ = naive_pair(model, x, y, [model[1].weight, model[4].bias])
    assert isinstance(noise._norm_layers.source, source)
    assert noise.pair.trace == pytest.approx(noise._norm_layers._alpha.means[0] * own.trace, rel=1e-9)


def test_that_the_norms_own_hooks_are_not_sound_is_kept_in_the_state():
    model = _Sequence()
    noise = GradientNoise(model, method="norm_layers")
    for step in range(FIRST + 2):
        model.zero_grad()
        run_passes(noise, model, *make_batch(step), [12])
        noise.step()
    again = GradientNoise(model, method="norm_layers")
    again.load_state_dict(noise.state_dict())
    for each in (noise, again):
        model.zero_grad()
        run_passes(each, model, *make_batch(99), [12])
        each.step()
    assert again.pair == pytest.approx(noise.pair, rel=1e-12)


def test_a_wrong_count_between_two_calibrations_costs_that_step_and_not_the_run():
    """The hooks are given up for the general rules from the next step on."""
    model = make_model()
    noise = GradientNoise(model, method="norm_layers")
    for step in range(FIRST + 7):
        model.zero_grad()
        x, y = make_batch(step)
        if step == FIRST + 4:
            with noise.micro_batch(16):
                F.cross_entropy(model(x), y).backward()
        else:
            run_passes(noise, model, x, y, [12])
        noise.step()
        assert (noise.pair is None) == (step == FIRST + 4)
    assert isinstance(noise._norm_layers.source, ExamplePieces)


def test_a_wrong_count_is_told_as_such():
    model = make_model()
    noise, (x, y) = GradientNoise(model, method="per_example"), make_batch(0)
    with (
        pytest.raises(InputError, match="no call in watch gave 16 examples: is that their number"),
        noise.micro_batch(16),
    ):
        F.cross_entropy(model(x), y).backward()
