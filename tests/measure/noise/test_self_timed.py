"""Measuring one step in so many, or as many as their cost allows."""

import itertools

import pytest
import torch
from torch import nn

from batchlab.measure.noise.gradient_noise import GradientNoise
from tests.spine.forked import in_ranks


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


def test_norm_layers_are_timed_once_all_layers_are_seldom_measured():
    """A measured step costs 0.02 s of 1 s more, one with all layers 0.4 s: at one in 4, and not at one in 20."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double()
    noise, now, measured = GradientNoise(model, "norm_layers", every="auto"), 0.0, []
    for step in range(130):
        measured.append(noise._turn == 0)
        now += 1 + measured[-1] * (0.4 if noise._norm_layers.calibrates else 0.02)
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        with noise.micro_batch(8):
            model(x).square().mean().backward()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("batchlab.measure.noise.self_timed.time.perf_counter", lambda now=now: now)
            noise.step()
        model.zero_grad()
    assert measured[:64] == [True] * 64 and measured[64:96] == ([False] * 8 + [True] * 8) * 2
    gaps = {b - a for a, b in itertools.pairwise(at for at in range(96, 130) if measured[at])}
    assert len(gaps) == 1 and gaps <= {1, 2, 3, 4}


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
