"""The way of ghosts on a CPU, alone and together, against nn.BatchNorm on each; and what takes another way."""

import contextlib
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.nn import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    convert_plain_batchnorm,
    ghost_batch_norm,
    ghost_batchnorm,
    ghost_cpu,
)
from tests.nn.test_ghost_batchnorm import KINDS, LAST, chunks, close, inputs, pair, reference, same

WAYS = {  # _ALONE, _MANY, _TOGETHER
    "alone": (0, 8, 2**18),
    "together": (2**14, 2, 2**18),
    "by threes": (2**14, 2, 3 * 4 * 3 * 12),
}


@pytest.fixture(params=[*WAYS, "in C"])
def way(request, monkeypatch):
    if request.param == "in C":
        monkeypatch.setattr(ghost_batchnorm, "ghosts_on_cpu", ghost_batchnorm.ghosts_in_c)
        return request.param
    for name, value in zip(("_ALONE", "_MANY", "_TOGETHER"), WAYS[request.param], strict=True):
        monkeypatch.setattr(ghost_cpu, name, value)
    return request.param


def goes_here(y):
    return type(y.grad_fn).__name__ in ("_GhostsBackward", "_GhostsInCBackward")


def by_hand(x, weight=None, bias=None, size=4):
    return torch.cat([F.batch_norm(part, None, None, weight, bias, True) for part in x.split(size)])


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("batch", [40, 42, 41])
def test_each_ghost_is_batchnorm(way, dims, last, batch):
    ours, theirs = pair(dims, 4)
    x = inputs(batch, dims)
    if last and dims in LAST:
        x = x.to(memory_format=LAST[dims])
    same(ours, theirs, x, chunks(batch, 4, dims == 1))
    given = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = ours(given)
    assert goes_here(y) and y.stride() == x.stride()
    assert torch.autograd.grad(y, given, torch.randn_like(y))[0].stride() == x.stride()


@pytest.mark.parametrize("momentum", [0.3, 1.0, 0.0, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_settings_of_batchnorm(way, momentum, affine, tracks):
    ours, theirs = pair(3, 4, momentum, affine, tracks, ragged="merge")
    same(ours, theirs, inputs(43, 3), [list(range(i, i + 4)) for i in range(0, 36, 4)] + [list(range(36, 43))])


def test_weight_or_bias_alone(way):
    x = inputs(40, 2).requires_grad_()
    p = torch.randn(3, dtype=torch.float64, requires_grad=True)
    for affine in ((p, None), (None, p)):
        y, z = ghost_batch_norm(x, None, None, 4, *affine, training=True), by_hand(x, *affine)
        assert goes_here(y)
        close(y, z)
        for mine, other in zip(*(torch.autograd.grad(out.square().sum(), (x, p)) for out in (y, z)), strict=True):
            close(mine, other, 1e-11)


def test_gradients_that_nobody_wants_are_none(way):
    x = inputs(40, 3)
    weight, bias = (torch.randn(3, dtype=torch.float64) for _ in range(2))
    for wanted in ((x,), (weight,), (bias,), (x, bias)):
        for t in (x, weight, bias):
            t.requires_grad_(any(t is w for w in wanted))
        y = ghost_batch_norm(x, None, None, 4, weight, bias, training=True)
        ours = torch.autograd.grad((y**3).sum(), wanted)
        theirs = torch.autograd.grad((by_hand(x, weight, bias) ** 3).sum(), wanted)
        for mine, other in zip(ours, theirs, strict=True):
            close(mine, other, 1e-11)
    with torch.no_grad():
        close(ghost_batch_norm(x, None, None, 4, weight, bias, training=True), by_hand(x, weight, bias))


@pytest.mark.parametrize("last", [False, True])
def test_gradients_of_other_layouts_come_back(way, last):
    x = inputs(40, 3).to(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    other = torch.randn(x.shape, dtype=x.dtype).to(
        memory_format=torch.contiguous_format if last else torch.channels_last
    )
    for dy in (other, torch.randn(1, 1, 1, 1, dtype=x.dtype).expand_as(x), other.flip(0)[:, :, ::1]):
        ours, theirs = (torch.autograd.grad(f(x), x, dy)[0] for f in (norm, by_hand))
        close(ours, theirs)
        assert ours.stride() == x.stride()


def norm(x, weight=None, bias=None, size=4, **more):
    return ghost_batch_norm(x, None, None, size, weight, bias, training=True, **more)


def test_second_derivatives(way):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((6, 2, 2), (2,), (2,))
    )
    f = partial(norm, size=2)
    assert goes_here(f(x, weight, bias))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda w: f(x.detach(), w), weight)


def test_second_derivatives_through_what_comes_before():
    x = inputs(40, 1)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for f in (norm, by_hand):
        (g,) = torch.autograd.grad((f(x @ weight) ** 3).mean(), weight, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), weight)[0])
    close(*found, 1e-10)


def test_many_gradients_at_once(way):
    x = inputs(16, 1).requires_grad_()
    weight = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    found = []
    for f in (partial(norm, size=2), partial(by_hand, size=2)):
        y = f(x, weight)
        dy = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
        found.append(torch.autograd.grad(y, (x, weight), dy, is_grads_batched=True, retain_graph=True))
        found.append(vmap(partial(torch.autograd.grad, y, (x, weight), retain_graph=True))(dy))
    for ours, batched, theirs, _ in zip(*found, strict=True):
        close(ours, theirs)
        close(batched, theirs)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("last", [False, True])
def test_far_from_zero_it_is_as_exact_as_the_input(way, dims, last):
    """Single precision, means 1000 standard deviations from zero; Σx²/n - μ² would be off by a tenth."""
    x = (inputs(400, dims, dtype=torch.float32) - 5) / 2 + 1e3
    if last and dims in LAST:
        x = x.to(memory_format=LAST[dims])
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for f, given in ((norm, x), (by_hand, x.double())):
        given = given.clone(memory_format=torch.preserve_format).requires_grad_()
        y = f(given, size=40)
        found.append((y.double(), torch.autograd.grad(y, given, dy.to(y.dtype))[0].double()))
    for ours, exact in zip(*found, strict=True):
        close(ours, exact, 4 * 1e3 * torch.finfo(torch.float32).eps)


def test_alone_it_is_batchnorm_bit_for_bit(monkeypatch):
    monkeypatch.setattr(ghost_cpu, "_ALONE", 0)
    ours, theirs = GhostBatchNorm2d(3, 4), nn.BatchNorm2d(3)
    x = inputs(42, 3, dtype=torch.float32).requires_grad_()
    y, z = ours(x), reference(theirs, x, chunks(42, 4, False))
    assert goes_here(y) and torch.equal(y, z)
    dy = torch.randn(x.shape)
    assert torch.equal(*(torch.autograd.grad(out, x, dy)[0] for out in (y, z)))
    assert torch.equal(ours.running_mean, theirs.running_mean) and torch.equal(ours.running_var, theirs.running_var)


def test_what_is_not_finite_stays_in_its_ghost_and_channel(way):
    x = inputs(40, 3)
    x[5, 1, 0, 0], x[6, 2, 0, 0] = float("nan"), float("inf")
    layer = GhostBatchNorm2d(3, 4).double()
    x.requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn(x.shape, dtype=x.dtype))
    bad = torch.zeros(40, 3, dtype=torch.bool)
    bad[4:8, 1:] = True
    for t in (y, dx):
        assert torch.equal(t.isnan().flatten(2).all(2), bad) and torch.equal(t.isnan().flatten(2).any(2), bad)
    assert layer.running_mean.isfinite().tolist() == [True, False, False]


def test_an_input_changed_before_the_backward_pass_is_an_error(way):
    x = inputs(40, 1).requires_grad_()
    moved = x * 1
    y = norm(moved)
    moved.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_thresholds_as_they_stand():
    """Ghosts of few numbers together, in more than one round; of many alone; a ragged one after either."""
    for shape, size in (((330, 5), 16), ((20_000, 16), 64), ((300, 70, 2, 4), 32), ((90, 64, 2, 2), 10)):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        dy = torch.randn(shape, generator=generator, dtype=torch.float64)
        y, z = norm(x, size=size), by_hand(x, size=size)
        assert goes_here(y)
        close(y, z)
        close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, z)))


def test_autocast_leaves_statistics_in_single_precision():
    for size, goes in ((4, True), (4, False)):
        found = []
        for on in (False, True):
            layer, x = GhostBatchNorm1d(3, size), inputs(40, 1, dtype=torch.float32)
            given = x if goes else x.bfloat16()
            with torch.autocast("cpu", dtype=torch.bfloat16) if on else contextlib.nullcontext():
                y = layer(given)
            assert goes_here(y) is goes and y.dtype is given.dtype
            found.append([y, layer.running_mean, layer.running_var])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


def test_what_it_does_not_take_goes_another_way_to_the_same_result():
    x = inputs(40, 3).requires_grad_()
    wide = torch.randn(40, 3, 2, 6, dtype=torch.float64).requires_grad_()
    for given in (wide[..., ::2], x.transpose(2, 3), x.half(), x.bfloat16()):
        y = norm(given)
        assert not goes_here(y)
        assert torch.equal(y, by_hand(given)) or given.dtype is torch.float64
        close(y, by_hand(given), 1e-12 if given.dtype is torch.float64 else 0)
    for more in ({"loop": True}, {"loop": False}, {"interleaved": True}, {"size": 40}):
        assert not goes_here(norm(x, **more))
    mixed = ghost_batch_norm(x.detach().bfloat16(), None, None, 4, torch.ones(3), torch.zeros(3), True)
    assert mixed.dtype is torch.bfloat16
    assert norm(torch.empty(40, 3, 2, 3, device="meta")).shape == (40, 3, 2, 3)
    with FakeTensorMode():
        assert norm(torch.empty(40, 3, 2, 3)).shape == (40, 3, 2, 3)


def test_transforms_and_forward_mode_go_another_way_to_the_same_result():
    layer = GhostBatchNorm1d(3, 4, track_running_stats=False).double()
    parameters, x = dict(layer.named_parameters()), inputs(40, 1)
    v = torch.randn_like(x)

    def loss(x):
        return (functional_call(layer, parameters, (x,)) ** 3).sum()

    def plain(x):
        return (by_hand(x) ** 3).sum()

    close(grad(loss)(x), grad(plain)(x), 1e-10)
    close(jvp(loss, (x,), (v,))[1], jvp(plain, (x,), (v,))[1], 1e-10)
    stacked = torch.stack([x, 2 * x, v])
    close(vmap(loss)(stacked), torch.stack([plain(each) for each in stacked]), 1e-10)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, v))).tangent
    close(tangent, jvp(plain, (x,), (v,))[1], 1e-10)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_has_the_layers_calls():
    x = inputs(40, 1)
    close(torch.jit.trace(norm, (x,), check_trace=False)(2 * x + 1), by_hand(2 * x + 1))


def test_every_kind_of_layer_goes_here():
    for dims, (ghost, _) in KINDS.items():
        x = inputs(16, dims, dtype=torch.float32)
        assert goes_here(ghost(3, 8)(x))


FUSED = pytest.mark.parametrize("fused", [False, True])


@FUSED
@pytest.mark.parametrize("shape", [(32, 128, 8, 8), (16, 2, 32, 32), (16, 5, 2, 2)])
def test_another_number_of_channels_is_refused(fused, shape):
    with pytest.raises(InputError, match=r"weight must be of shape \(\d+,\), as the input has channels, got \(3,\)"):
        GhostBatchNorm2d(3, 4, fused=fused)(torch.randn(shape))
    with pytest.raises(InputError, match="input must be"):
        ghost_batch_norm(torch.randn(8), None, None, 4, training=True, fused=fused)
    with pytest.raises(InputError, match="running_var must be of shape"):
        ghost_batch_norm(torch.randn(8, 3), torch.zeros(3), torch.ones(4), 4, training=True, fused=fused)


@FUSED
def test_parameters_and_statistics_may_be_columns(fused):
    x, table, stats = inputs(16, 1), inputs(3, 1), [torch.rand(3, 2, dtype=torch.float64) for _ in range(2)]
    ends = []
    for columns in (True, False):
        given = [t if columns else t.contiguous() for t in (table[0:3, 0], table[0:3, 1])]
        runs = [t.clone()[:, 0] if columns else t[:, 0].clone() for t in stats]
        ends.append([ghost_batch_norm(x, *runs, 4, *given, training=True, fused=fused), *runs])
    for one, other in zip(*ends, strict=True):
        close(one, other)


@pytest.mark.parametrize("kind", [torch._neg_view, lambda dy: torch._efficientzerotensor(dy.shape, dtype=dy.dtype)])
@FUSED
def test_gradients_that_are_not_what_lies_in_memory(fused, kind):
    x, dy = inputs(16, 3).requires_grad_(), kind(torch.ones(inputs(16, 3).shape, dtype=torch.float64))
    (ours,) = torch.autograd.grad(norm(x, fused=fused), x, dy)
    (theirs,) = torch.autograd.grad(by_hand(x), x, dy.clone() if not dy._is_zerotensor() else torch.zeros_like(x))
    close(ours, theirs)


@pytest.mark.parametrize("bring_back", [lambda t: t.float(), lambda t: t.mT.contiguous().mT if t.ndim > 1 else t])
@FUSED
def test_what_was_saved_may_be_brought_back_otherwise(fused, bring_back):
    x = inputs(16, 3).requires_grad_()
    dy = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, bring_back):
        y = norm(x, fused=fused)
    try:
        (ours,) = torch.autograd.grad(y, x, dy)
    except RuntimeError as error:  # an error is right too where the dtype is another
        assert "dtype" in str(error) or "scalar type" in str(error) or "Float" in str(error)
        return
    (theirs,) = torch.autograd.grad(by_hand(x), x, dy)
    close(ours, theirs, 1e-5)


def test_a_single_example_a_part_has_its_own_gradient():
    """PyTorch's gradient of a batch of one with odd strides is wrong; one call for all ghosts makes such batches."""
    x = torch.randn(5, 1, 1, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    dy = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (ours,) = torch.autograd.grad(norm(x, size=1, loop=False), x, dy)
    (theirs,) = torch.autograd.grad(by_hand(x, size=1), x, dy)
    close(ours, theirs)


def test_a_traced_call_is_not_in_c():
    from torch.fx.experimental.proxy_tensor import make_fx

    x = inputs(16, 1)
    traced = make_fx(partial(norm, fused=True))(x)
    close(traced(x * 2 + 1), norm(x * 2 + 1))


def test_a_layer_pickled_before_it_could_be_fused():
    layer = GhostBatchNorm1d(3, 4)
    del layer.__dict__["fused"]
    layer(torch.randn(8, 3)), repr(layer)
    assert type(convert_plain_batchnorm(layer)) is nn.BatchNorm1d


@FUSED
def test_many_places_are_summed_as_exactly_as_few(fused):
    x = torch.randn(4, 2, 2**20, generator=torch.Generator().manual_seed(0)) * 0.1 + 10
    y = ghost_batch_norm(x, None, None, 2, training=True, fused=fused)
    exact = by_hand(x.double(), size=2)
    assert (y.double() - exact).abs().max() < 4 * 100 * torch.finfo(torch.float32).eps
