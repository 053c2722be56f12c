"""The noise scale from single examples: of all layers, and of the normalisation layers alone."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from batchlab.core.errors import InputError
from batchlab.measure.noise.gradient_noise import GradientNoise
from tests.measure.noise.single_examples import make_batch, make_model, naive_pair, run_passes
from tests.spine.forked import in_ranks


@pytest.mark.parametrize("sizes", [[12], [1, 11], [4, 4, 4]])
def test_single_examples_give_the_naive_pair(sizes):
    model, (x, y) = make_model(), make_batch(0)
    expected, _ = naive_pair(model, x, y, list(model.parameters()))
    noise = GradientNoise(model, method="per_example")
    run_passes(noise, model, x, y, sizes)
    noise.step()
    assert noise.pair == pytest.approx(expected, rel=1e-10)


def test_a_loss_scale_that_was_taken_out_is_found():
    model, (x, y) = make_model(), make_batch(0)
    expected, _ = naive_pair(model, x, y, list(model.parameters()))
    noise = GradientNoise(model, method="per_example")
    with noise.micro_batch(12):
        (64 * F.cross_entropy(model(x), y)).backward()
    for p in model.parameters():
        p.grad /= 64
    noise.step()
    assert noise.pair == pytest.approx(expected, rel=1e-6)


def _ranks(folder, method):
    model = make_model()
    noise, wrapped = GradientNoise(model, method=method), DistributedDataParallel(model)
    rank = torch.distributed.get_rank()
    x, y = (part.chunk(2)[rank] for part in make_batch(0))
    run_passes(noise, wrapped, x, y, [6])
    noise.step()
    torch.save(torch.tensor(noise.pair, dtype=torch.float64), folder / f"{rank}.pt")


@pytest.mark.parametrize("method", ["per_example", "norm_layers"])
def test_ranks_add_their_examples(tmp_path, method):
    assert in_ranks(2, tmp_path, _ranks, tmp_path, method) == [0, 0]
    model, (x, y) = make_model(), make_batch(0)
    expected, _ = naive_pair(model, x, y, list(model.parameters()))
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt").tolist() == pytest.approx(list(expected), rel=1e-10)


@pytest.mark.parametrize("method", ["per_example", "norm_layers"])
def test_attaching_changes_no_bit_and_leaves_nothing(method):
    plain, model = make_model(), make_model()
    noise = GradientNoise(model, method=method)
    for each in (plain, model):
        optimizer = torch.optim.Adam(each.parameters(), lr=0.01)
        for step in range(12):
            optimizer.zero_grad()
            x, y = make_batch(step)
            if each is model:
                run_passes(noise, model, x, y, [4, 8])
                noise.step()
            else:
                for part_x, part_y in zip(x.split([4, 8]), y.split([4, 8]), strict=True):
                    (F.cross_entropy(each(part_x), part_y) * len(part_x) / 12).backward()
            optimizer.step()
    noise.close()
    assert all(map(torch.equal, plain.parameters(), model.parameters()))
    assert not any(p._backward_hooks for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_state_goes_on_where_it_was():
    def run(resume_at):
        model = make_model()
        noise, seen = GradientNoise(model, method="norm_layers"), []
        for step in range(16):
            if step == resume_at:
                state = noise.state_dict()
                noise = GradientNoise(model, method="norm_layers")
                noise.load_state_dict(state)
            model.zero_grad()
            run_passes(noise, model, *make_batch(step), [12])
            estimate = noise.step()
            seen.append((*noise.pair, estimate.value, estimate.low, estimate.high))
        return seen

    expected = [pytest.approx(step, rel=1e-9, nan_ok=True) for step in run(None)]
    assert run(5) == expected and run(12) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GradientNoise(nn.Linear(2, 2), method="norm_layers"), "needs a layer, RMS, group or instance norm"),
        (
            lambda: GradientNoise(
                nn.Linear(2, 2),
                method="per_example",
                weighting="preconditioned",
                optimizer=torch.optim.Adam([torch.zeros(1, requires_grad=True)]),
            ),
            'preconditioned" needs method "micro_batch" or "ranks", got \'per_example\'',
        ),
        (lambda: GradientNoise(nn.Linear(2, 2), method="per_example").step(), "step needs at least one micro_batch"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_one_example_says_that_there_is_nothing_to_compare():
    for method in ("per_example", "norm_layers"):
        model = make_model()
        noise = GradientNoise(model, method=method)
        run_passes(noise, model, *(part[:1] for part in make_batch(0)), [1])
        got = noise.step()
        assert math.isnan(got.value) and got.high == math.inf and "a step has nothing to be compared with" in got.method
