"""What no rule covers, and batches whose rows are not the examples, are noticed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from batchlab.core.errors import InputError
from batchlab.measure.examples.example_norms import ExampleNorms
from batchlab.measure.examples.per_example import per_example_sq_norms
from batchlab.workloads.models import ByteTransformer
from tests.measure.examples.naive import Called, cross_entropy, ids, make_job, one_by_one, watched_norms

UNCOVERED = {
    "einsum": lambda m, x: torch.einsum("ntd,pd->ntp", x, m.w),
    "a rule's use and another": lambda m, x: F.linear(x, m.w) + torch.einsum("ntd,pd->ntp", x, m.w),
    "computed weight": lambda m, x: F.linear(x, m.w / m.w.norm()),
    "slices that overlap": lambda m, x: F.linear(x, m.w[:3]).sum(-1, keepdim=True) * F.linear(x, m.w[1:]),
    "a slice and the whole": lambda m, x: F.linear(x, m.w[:1]) * F.linear(x, m.w),
    "scaled by frequency": lambda m, x: F.embedding(ids(x), m.w[:6], scale_grad_by_freq=False) * 0 + x @ (m.w * 1),
    "custom function": lambda m, x: Doubled.apply(x, m.w),
}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return 2 * x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * g @ w.T, 2 * x.flatten(0, 1).T @ g.flatten(0, 1)


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_no_rule_covers_is_refused_in_training_and_differentiated_one_by_one_else(name):
    model, x = Called(UNCOVERED[name]), torch.randn(5, 3, 4, dtype=torch.float64)
    x[..., 0] = x[..., 0].abs().clamp(max=0.35)

    def loss(model, batch):
        return model(batch[0]).sin().flatten(1).sum(1).mean()

    with pytest.raises(InputError, match=r"parameters have no exact per-example norm here \(w: "):
        watched_norms(model, loss, [x])
    record = watched_norms(model, loss, [x], strict=False)
    assert "w" in record.uncovered and "w" not in record.by_parameter
    got = per_example_sq_norms(model, loss, [x])
    torch.testing.assert_close(got.values, one_by_one(model, loss, [x]), rtol=1e-10, atol=0)
    assert got.rules["w"] in ("functional", "loop") and "e" not in got.rules


def test_a_use_that_was_missed_once_is_missed_in_every_pass():
    model, x = Called(UNCOVERED["a rule's use and another"]), torch.randn(5, 3, 4, dtype=torch.float64)
    norms = ExampleNorms(model, strict=False)
    for _ in range(10):
        with norms.watch(5) as record:
            model(x).square().mean().backward()
        assert list(record.uncovered) == ["w"]


def test_a_use_that_is_missed_later_is_found_within_eight_passes():
    model, x = Called(lambda m, x: F.linear(x, m.w)), torch.randn(5, 3, 4, dtype=torch.float64)
    norms, found = ExampleNorms(model, strict=False), []
    for step in range(17):
        with norms.watch(5) as record:
            hidden = torch.einsum("ntd,pd->ntp", x, model.w) if step > 8 else 0.0
            (model(x) + hidden).square().mean().backward()
        found.append(list(record.uncovered))
    assert found[:9] == [[]] * 9 and ["w"] in found[9:]


def test_flat_rows_alone_do_not_tell_where_the_examples_are():
    model, x = Called(lambda m, x: F.linear(x.transpose(0, 1).reshape(-1, 4), m.w)), torch.randn(5, 3, 4).double()
    with pytest.raises(InputError, match="no layer's output has the 5 examples as a dimension of its own"):
        watched_norms(model, lambda m, b: m(b[0]).square().mean(), [x])
    got = per_example_sq_norms(model, lambda m, b: m(b[0]).square().mean(), [x])
    torch.testing.assert_close(
        got.values, one_by_one(model, lambda m, b: m(b[0]).square().mean(), [x]), rtol=1e-10, atol=0
    )


def test_reentrant_checkpointing_is_refused():
    model = Called(lambda m, x: checkpoint(lambda x: F.linear(x, m.w), x * m.v, use_reentrant=True))
    for measure in (watched_norms, per_example_sq_norms):
        with pytest.raises(InputError, match="no call that has a rule used it|loss uses reentrant checkpointing"):
            measure(model, lambda m, b: m(b[0]).square().mean(), [torch.randn(5, 3, 4).double()])


@pytest.mark.parametrize("combine", [lambda loss, s: loss * torch.exp(-s) + s, lambda loss, s: loss * (s * 2.0)])
def test_sums_and_products_of_single_numbers_are_no_use_by_examples(combine):
    """As where losses are weighed by their learned uncertainty."""
    model, x = Called(lambda m, x: F.linear(x, m.w, m.v)), torch.randn(5, 3, 4).double()
    model.s = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    loss = lambda m, b: combine(m(b[0]).square().mean(), m.s)  # noqa: E731
    assert list(watched_norms(model, loss, [x], strict=False).uncovered) == ["s"]
    torch.testing.assert_close(
        per_example_sq_norms(model, loss, [x]).values, one_by_one(model, loss, [x]), rtol=1e-10, atol=0
    )


def test_a_missing_use_is_noticed_at_any_size():
    """The seen use is 1,000 times the other; a projection of float64 numbers cannot overlook it."""
    model = Called(lambda m, x: F.linear(x, m.w) + 1e-3 * torch.einsum("ntd,pd->ntp", x, m.w))
    record = watched_norms(model, lambda m, b: m(b[0]).square().mean(), [torch.randn(5, 3, 4).double()], strict=False)
    assert record.uncovered == {"w": "its gradient is not the sum of its uses that were seen"}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [8, 16])
def test_rows_of_a_basis_are_no_examples(rows, frozen):
    """Of a weight that is made from a trained one and a constant: its rows may be as many as the examples."""
    model = Called(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.basis @ m.e[:4]))
    basis = torch.randn(rows, 4, dtype=torch.float64)
    model.register_parameter("basis", nn.Parameter(basis, False)) if frozen else model.register_buffer("basis", basis)
    with pytest.raises(InputError, match="e: no call that has a rule used it"):
        watched_norms(model, lambda m, b: m(b[0]).square().sum(1).mean(), [torch.randn(8, 4).double()])


@pytest.mark.parametrize("length", [4, 6])
def test_rows_that_are_not_the_examples_are_noticed(length):
    """Tokens are picked over the whole batch: as many as examples, by chance, in the first case."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    tokens = torch.randint(9, (4, 5))
    picked = torch.zeros(4, 5, dtype=torch.bool)
    picked.view(-1)[torch.tensor([0, 3, 7, 12, 14, 19][:length])] = True

    def loss(model, batch):
        return model[1](model[0](batch[0])[picked]).square().mean()

    with pytest.raises(InputError, match=r"reaches others|no call that has a rule used it"):
        watched_norms(model, loss, [tokens])


def test_mixed_examples_are_noticed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))

    def loss(model, batch):
        hidden = model[0](batch[0])
        return model[1](hidden - hidden.mean(0)).square().mean()

    with pytest.raises(InputError, match="the gradient of one example reaches others at the linear of 0.weight"):
        watched_norms(model, loss, [torch.randn(5, 4)])
    with pytest.raises(InputError, match="loss must be the mean over independent examples"):
        per_example_sq_norms(model, loss, [torch.randn(5, 4)])


def test_a_loss_that_compares_examples_is_noticed():
    model, x = nn.Linear(4, 3), torch.randn(6, 4)

    def loss(model, batch):
        z = F.normalize(model(batch[0]))
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    with pytest.raises(InputError, match=r"\|g\|² of example \d is .* in the batch and .* alone: give units="):
        per_example_sq_norms(model, loss, [x])


def test_layers_that_mix_examples_or_draw_masks_are_named():
    _, loss, batch = make_job("conv")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(InputError, match="1 normalises over the batch"):
        per_example_sq_norms(model, loss, batch)
    assert per_example_sq_norms(model.eval(), loss, batch).checked
    functional = Called(lambda m, x: F.batch_norm(x.mT, None, None, m.v, training=True))
    with pytest.raises(InputError, match="batch normalisation over the batch was called"):
        per_example_sq_norms(functional, lambda m, b: m(b[0]).mean(), [torch.randn(5, 3, 4).double()])
    model, loss, batch = make_job("lstm")
    model.out = nn.Sequential(nn.Dropout(0.1), model.out)
    with pytest.raises(InputError, match=r"lstm.weight_ih_l0 must be differentiated .* but out.0 draws random numbers"):
        per_example_sq_norms(model, loss, batch)
    assert per_example_sq_norms(model.eval(), loss, batch).checked


def test_the_doubtful_position_table_of_the_bundled_model():
    model = ByteTransformer(8, width=12, layers=1, heads=2).double()
    tokens = torch.randint(256, (8, 9))
    batch = [tokens[:, :-1], tokens[:, 1:]]
    torch.testing.assert_close(
        watched_norms(model, cross_entropy, batch).sq_norms(),
        one_by_one(model, cross_entropy, batch),
        rtol=1e-10,
        atol=0,
    )
