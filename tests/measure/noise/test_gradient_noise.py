import contextlib
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchlab.core.errors import InputError
from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.measure.noise.noise_pair import noise_scale, unbiased_pair
from tests.spine.forked import in_ranks


def test_pairs_are_unbiased_and_a_mean_of_ratios_is_not():
    """Gaussian gradients, d = 200, b = 4, B = 64, 4000 repeats; truth |G|² = 1, tr(Σ) = 200.

    A ratio of such pairs has no mean at all (|G|²'s estimate passes through 0), so that averages of it stay wild.
    """
    rng, d, b, big = np.random.default_rng(0), 200, 4, 64
    mean = np.full(d, d**-0.5)
    pairs = []
    for _ in range(4000):
        pieces = mean + rng.normal(size=(big // b, d)) / math.sqrt(b)
        pairs.append(unbiased_pair((pieces**2).sum(1).mean(), (pieces.mean(0) ** 2).sum(), b, big))
    grad_sq, trace = np.array(pairs).T
    for sample, truth in ((grad_sq, 1.0), (trace, 200.0)):
        standard_error = sample.std() / math.sqrt(4000)
        assert abs(sample.mean() - truth) < 3 * standard_error < 0.05 * truth
    assert noise_scale(grad_sq.mean(), trace.mean()) == pytest.approx(200, rel=0.1)
    blocks = trace.reshape(40, 100), grad_sq.reshape(40, 100)
    off_mean_of_ratios = np.abs((blocks[0] / blocks[1]).mean(1) / 200 - 1) > 0.3
    off_ratio_of_means = np.abs(blocks[0].mean(1) / blocks[1].mean(1) / 200 - 1) > 0.3
    assert off_mean_of_ratios.sum() >= 10 and off_ratio_of_means.sum() == 0


def test_ragged_pieces_stay_unbiased_and_weighted_ones_vary_less():
    rng, sizes, d = np.random.default_rng(0), [1, 2, 5, 8], 50
    plain, weighted, total = [], [], sum(sizes)
    for _ in range(4000):
        pieces = [0.2 + rng.normal(size=d) / math.sqrt(n) for n in sizes]
        whole = sum(n * g for n, g in zip(sizes, pieces, strict=True)) / total
        norms = [g @ g for g in pieces]
        plain.append(unbiased_pair(np.mean(norms), whole @ whole, 1 / np.mean([1 / n for n in sizes]), total))
        weighted.append(unbiased_pair(np.average(norms, weights=sizes), whole @ whole, total / len(sizes), total))
    for pairs in (plain, weighted):
        for sample, truth in zip(np.array(pairs).T, (0.04 * d, d), strict=True):
            assert abs(sample.mean() - truth) < 4 * sample.std() / math.sqrt(4000) < 0.06 * truth
    assert min(trace for _, trace in weighted) > 0
    assert np.std(weighted, axis=0)[1] < 0.8 * np.std(plain, axis=0)[1]


def _digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data / 16.0), torch.tensor(data.target)


def test_the_spread_of_the_pieces_is_numpys_variance():
    """Digits cut into equal parts: mean|gᵢ|² - |g_B|² is the parts' variance, summed over coordinates."""
    x, y = _digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    parts = []
    noise = GradientNoise(model)
    for start in range(0, 1792, 256):
        with noise.micro_batch(256):
            before = [p.grad.clone() if p.grad is not None else 0 for p in model.parameters()]
            (nn.functional.cross_entropy(model(x[start : start + 256]), y[start : start + 256]) / 7).backward()
        parts.append(torch.cat([(p.grad - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]) * 7)
    noise.step()
    variance = np.var(torch.stack(parts).numpy(), axis=0).sum()
    assert noise.pair.trace * (1 / 256 - 1 / 1792) == pytest.approx(variance, rel=1e-10)


class _Quadratic(nn.Module):
    """L(θ; x) = θ·x with x ~ N(G, Σ): the gradient of an example is x itself, whatever θ."""

    def __init__(self, d):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(d, dtype=torch.float64))

    def forward(self, x):
        return (x @ self.theta).mean()


def _covered(pieces, steps, seeds, *, narrow):
    """How many intervals hold the truth, as they are and made `narrow` times narrower.

    Σ = diag(1/i) in 100 dimensions and |G|² = 0.1, so that the noise scale is about 52.
    """
    d, b = 100, 4
    spread = torch.arange(1, d + 1, dtype=torch.float64).rsqrt()
    mean = torch.full((d,), math.sqrt(0.1 / d), dtype=torch.float64)
    truth, covered = spread.square().sum().item() / 0.1, np.zeros(2, int)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        draws = mean + spread * torch.randn(steps, pieces, b, d, generator=generator, dtype=torch.float64)
        model = _Quadratic(d)
        noise = GradientNoise(model, ema=None)
        for step in draws:
            model.theta.grad = None
            for x in step:
                with noise.micro_batch(b):
                    (model(x) / pieces).backward()
            got = noise.step()
        for index, factor in enumerate((1.0, narrow)):
            low, high = got.value - (got.value - got.low) / factor, got.value + (got.high - got.value) / factor
            covered[index] += low <= truth <= high
    return covered.tolist()


@pytest.mark.parametrize(("pieces", "steps"), [(2, 60), (8, 20)])
def test_the_interval_covers_a_known_noise_scale_at_its_stated_rate(pieces, steps):
    """200 seeds: Binomial(200, 0.95) lies in 179..198 with probability 0.998; 1.6 times too narrow lies below."""
    stated, narrow = _covered(pieces, steps, 200, narrow=1.6)
    assert 179 <= stated <= 198 and narrow < 179


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_coverage_over_a_thousand_seeds(pieces):
    assert 0.93 <= _covered(pieces, 100, 1000, narrow=1.0)[0] / 1000 <= 0.97


def _model(tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
    if tied:
        model[2].weight = model[0].weight
    return model


def _batch(n=32, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator, dtype=dtype), torch.randn(n, generator=generator, dtype=dtype)


def _expected(model, sizes, dtype=torch.float64):
    x, y = _batch(sum(sizes), dtype)
    gradients = []
    for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
        loss = (model(part_x).squeeze(1) - part_y).square().mean()
        parts = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in parts if g is not None]))
    whole = sum(n * g for n, g in zip(sizes, gradients, strict=True)) / sum(sizes)
    norms = sum(n * (g @ g).item() for n, g in zip(sizes, gradients, strict=True)) / sum(sizes)
    return unbiased_pair(norms, (whole @ whole).item(), sum(sizes) / len(sizes), sum(sizes))


def _observed(model, sizes, dtype=torch.float64, forward=None, passed=False):
    noise = GradientNoise(model)
    x, y = _batch(sum(sizes), dtype)
    for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
        with noise.micro_batch(len(part_x)):
            output = (forward or model)(part_x)
            ((output.squeeze(1) - part_y).square().mean() * len(part_x) / sum(sizes)).backward()
    sq_norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    noise.step(grad_sq_norm=sq_norm if passed else None)
    noise.close()
    assert not any(p._backward_hooks for p in model.parameters())
    return noise.pair


@pytest.mark.parametrize("passed", [False, True])
@pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [1, 7, 24], [31, 1]])
def test_a_model_gives_the_naive_pair(sizes, passed):
    model = _model(dtype=torch.float64)
    assert _observed(model, sizes, passed=passed) == pytest.approx(_expected(model, sizes), rel=1e-10)


def test_shared_parameters_count_once_and_frozen_ones_not():
    tied = _model(tied=True, dtype=torch.float64)
    assert _observed(tied, [8, 24]) == pytest.approx(_expected(tied, [8, 24]), rel=1e-10)
    frozen = _model(dtype=torch.float64)
    frozen[0].requires_grad_(False)
    assert _observed(frozen, [8, 24]) == pytest.approx(_expected(frozen, [8, 24]), rel=1e-10)


def test_activation_checkpointing_and_the_compiler_change_nothing():
    model = _model(dtype=torch.float64)
    expected = pytest.approx(_expected(model, [8, 24]), rel=1e-10)
    assert _observed(model, [8, 24], forward=lambda x: checkpoint(model, x, use_reentrant=False)) == expected
    model.zero_grad()
    assert _observed(model, [8, 24], forward=torch.compile(model, backend="aot_eager")) == expected


def test_under_bf16_autocast():
    model = _model()

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    got = _observed(model, [8, 24], torch.float32, forward)
    assert got == pytest.approx(_expected(model, [8, 24], torch.float32), rel=0.1)


def test_a_loss_scale_is_taken_out_and_its_overflow_is_a_skipped_step():
    """As in training: scaled passes, unscale_, the noise scale, step, update; the third step overflows."""
    model, plain = _model(), _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    noise, pairs = GradientNoise(model), []
    x, y = _batch(32, torch.float32)
    for step in range(4):
        optimizer.zero_grad()
        for part_x, part_y in zip(x.split([8, 24]), y.split([8, 24]), strict=True):
            with noise.micro_batch(len(part_x)):
                loss = (model(part_x).squeeze(1) - part_y).square().mean() * len(part_x) / 32
                scaler.scale(loss * (math.inf if step == 2 else 1.0)).backward()
        scaler.unscale_(optimizer)
        noise.step()
        pairs.append(noise.pair)
        scaler.step(optimizer)
        scaler.update()
    assert noise.skipped == 1 and pairs.pop(2) is None
    expected = pytest.approx(_expected(plain, [8, 24], torch.float32), rel=1e-4)
    assert pairs == [expected] * 3
    assert scaler.get_scale() == 2.0**12  # grew twice before the overflow, halved at it, grew once after


@pytest.mark.parametrize("tied", [False, True])
def test_attaching_changes_no_bit(tied):
    finals = []
    for attached in (False, True):
        model = _model(tied)
        noise = GradientNoise(model) if attached else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        x, y = _batch()
        for _ in range(20):
            for piece in range(0, 32, 8):
                with noise.micro_batch(8) if noise else contextlib.nullcontext():
                    ((model(x[piece : piece + 8]).squeeze(1) - y[piece : piece + 8]).square().mean() / 4).backward()
            if noise:
                noise.step()
            optimizer.step()
            optimizer.zero_grad()
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*finals)


def test_one_piece_says_that_there_is_nothing_to_compare():
    noise = GradientNoise(_model())
    x, y = _batch()
    with noise.micro_batch(32):
        (noise._parameters[0].sum() * 0 + 1).backward()
    got = noise.step()
    assert math.isnan(got.value) and got.high == math.inf and "one piece a step" in got.method
    del x, y


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(bad):
    model = _Quadratic(3)
    noise = GradientNoise(model)
    for value in (1.0, 2.0, bad, 3.0):
        model.theta.grad = None
        for shift in (0.0, 1.0):
            with noise.micro_batch(2):
                (model(torch.full((2, 3), value + shift, dtype=torch.float64)) / 2).backward()
        noise.step()
    assert noise.skipped == 1 and noise.statistics.count == 3


def test_skip_forgets_the_pieces():
    noise = GradientNoise(_Quadratic(3))
    with noise.micro_batch(2):
        pass
    noise.skip()
    assert noise.skipped == 1
    with pytest.raises(InputError, match="step needs at least one micro_batch before it"):
        noise.step()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unbiased_pair(1.0, 1.0, 4, 4), "1 <= small < big, got small=4, big=4"),
        (lambda: unbiased_pair(1.0, 1.0, 0, 4), "1 <= small < big"),
        (
            lambda: GradientNoise(_model(), method="magic"),
            "method must be one of 'micro_batch', 'per_example', 'norm_layers', 'ranks', got 'magic'",
        ),
        (lambda: GradientNoise(_model(), ema=1.0), r"ema must lie in \[0, 1\)"),
        (lambda: GradientNoise(nn.Identity()), "no parameter that requires a gradient"),
        (
            lambda: GradientNoise(_model()).micro_batch(0).__enter__(),
            "examples must be an integer of at least 1, got 0",
        ),
        (lambda: GradientNoise(_model()).step(), "step needs at least one micro_batch"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def _rank_pairs(folder, method, per_rank):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    rank = dist.get_rank()
    model = _model(dtype=torch.float64)
    noise = GradientNoise(model, method=method)
    wrapped = DistributedDataParallel(model)
    x, y = (part.split(sum(per_rank))[rank] for part in _batch(2 * sum(per_rank), torch.float64))
    for index, (part_x, part_y) in enumerate(zip(x.split(per_rank), y.split(per_rank), strict=True)):
        sync = contextlib.nullcontext() if index == len(per_rank) - 1 else wrapped.no_sync()
        with sync, noise.micro_batch(len(part_x)):
            ((wrapped(part_x).squeeze(1) - part_y).square().mean() * len(part_x) / sum(per_rank)).backward()
    noise.step()
    torch.save(torch.tensor(noise.pair, dtype=torch.float64), folder / f"{rank}.pt")


@pytest.mark.parametrize(
    ("method", "per_rank"), [("ranks", [16]), ("ranks", [5, 4, 7]), ("micro_batch", [8, 8]), ("micro_batch", [5, 11])]
)
def test_ranks_give_what_one_process_gives(tmp_path, method, per_rank):
    assert in_ranks(2, tmp_path, _rank_pairs, tmp_path, method, per_rank) == [0, 0]
    pieces = [sum(per_rank)] if method == "ranks" else per_rank
    expected = _expected(_model(dtype=torch.float64), pieces * 2)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True).tolist()
        assert got == pytest.approx(list(expected), rel=1e-9)


class _Halves(nn.Module):
    """Its second half is used where an example says so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

    def forward(self, x, both):
        return self.first(x).sum(1) + (self.second(x).sum(1) if both else 0)


def _passes_in_no_sync(folder, both):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(_Halves(), find_unused_parameters=True)
    noise, told, x = GradientNoise(wrapped, method="ranks"), [], _batch(12, torch.float64)[0][:, :3]
    rank, looked_at = dist.get_rank(), []
    for _ in range(3):
        wrapped.zero_grad()
        for index, part in enumerate(x.chunk(2)[rank].split(2)):
            with noise.micro_batch(2), contextlib.nullcontext() if index == 2 else wrapped.no_sync():
                (wrapped(part, both[index]).square().mean() / 3).backward()
                looked_at.append(len(noise._all._seen))
        noise.step()
        told.append([math.nan] * 2 if noise.pair is None else list(noise.pair))
    torch.save((torch.tensor(told, dtype=torch.float64), noise.skipped, looked_at), folder / f"{rank}.pt")


@pytest.mark.parametrize(
    ("both", "looked_at", "skipped"),
    [([True] * 3, [0, 0, 4] * 3, 0), ([True, True, False], [0, 0, 2, 4, 4, 4, 4, 4, 4], 1)],
    ids=["all in the last pass", "one half not in the last"],
)
def test_under_ddp_only_the_pass_that_ends_the_sum_is_looked_at(tmp_path, both, looked_at, skipped):
    assert in_ranks(2, tmp_path, _passes_in_no_sync, tmp_path, both) == [0, 0]
    model, x = _Halves(), _batch(12, torch.float64)[0][:, :3]
    sums = []
    for half in x.chunk(2):
        model.zero_grad()
        for index, part in enumerate(half.split(2)):
            (model(part, both[index]).square().mean() / 3).backward()
        sums.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    small, big = sum(s.square().sum().item() for s in sums) / 2, (sum(sums) / 2).square().sum().item()
    for rank in range(2):
        told, missed, seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (missed, seen) == (skipped, looked_at)
        assert told[:skipped].isnan().all()
        for pair in told[skipped:].tolist():
            assert pair == pytest.approx(unbiased_pair(small, big, 6, 12), rel=1e-9)


def _averaged_too_early(said):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = _model(dtype=torch.float64)
    noise = GradientNoise(model, method="ranks")
    wrapped = DistributedDataParallel(model)
    x, y = (part.split(16)[dist.get_rank()] for part in _batch(32, torch.float64))
    for part_x, part_y in zip(x.split(8), y.split(8), strict=True):
        with noise.micro_batch(8):
            ((wrapped(part_x).squeeze(1) - part_y).square().mean() / 2).backward()
    with pytest.raises(InputError, match=said):
        noise.step()


def test_ranks_whose_gradients_were_averaged_between_micro_batches_are_refused(tmp_path):
    said = r"needs each rank's own sum over its micro-batches.*no_sync\(\) on all but the last"
    assert in_ranks(2, tmp_path, _averaged_too_early, said) == [0, 0]


def _noise_along(every, steps=12, resume_at=None):
    """Steps of one float64 model: the estimates, the pairs and the hooks that were on, step by step."""
    model, x, y = make_every()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    noise, seen = GradientNoise(model, every=every), []
    for step in range(steps):
        if step == resume_at:
            state = noise.state_dict()
            noise.close()
            noise = GradientNoise(model, every=every)
            noise.load_state_dict(state)
        optimizer.zero_grad()
        for part in range(0, 8, 2):
            with noise.micro_batch(2):
                ((model(x[step, part : part + 2]) - y[step, part : part + 2]).square().mean() / 4).backward()
        hooks = len(model.weight._backward_hooks or ())
        estimate = noise.step()
        seen.append((repr(estimate), noise.pair, hooks))
        optimizer.step()
    noise.close()
    return seen


def _self_timed(dear, steps=60):
    """Which steps are measured, where one takes 1 s of a made clock and measuring it `dear` s more."""
    model, x, y = make_every()
    noise, now, measured = GradientNoise(model, every="auto"), 0.0, []
    for step in range(steps):
        measured.append(bool(model.weight._backward_hooks))
        now += 1 + dear * measured[-1]
        for part in range(0, 8, 2):
            with noise.micro_batch(2):
                ((model(x[step % 12, part : part + 2]) - y[step % 12, part : part + 2]).square().mean() / 4).backward()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("batchlab.measure.noise.self_timed.time.perf_counter", lambda now=now: now)
            noise.step()
        assert (noise.pair is not None) == measured[-1]
        model.zero_grad()
    return measured


@pytest.mark.parametrize(("dear", "every"), [(0.0, 1), (0.019, 1), (0.099, 5), (0.11, 6), (0.01, 1), (30.0, 100)])
def test_it_finds_from_the_loops_own_time_how_seldom_to_measure(dear, every):
    blocks = [True] * 6 + ([False] * 8 + [True] * 8) * 2
    assert _self_timed(dear) == [*blocks, *(step % every == 0 for step in range(60 - len(blocks)))]


def _ranks_time_themselves(folder):
    import torch.distributed as dist

    measured = _self_timed(0.099 + 0.1 * dist.get_rank())
    (folder / f"{dist.get_rank()}").write_text(str(measured[38:]))


def test_all_ranks_measure_at_the_same_steps_as_the_one_where_it_costs_most(tmp_path):
    assert in_ranks(2, tmp_path, _ranks_time_themselves, tmp_path) == [0, 0]
    for rank in range(2):
        assert (tmp_path / f"{rank}").read_text() == str([step % 10 == 0 for step in range(22)])


def make_every():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 8, 3, generator=generator), torch.randn(12, 8, 1, generator=generator)
    model = nn.Linear(3, 1, dtype=torch.float64)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    return model, x.double(), y.double()


def test_measuring_some_steps_gives_their_pairs_and_leaves_the_others_without_hooks():
    always, seldom = _noise_along(1), _noise_along(3)
    for step, ((_, every_pair, _), (estimate, pair, hooks)) in enumerate(zip(always, seldom, strict=True)):
        due = step % 3 == 0
        assert (pair == every_pair and hooks > 0) if due else (pair is None and hooks == 0)
        assert due or estimate == seldom[step - 1][0]


@pytest.mark.parametrize("at", [3, 4, 5])
def test_the_turn_goes_round(at):
    assert _noise_along(3, resume_at=at) == _noise_along(3)


class _TwoHeads(nn.Module):
    """A body, and a head that is never used: the largest of the small parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.head = nn.Linear(16, 16).double()

    def forward(self, x):
        return self.body(x)


def _step(model, noise, seed, *, sizes=(8, 8, 8, 8), scale=1.0, outside=()):
    """A step whose pieces in `outside` are not watched; the gradient is divided by `scale` after it."""
    x, y = _batch(sum(sizes), torch.float64, seed)
    model.zero_grad()
    for index, (part_x, part_y) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
        with contextlib.nullcontext() if index in outside else noise.micro_batch(len(part_x)):
            loss = (model(part_x).squeeze(1) - part_y).square().mean() * len(part_x) / len(x)
            (loss * scale).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= scale
    return noise.step()


@pytest.mark.parametrize("method", ["micro_batch", "per_example"])
def test_a_parameter_that_is_never_used_hides_no_loss_scale(method):
    """The first step finds that the witness has no gradient, takes another, and tells nothing."""
    model, plain = _TwoHeads(), _TwoHeads()
    scaled, expected = GradientNoise(model, method), GradientNoise(plain.body, method)
    for seed in range(4):
        _step(model, scaled, seed, scale=1024.0)
        _step(plain, expected, seed)
        assert scaled.pair is None if seed == 0 else scaled.pair == pytest.approx(expected.pair, rel=1e-6)
    assert scaled.skipped == 0 and scaled.statistics.count == 3


def test_a_parameter_that_is_never_used_hides_no_backward_pass_outside():
    model = _TwoHeads()
    noise = GradientNoise(model)
    _step(model, noise, 0)
    with pytest.raises(InputError, match="do not add up to .grad"):
        _step(model, noise, 1, outside=(2,))


class _Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 200).double(), nn.Linear(200, 6).double()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x):
        return self.last(torch.tanh(self.first(x))).sum(1, keepdim=True) * self.scale


def test_a_single_number_is_no_witness_where_there_is_another():
    model = _Scaled()
    noise = GradientNoise(model)
    assert noise._all.witness.parameter.numel() > 1
    with pytest.raises(InputError, match="do not add up to .grad"):
        _step(model, noise, 0, outside=(1,))


def test_a_parameter_of_no_dimension_has_its_norms_too():
    pairs = []
    for method, sizes in (("per_example", [32]), ("micro_batch", [1] * 32)):
        model = _Scaled()
        noise = GradientNoise(model, method)
        _step(model, noise, 0, sizes=sizes)
        pairs.append(noise.pair)
    assert pairs[0] == pytest.approx(pairs[1], rel=1e-9)


@pytest.mark.parametrize("method", ["micro_batch", "per_example"])
@pytest.mark.parametrize("frozen", [0, 2, 5])
def test_what_was_frozen_since_is_left_out_whatever_lies_in_its_grad(method, frozen):
    """The witness too."""
    model, fresh = _model(dtype=torch.float64), _model(dtype=torch.float64)
    noise = GradientNoise(model, method)
    _step(model, noise, 0)
    for net in (model, fresh):
        list(net.parameters())[frozen].requires_grad_(False)
    stale = list(model.parameters())[frozen]
    expected = GradientNoise(fresh, method)
    for seed in (1, 2):
        stale.grad = torch.full_like(stale, 1e3)
        x, y = _batch(32, torch.float64, seed)
        for net, each in ((model, noise), (fresh, expected)):
            for p in net.parameters():
                p.grad = p.grad if p is stale else None
            for part_x, part_y in zip(x.chunk(4), y.chunk(4), strict=True):
                with each.micro_batch(8):
                    ((net(part_x).squeeze(1) - part_y).square().mean() / 4).backward()
            each.step()
    assert noise.pair == pytest.approx(expected.pair, rel=1e-9)  # the first of the two may have changed its witness


def test_a_gradient_that_no_micro_batch_saw_is_refused():
    model = _TwoHeads()
    noise = GradientNoise(model)
    _step(model, noise, 0)
    with pytest.raises(InputError, match="1 parameters have a gradient that no micro_batch saw"):
        model.head.bias.grad = torch.ones(16, dtype=torch.float64)
        for part_x, part_y in zip(*(part.chunk(2) for part in _batch(32, torch.float64)), strict=True):
            with noise.micro_batch(16):
                ((model(part_x).squeeze(1) - part_y).square().mean() / 2).backward()
        noise.step()


def test_a_backward_pass_outside_and_a_closed_object_are_told_as_such():
    model = _model(dtype=torch.float64)
    noise, (x, y) = GradientNoise(model, every=3), _batch(32, torch.float64)
    for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
        with noise.micro_batch(16):
            loss = (model(part_x).squeeze(1) - part_y).square().mean() / 2
        loss.backward()
    with pytest.raises(InputError, match="no backward pass was seen in micro_batch"):
        noise.step()
    noise.close()
    with pytest.raises(InputError, match="this GradientNoise was closed"):
        noise.micro_batch(16)
    noise.skip()
    noise.skip()
    noise.skip()
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_state_of_another_method_or_weighting_is_refused():
    model = _model(dtype=torch.float64)
    state = GradientNoise(model).state_dict()
    with pytest.raises(InputError, match="state is of method 'micro_batch', this is of 'ranks'"):
        GradientNoise(model, "ranks").load_state_dict(state)
    weighed = GradientNoise(model, weighting="preconditioned", optimizer=torch.optim.Adam(model.parameters()))
    with pytest.raises(InputError, match="state is of weighting 'none', this is of 'preconditioned'"):
        weighed.load_state_dict(state)


def test_counts_of_any_library_are_integers_and_squared_norms_not_negative():
    model = _model(dtype=torch.float64)
    noise = GradientNoise(model)
    with noise.micro_batch(np.int64(3)):
        pass
    with pytest.raises(InputError, match="model must be a torch.nn.Module, got generator"):
        GradientNoise(model.parameters())
    noise = GradientNoise(model)
    x, y = _batch(32, torch.float64)
    for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
        with noise.micro_batch(16):
            ((model(part_x).squeeze(1) - part_y).square().mean() / 2).backward()
    with pytest.raises(InputError, match="grad_sq_norm is a squared norm and must be >= 0, got -3"):
        noise.step(-3.0)


def test_a_parameter_that_adam_never_stepped_has_no_part_in_its_geometry():
    model, body = _TwoHeads(), _TwoHeads().body
    found = []
    for net in (model, body):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        noise = GradientNoise(net, weighting="preconditioned", optimizer=optimizer)
        for seed in range(4):
            _step(net, noise, seed)
            optimizer.step()
        found.append(noise.pair)
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    with pytest.raises(InputError, match="SGD keeps none"):
        sgd = torch.optim.SGD(body.parameters(), lr=0.1)
        GradientNoise(body, weighting="preconditioned", optimizer=sgd)
