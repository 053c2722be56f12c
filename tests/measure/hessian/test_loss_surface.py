"""Products with the Hessian against explicit ones, for the layers that people use, and what they leave untouched."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.tensor import distribute_module
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from batchlab.core.errors import InputError
from batchlab.measure.hessian.loss_surface import LossSurface
from batchlab.workloads.models import ByteTransformer, ConvNet
from tests.spine.forked import in_ranks

DOUBLE = torch.float64


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def dense(model, loss, pieces, **options):
    """The matrix, by products with unit vectors."""
    surface = LossSurface(model, loss, **options)
    with surface.still():
        return surface.hessian(pieces) @ torch.eye(surface.size, dtype=surface.dtype)


def differences(model, loss, batch, v, step=1e-5):
    """Hv by central differences of first derivatives."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, part in zip(parameters, parts, strict=True):
                p.add_(part, alpha=sign * step)
        gradient = torch.autograd.grad(loss(model, batch), parameters)
        found.append(torch.cat([g.reshape(-1) for g in gradient]))
        with torch.no_grad():
            for p, part in zip(parameters, parts, strict=True):
                p.sub_(part, alpha=sign * step)
    return (found[0] - found[1]) / (2 * step)


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(DOUBLE)


def points(n=7, features=4, classes=3):
    return torch.randn(n, features, dtype=DOUBLE), torch.randint(classes, (n,))


class Classifier(nn.Module):
    """A recurrent one over tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(11, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, tokens):
        return self.out(self.lstm(self.embed(tokens))[0][:, -1])


class Tied(nn.Module):
    """Embedding and output matrix are one."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.norm(torch.tanh(self.embed(tokens))))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(checkpoint(lambda y: torch.tanh(self.layer(y)), x, use_reentrant=False))


class Cube(torch.autograd.Function):
    """Of the common kind: no `setup_context`, no `jvp`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class Cubed(Checkpointed):
    def forward(self, x):
        return self.out(Cube.apply(self.layer(x)))


def next_byte(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


CASES = {
    "mlp": (mlp, cross_entropy, points),
    "group norm": (lambda: ConvNet(1, 8, 10, hidden=8), cross_entropy, lambda: (torch.randn(3, 1, 8, 8), [0, 3, 7])),
    "attention": (
        lambda: ByteTransformer(6, width=8, layers=1, heads=2),
        next_byte,
        lambda: torch.randint(256, (2, 7)),
    ),
    "lstm": (Classifier, cross_entropy, lambda: (torch.randint(11, (4, 5)), torch.randint(3, (4,)))),
    "tied, layer norm": (Tied, cross_entropy, lambda: (torch.randint(9, (5,)), torch.randint(9, (5,)))),
    "checkpointing": (Checkpointed, cross_entropy, points),
    "own function": (Cubed, cross_entropy, points),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)),
        cross_entropy,
        points,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_products_equal_differences_of_gradients(name):
    make, loss, draw = CASES[name]
    model, batch = make().to(DOUBLE), draw()
    if isinstance(batch, tuple):
        x = batch[0].to(DOUBLE) if batch[0].is_floating_point() else batch[0]
        batch = (x, torch.as_tensor(batch[1]))
    surface = LossSurface(model, loss)
    v = torch.randn(surface.size, dtype=DOUBLE)
    with surface.still():
        product = surface.hessian([(batch, 1)]) @ v
        wanted = differences(model, loss, batch, v)
    assert float((product - wanted).norm()) < 1e-6 * float(wanted.norm())
    assert surface.size == sum(p.numel() for p in model.parameters())


def test_the_matrix_equals_the_explicit_hessian():
    model, batch = mlp(), points()
    names = [name for name, _ in model.named_parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    sizes, shapes = [p.numel() for p in model.parameters()], [p.shape for p in model.parameters()]

    def at(theta):
        weights = {n: part.view(s) for n, part, s in zip(names, theta.split(sizes), shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, weights, (batch[0],)), batch[1])

    explicit = torch.autograd.functional.hessian(at, flat)
    torch.testing.assert_close(dense(model, cross_entropy, [(batch, 7)]), explicit, rtol=0, atol=1e-13)


@pytest.mark.parametrize("cuts", [[7], [3, 4], [1, 5, 1], [1] * 7])
def test_ragged_pieces_give_the_hessian_of_the_mean_over_examples(cuts):
    model, (x, y) = mlp(), points()
    pieces = [((a, b), len(a)) for a, b in zip(x.split(cuts), y.split(cuts), strict=True)]
    whole = dense(model, cross_entropy, [((x, y), 7)])
    torch.testing.assert_close(dense(model, cross_entropy, pieces), whole, rtol=1e-12, atol=1e-14)


def test_the_mean_gradient_is_that_of_the_mean_over_examples():
    model, (x, y) = mlp(), points()
    surface = LossSurface(model, cross_entropy)
    with surface.still():
        found = surface.mean_gradient([((x[:5], y[:5]), 5), ((x[5:], y[5:]), 2)])
    wanted = torch.autograd.grad(cross_entropy(model, (x, y)), list(model.parameters()))
    torch.testing.assert_close(found, torch.cat([g.reshape(-1) for g in wanted]), rtol=1e-12, atol=1e-14)


def test_the_kept_graph_changes_no_product():
    model, batch = mlp(), points()
    surface = LossSurface(model, cross_entropy)
    with surface.still():
        H = surface.hessian([(batch, 7)])
        v = torch.randn(surface.size, dtype=DOUBLE)
        first, again = H @ v, H @ v
        fresh = surface.hessian([(batch, 7)]) @ v
    assert torch.equal(first, again) and torch.equal(first, fresh)


def test_frozen_parameters_are_left_out_and_unused_ones_are_zero():
    model, batch = mlp(), points()
    whole = dense(model, cross_entropy, [(batch, 7)])
    model[0].requires_grad_(False)
    torch.testing.assert_close(dense(model, cross_entropy, [(batch, 7)]), whole[30:, 30:], rtol=0, atol=1e-15)
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=DOUBLE)))
    found = dense(model, cross_entropy, [(batch, 7)])
    assert found.shape == (23, 23) and int((found.abs().sum(0) == 0).sum()) >= 2


def test_a_loss_without_curvature_has_a_zero_hessian():
    model = nn.Linear(3, 1).to(DOUBLE)
    x = torch.randn(4, 3, dtype=DOUBLE)
    assert not dense(model, lambda m, x: m(x).mean(), [(x, 4)]).any()
    assert not dense(model, lambda m, x: x.mean(), [(x, 4)]).any()


def test_evaluation_mode_without_dropout_and_examples_alone_in_batch_norm():
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)]
    model, (x, y) = nn.Sequential(*layers).to(DOUBLE).train(), points()
    split = [((x[:2], y[:2]), 2), ((x[2:], y[2:]), 5)]
    whole = dense(model, cross_entropy, [((x, y), 7)])
    torch.testing.assert_close(dense(model, cross_entropy, split), whole, rtol=1e-12, atol=1e-14)


def test_nothing_of_the_callers_is_changed():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).to(DOUBLE)
    model.train()
    model[2].eval()
    cross_entropy(model, points()).backward()
    before, gradients = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    flags, torch_state = [m.training for m in model.modules()], torch.get_rng_state()
    flash = torch.backends.cuda.flash_sdp_enabled()

    def noisy(model, batch):
        return cross_entropy(model, batch) + 0 * torch.rand(())

    dense(model, noisy, [(points(), 7)])
    assert [m.training for m in model.modules()] == flags == [True, True, True, False, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    torch.set_rng_state(torch_state)
    expected = points()
    torch.set_rng_state(torch_state)
    dense(model, noisy, [(expected, 7)])
    assert torch.equal(points()[0], expected[0])


def test_flags_come_back_after_an_error():
    model = mlp().train()
    with pytest.raises(ZeroDivisionError):
        dense(model, lambda model, batch: 1 / 0, [(None, 1)])
    assert all(module.training for module in model.modules())


def test_a_loss_that_draws_numbers_is_one_fixed_function():
    model, batch = mlp(), points()

    def noisy(model, batch):
        return cross_entropy(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))

    matrix = dense(model, noisy, [(batch, 7)], seed=3)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-14)
    assert torch.equal(matrix, dense(model, noisy, [(batch, 7)], seed=3))
    assert not torch.equal(matrix, dense(model, noisy, [(batch, 7)], seed=4))


def test_autocast_around_it_has_no_say():
    model, batch = mlp().float(), points()
    batch = (batch[0].float(), batch[1])
    plain = dense(model, cross_entropy, [(batch, 7)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dense(model, cross_entropy, [(batch, 7)]), plain)
    with torch.no_grad():
        assert torch.equal(dense(model, cross_entropy, [(batch, 7)]), plain)


def test_a_compiled_model_is_measured_uncompiled():
    model, batch = mlp(), points()
    assert torch.equal(
        dense(torch.compile(model, backend="eager"), cross_entropy, [(batch, 7)]),
        dense(model, cross_entropy, [(batch, 7)]),
    )


def test_all_of_curvlinops_works_with_it():
    from curvlinops import hutchpp_trace
    from scipy.sparse.linalg import eigsh

    model, batch = mlp(), points()
    matrix = dense(model, cross_entropy, [(batch, 7)])
    surface = LossSurface(model, cross_entropy)
    with surface.still():
        H = surface.hessian([(batch, 7)])
        largest = eigsh(H.to_scipy(), k=2, which="LA", return_eigenvectors=False)
        total = hutchpp_trace(H, 48)
    assert sorted(largest) == pytest.approx(torch.linalg.eigvalsh(matrix)[-2:].tolist(), rel=1e-9)
    assert float(total) == pytest.approx(float(matrix.trace()), rel=0.5)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


def once(model, batch):
    return F.cross_entropy(Once.apply(model(batch[0])), batch[1])


def flash(model, batch):
    """Asks for the kernel by name, past what the surface chose."""
    q = model(batch[0])[None, None]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, q, q).sin().mean()


def _bad(change):
    model = mlp()
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "loss", "said"),
    [
        (_bad(lambda m: m.requires_grad_(False)), cross_entropy, "no parameter that requires a gradient"),
        (_bad(lambda m: m.to(torch.float16)), cross_entropy, r"got \['torch.float16'\]: half precision"),
        (_bad(lambda m: m.to(torch.bfloat16)), cross_entropy, r"got \['torch.bfloat16'\]: half precision"),
        (_bad(lambda m: m[0].float()), cross_entropy, r"got \['torch.float32', 'torch.float64'\]"),
        (nn.Linear(4, 3, dtype=torch.complex64), cross_entropy, r"got \['torch.complex64'\]"),
        (mlp(), lambda m, b: m(b[0]), r"loss must return a scalar tensor, .* got shape \(7, 3\)"),
        (mlp(), lambda m, b: 1.0, "loss must return a scalar tensor, .* got float"),
        (mlp(), once, "the loss has no second derivative in torch: .* once_differentiable"),
        (mlp(), flash, "the loss has no second derivative in torch: .* is not implemented"),
        ("mlp", cross_entropy, "model must be a torch.nn.Module, got str"),
    ],
)
def test_bad_input_is_refused(model, loss, said):
    with pytest.raises(InputError, match=said):
        dense(model, loss, [(points(), 7)])


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        dense(mlp(), cross_entropy, [(points(features=5), 7)])


def test_sharded_parameters_are_refused(mesh_of_one):
    model = distribute_module(mlp(), mesh_of_one)
    with pytest.raises(InputError, match=r"got sharded ones \(DTensor\)"):
        LossSurface(model, cross_entropy)


def _same_over_ranks(model, batches, wanted):
    import torch.distributed as dist

    wrapped = nn.parallel.DistributedDataParallel(model)
    mine = batches[: 2 if dist.get_rank() == 0 else 0] if len(batches) == 2 else batches[dist.get_rank() :: 2]
    pieces = [(batch, len(batch[0])) for batch in mine]
    found = dense(wrapped, cross_entropy, pieces, group=dist.group.WORLD)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cuts", [[1, 4, 2], [3, 4]])
def test_ranks_give_what_one_process_gives(tmp_path, cuts):
    """Ragged pieces on two ranks; in the second case one rank has no example at all."""
    model, (x, y) = mlp(), points()
    batches = list(zip(x.split(cuts), y.split(cuts), strict=True))
    wanted = dense(model, cross_entropy, [((x, y), 7)])
    assert in_ranks(2, tmp_path, _same_over_ranks, model, batches, wanted) == [0, 0]
    assert math.isfinite(float(wanted.sum()))


def test_within_it_no_product_is_rounded_to_tf32():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        with LossSurface(mlp(), cross_entropy).still():
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
