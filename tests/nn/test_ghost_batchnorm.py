"""Ghosts against PyTorch's own BatchNorm on each chunk: outputs, gradients, statistics; and where there is none."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from batchlab.core.errors import InputError
from batchlab.nn import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    SplitBatchNorm1d,
    convert_ghost_batchnorm,
    convert_plain_batchnorm,
    ghost_batch_norm,
)
from batchlab.nn.ghost_batchnorm import ghosts
from tests.spine.forked import in_ranks

PLACES = {1: (), 2: (5,), 3: (2, 3), 4: (2, 2, 3)}
KINDS = {
    1: (GhostBatchNorm1d, nn.BatchNorm1d),
    2: (GhostBatchNorm1d, nn.BatchNorm1d),
    3: (GhostBatchNorm2d, nn.BatchNorm2d),
    4: (GhostBatchNorm3d, nn.BatchNorm3d),
}
LAST = {3: torch.channels_last, 4: torch.channels_last_3d}


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def inputs(batch, dims, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, 3, *PLACES[dims]), generator=generator, dtype=torch.float64).to(dtype) * 2 + 5


def chunks(batch, size, alone):
    """The ghosts of a batch by their examples, written out."""
    cuts = [list(range(at, min(at + size, batch))) for at in range(0, batch, size)]
    if len(cuts) > 1 and len(cuts[-1]) == 1 and alone:
        cuts[-2:] = [cuts[-2] + cuts[-1]]
    return cuts


def reference(layer, x, cuts):
    """A plain layer on each ghost in turn, put back in the order of the batch."""
    y = torch.empty_like(x)
    parts = [layer(x[cut]) for cut in cuts]
    return y.index_copy(0, torch.tensor([i for cut in cuts for i in cut]), torch.cat(parts))


def pair(dims, size, momentum=0.1, affine=True, tracks=True, **more):
    ghost, plain = KINDS[dims]
    theirs = plain(3, momentum=momentum, affine=affine, track_running_stats=tracks).double()
    if affine:
        nn.init.normal_(theirs.weight), nn.init.normal_(theirs.bias)
    ours = ghost(3, size, momentum=momentum, affine=affine, track_running_stats=tracks, **more).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def same(ours, theirs, x, cuts, tolerance=1e-12):
    """Both layers on two batches: outputs, gradients of a random loss, and every buffer."""
    weigh = torch.randn(x.shape, dtype=x.dtype)
    for batch in (x, x.flip(1) * 3):
        a, b = (batch.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
        y, z = ours(a), reference(theirs, b, cuts)
        close(y, z, tolerance)
        for layer, out in ((ours, y), (theirs, z)):
            layer.zero_grad()
            (out * weigh).sum().backward()
        close(a.grad, b.grad, tolerance)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            close(mine.grad, other.grad, tolerance)
    assert dict(ours.named_buffers()).keys() == dict(theirs.named_buffers()).keys()
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        close(mine, other, tolerance)


@settings(max_examples=30)
@given(
    batch=st.integers(2, 17),
    size=st.integers(2, 20),
    dims=st.integers(1, 4),
    momentum=st.sampled_from([0.1, 1.0, 0.0, None]),
    affine=st.booleans(),
    tracks=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_it_is_batchnorm_on_each_ghost_in_order(batch, size, dims, momentum, affine, tracks, seed):
    ours, theirs = pair(dims, size, momentum, affine, tracks)
    same(ours, theirs, inputs(batch, dims, seed), chunks(batch, size, dims == 1))


@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize("batch", [12, 14])
def test_channels_last_goes_in_and_comes_out(dims, batch):
    ours, theirs = pair(dims, 4)
    x = inputs(batch, dims).to(memory_format=LAST[dims])
    assert ours(x).is_contiguous(memory_format=LAST[dims])
    ours.load_state_dict(theirs.state_dict())
    same(ours, theirs, x, chunks(batch, 4, False))


@pytest.mark.parametrize("dims", PLACES)
@pytest.mark.parametrize("batch", [12, 15])
@pytest.mark.parametrize("last", [False, True])
def test_one_call_and_a_call_for_each_are_the_same(dims, batch, last):
    x = inputs(batch, dims)
    if last and dims in LAST:
        x = x.to(memory_format=LAST[dims])
    found = []
    for loop in (False, True):
        mean, var, tracked = torch.zeros(3).double(), torch.ones(3).double(), torch.tensor(7)
        given_x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        torch.manual_seed(0)
        affine = torch.randn(3).double().requires_grad_(), torch.randn(3).double().requires_grad_()
        y = ghost_batch_norm(given_x, mean, var, 4, *affine, True, num_batches_tracked=tracked, loop=loop)
        (y * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()).sum().backward()
        found.append([y, given_x.grad, *(p.grad for p in affine), mean, var, tracked])
        assert tracked == 7 + (3 if batch == 12 else 4)
        assert y.stride() == x.stride()
    for one, each in zip(*found, strict=True):
        close(one, each)


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [12, 14])
def test_interleaved_ghosts_take_every_kth_example(dims, batch):
    ours, theirs = pair(dims, 4, interleaved=True)
    cuts = [list(range(i, 12, 3)) for i in range(3)] + ([[12, 13]] if batch == 14 else [])
    same(ours, theirs, inputs(batch, dims), cuts)


def test_what_is_left_over():
    x = inputs(11, 1)
    ours, theirs = pair(1, 4, ragged="merge")
    same(ours, theirs, x, [[0, 1, 2, 3], list(range(4, 11))])
    ours, theirs = pair(1, 5)
    same(ours, theirs, x, [[0, 1, 2, 3, 4], list(range(5, 11))])  # the eleventh would be alone
    ours, theirs = pair(3, 5)
    same(ours, theirs, inputs(11, 3), [list(range(5)), list(range(5, 10)), [10]])  # six places have a variance
    with pytest.raises(InputError, match="^the batch must be a multiple of ghost_size 4, got 11 examples$"):
        GhostBatchNorm1d(3, 4, ragged="refuse")(x.float())


def test_a_ghost_as_large_as_the_batch_is_batchnorm():
    for size in (12, 40):
        ours, theirs = pair(3, size)
        x = inputs(12, 3)
        assert torch.equal(ours(x), theirs(x))
        for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            close(mine, other, 1e-15)
        ours.eval(), theirs.eval()
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("tracks", [True, False])
def test_evaluation_is_that_of_batchnorm(tracks):
    ours, theirs = pair(3, 2, tracks=tracks)
    x = inputs(7, 3)
    ours(x)
    theirs.load_state_dict(ours.state_dict())
    before = copy.deepcopy(ours.state_dict())
    ours.eval(), theirs.eval()
    assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())
    with torch.no_grad():
        assert torch.equal(ours(x[:1]), theirs(x[:1]))


def test_running_statistics_in_closed_form():
    x, eta, k = inputs(20, 1), 0.3, 5
    layer = GhostBatchNorm1d(3, 4, momentum=eta).double()
    layer(x)
    weights = torch.tensor([eta * (1 - eta) ** (k - 1 - i) for i in range(k)], dtype=torch.float64)
    assert weights.sum() + (1 - eta) ** k == pytest.approx(1, abs=1e-12)
    ghost = x.view(k, 4, 3)
    close(layer.running_mean, weights @ ghost.mean(1))
    close(layer.running_var, (1 - eta) ** k + weights @ ghost.var(1, correction=1))


def test_a_model_is_the_accumulation_of_micro_batches():
    """Of equal size; and of a ragged last one, weighed by its size."""
    torch.manual_seed(1)
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)
    ).double()
    model = convert_ghost_batchnorm(copy.deepcopy(plain), 6)
    for batch in (24, 21):
        x, y = torch.randn(batch, 1, 6, 6).double(), torch.randint(5, (batch,))
        for each in (plain, model):
            each.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for a, b in zip(x.split(6), y.split(6), strict=True):
            (F.cross_entropy(plain(a), b) * (len(a) / batch)).backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            close(ours.grad, theirs.grad, 1e-10)
        for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
            close(ours, theirs, 1e-10)


def test_second_derivatives():
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    for loop in (True, False):
        ours = partial(ghost_batch_norm, running_mean=None, running_var=None, ghost_size=3, training=True, loop=loop)
        assert torch.autograd.gradgradcheck(ours, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_statistics_in_the_parameters_type(dtype):
    ghost, plain = GhostBatchNorm2d(3, 4), nn.BatchNorm2d(3)
    x = inputs(12, 3, dtype=dtype)
    y, z = ghost(x), reference(plain, x, chunks(12, 4, False))
    assert y.dtype is dtype and ghost.running_var.dtype is torch.float32
    assert torch.equal(y, z)
    close(ghost.running_var, plain.running_var, 1e-6)


def test_autocast_does_what_it_does_to_batchnorm():
    linear, ghost, plain = nn.Linear(5, 3), GhostBatchNorm1d(3, 4), nn.BatchNorm1d(3)
    x = torch.randn(10, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = ghost(linear(x)), reference(plain, linear(x), chunks(10, 4, True))
    assert y.dtype is z.dtype is torch.bfloat16 and torch.equal(y, z)


def test_a_ghost_that_is_not_finite_harms_its_own_outputs_alone_and_shows_in_the_statistics():
    x = inputs(12, 3)
    x[5, 1, 0, 0] = float("nan")
    layer = GhostBatchNorm2d(3, 4).double()
    y = layer(x)
    assert y[4:8, 1].isnan().all() and y[:4].isfinite().all() and y[8:].isfinite().all()
    assert layer.running_mean.isnan().tolist() == [False, True, False]


def test_precise_statistics_are_the_mean_over_ghosts():
    x = inputs(24, 1)
    model = nn.Sequential(GhostBatchNorm1d(3, 4)).double()
    update_bn([x[:12], x[12:]], model)
    close(model[0].running_mean, x.mean(0))
    close(model[0].running_var, x.view(6, 4, 3).var(1).mean(0))
    assert model[0].momentum == 0.1 and model[0].num_batches_tracked == 6


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)
    )


def test_conversion_keeps_the_layers_and_leads_back():
    model = network()
    seen, norm, parameters = [], model[1], list(model.parameters())
    norm.register_forward_hook(lambda *_: seen.append(1))
    norm.weight.requires_grad_(False)
    norm.eval()
    names = list(model.state_dict())
    assert convert_ghost_batchnorm(model, 4, ragged="merge") is model
    assert model[1] is norm and type(norm) is GhostBatchNorm2d and type(model[5]) is GhostBatchNorm1d
    assert not norm.training and not norm.weight.requires_grad and list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model(torch.randn(8, 1, 6, 6))
    assert seen == [1] and norm.num_batches_tracked == 0 and model[5].num_batches_tracked == 2
    assert "ghost_size=4, ragged='merge'" in repr(norm)
    convert_ghost_batchnorm(model, 2)
    assert (norm.ghost_size, norm.ragged) == (2, "own")
    assert convert_plain_batchnorm(model) is model and model[1] is norm and type(norm) is nn.BatchNorm2d
    assert "ghost" not in repr(model) and repr(norm) == repr(nn.BatchNorm2d(4)) and not hasattr(norm, "ghost_size")
    network().load_state_dict(model.state_dict())
    assert convert_ghost_batchnorm(nn.BatchNorm1d(3), 4)(torch.randn(8, 3)).shape == (8, 3)


def test_what_cannot_be_converted_is_refused_before_anything_changes():
    class Own(nn.BatchNorm1d):
        pass

    for layer, why in (
        (
            nn.SyncBatchNorm(3),
            "SyncBatchNorm, got one at '1': it joins all ranks' batches, which is the contrary",
        ),
        (nn.LazyBatchNorm1d(), "LazyBatchNorm1d, got one at '1': send a batch through it first"),
        (Own(3), "Own, got one at '1': what its own class does would be lost"),
        (SplitBatchNorm1d(3, 2), "SplitBatchNorm1d, got one at '1': call convert_plain_batchnorm first"),
    ):
        model = nn.Sequential(nn.BatchNorm1d(3), layer)
        with pytest.raises(InputError) as error:
            convert_ghost_batchnorm(model, 4)
        assert str(error.value) == f"model must have no {why}"
        assert type(model[0]) is nn.BatchNorm1d


def test_synchronised_layers_lose_their_ghosts_as_the_docstring_says():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(convert_ghost_batchnorm(network(), 4))
    assert type(model[1]) is nn.SyncBatchNorm


@pytest.mark.parametrize("size", [0, -1, 2.5, True, None])
def test_sizes_that_are_none(size):
    text = f"^ghost_size must be an integer of at least 1, got {size!r}$"
    for call in (
        lambda: GhostBatchNorm1d(3, size),
        lambda: convert_ghost_batchnorm(network(), size),
        lambda: ghost_batch_norm(torch.randn(4, 3), None, None, size, training=True),
    ):
        with pytest.raises(InputError, match=text):
            call()


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"interleaved": True}, {"momentum": None}])
def test_an_empty_batch_has_no_ghost(settings):
    layer = GhostBatchNorm2d(3, 4, **settings)
    x = torch.randn(0, 3, 2, 2, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and not layer.weight.grad.any() and layer.num_batches_tracked == 0
    assert not layer.running_mean.any() and (layer.running_var == 1).all()


@pytest.mark.parametrize("fused", [False, True])
def test_the_bias_may_be_updated_before_the_backward_pass(fused):
    """As that of `nn.BatchNorm` may."""
    x = torch.randn(32, 4, 5, 5, requires_grad=True)
    ends = []
    for moves in (False, True):
        layer = GhostBatchNorm2d(4, 8, fused=fused)
        y = layer(x)
        if moves:
            with torch.no_grad():
                layer.bias.add_(1)
        ends.append(torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias)))
    assert all(map(torch.equal, *ends))


def test_bad_input():
    with pytest.raises(InputError, match=r"^ragged must be one of \['own', 'merge', 'refuse'\], got 'drop'$"):
        GhostBatchNorm1d(3, 4, ragged="drop")
    one = "each ghost must have 2 values a channel, got"
    with pytest.raises(InputError, match=f"^{one} 4 examples of 1 and ghosts of 1$"):
        GhostBatchNorm1d(3, 1)(torch.randn(4, 3))
    with pytest.raises(InputError, match=f"^{one} 1 examples of 1 and ghosts of 4$"):
        GhostBatchNorm1d(3, 4)(torch.randn(1, 3))
    with pytest.raises(ValueError, match="expected 4D input"):
        GhostBatchNorm2d(3, 4)(torch.randn(8, 3))
    run = torch.zeros(3)
    with pytest.raises(InputError, match="^running_mean and running_var must both be given or both be None$"):
        ghost_batch_norm(torch.randn(8, 3), run, None, 4, training=True)
    with pytest.raises(InputError, match="^momentum None needs num_batches_tracked"):
        ghost_batch_norm(torch.randn(8, 3), run, run.clone(), 4, training=True, momentum=None)
    assert GhostBatchNorm2d(3, 1)(torch.randn(4, 3, 2, 2)).isfinite().all()  # places make up for examples


@given(batch=st.integers(1, 200), size=st.integers(1, 64), values=st.integers(1, 3))
def test_ghosts_hold_all_examples_and_have_a_variance(batch, size, values):
    for ragged in ("own", "merge"):
        try:
            full, rest = ghosts(batch, size, values, ragged)
        except InputError:
            assert min(size, batch) * values == 1
            continue
        assert full * size + rest == batch and (rest or size) * values > 1 and rest < 2 * size


def _ranks_against_one():
    import torch.distributed as dist

    rank = dist.get_rank()
    torch.manual_seed(0)
    alone = convert_ghost_batchnorm(network().double(), 4)
    model = DistributedDataParallel(copy.deepcopy(alone))
    x, y = torch.randn(16, 1, 6, 6).double(), torch.randint(5, (16,))
    F.cross_entropy(alone(x), y).backward()
    F.cross_entropy(model(x[8 * rank : 8 * rank + 8]), y[8 * rank : 8 * rank + 8]).backward()
    for ours, theirs in zip(model.module.parameters(), alone.parameters(), strict=True):
        close(ours.grad, theirs.grad, 1e-12)
    assert model.module[1].num_batches_tracked == 2 and alone[1].num_batches_tracked == 4


def test_two_ranks_are_one_process_with_the_whole_batch(tmp_path):
    assert in_ranks(2, tmp_path, _ranks_against_one) == [0, 0]


@pytest.mark.slow  # to load the compiler takes long
def test_compiled():
    for interleaved in (False, True):
        torch.compiler.reset()
        model = convert_ghost_batchnorm(network(), 4, interleaved=interleaved)
        other = copy.deepcopy(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for batch in (10, 12, 14):  # from the second on, of any size
            x = torch.randn(batch, 1, 6, 6)
            y, z = compiled(x), other(x)
            close(y, z, 1e-5)
        y.square().sum().backward(), z.square().sum().backward()
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            close(a.grad, b.grad, 1e-4)
        for a, b in zip(model.buffers(), other.buffers(), strict=True):
            close(a, b, 1e-5)


@pytest.mark.parametrize("size", [np.int64(8), torch.tensor(8)])
def test_other_libraries_integers_are_sizes(size):
    x = torch.randn(20, 4, 2, 2)
    layer = GhostBatchNorm2d(4, size)
    assert type(layer.ghost_size) is int
    expected = GhostBatchNorm2d(4, 8)(x)
    assert torch.equal(layer(x), expected)
    assert torch.equal(ghost_batch_norm(x, None, None, size, layer.weight, layer.bias, training=True), expected)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"interleaved": True}])
def test_a_plain_mean_under_activation_checkpointing_is_the_mean(options):
    """Which ends its second pass once all saved tensors are there: counter and statistics must move together."""
    layer = GhostBatchNorm2d(1, ghost_size=4, momentum=None, **options)
    for mean in range(10):
        x = torch.full((8, 1, 2, 2), float(mean)) + torch.linspace(-0.1, 0.1, 32).view(8, 1, 2, 2)
        checkpoint(layer, x.requires_grad_(), use_reentrant=False).square().sum().backward()
    assert layer.running_mean.item() == pytest.approx(4.5, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_half_precision_under_autocast_to_another(options):
    layer, x = GhostBatchNorm2d(3, ghost_size=4, **options), torch.randn(10, 3, 2, 2).half()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float16
