"""What `watch` leaves as it was, and what it refuses."""

import contextlib
import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from batchlab.core.errors import InputError
from batchlab.measure.examples.example_norms import ExampleNorms, norm_layer_names
from batchlab.measure.examples.per_example import per_example_sq_norms
from tests.measure.examples.naive import cast, make_job, one_by_one, tensors_of, watched_norms


@pytest.mark.parametrize("name", ["gpt", "conv", "vision", "bert sdpa", "lstm"])
def test_watching_changes_no_bit(name):
    model, loss, batch = make_job(name)
    plain, n = copy.deepcopy(model), len(tensors_of(batch)[0])
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    norms = ExampleNorms(model, strict=False)
    for _ in range(3):
        loss(plain, batch).backward()
        with norms.watch(n):
            loss(model, batch).backward()
        for a, b in zip(plain.parameters(), model.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad) and torch.equal(a, b)
    assert all(not p._backward_hooks and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert hooks == {name: len(module._forward_hooks) for name, module in model.named_modules()}


def test_nothing_of_a_pass_outlives_it():
    """The graph, and with it the inputs, are freed with the loss; no collector needs to come."""
    model, loss, batch = make_job("gpt")
    norms, seen = ExampleNorms(model), []
    gc.collect()
    gc.disable()
    try:
        for fails in (False, True, False):
            with contextlib.suppress(KeyError), norms.watch(4):
                hidden = model.tokens(batch[0])
                seen.append(weakref.ref(hidden))
                value = model.out(hidden).sum() + loss(model, batch)
                del hidden
                if fails:
                    raise KeyError
                value.backward()
            del value
        assert [ref() for ref in seen] == [None] * 3
    finally:
        gc.enable()


def test_active_dropout_is_part_of_the_watched_pass():
    """The masks are the graph's own: the norms of the pass that was run."""
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    torch.manual_seed(1)
    record = watched_norms(model, lambda m, b: m(b[0]).mean(), [x])
    torch.manual_seed(1)
    mask = F.dropout(torch.ones(6, 64, dtype=torch.float64), 0.5)
    hidden, back = model[0](x) * mask, model[2].weight * mask
    want = hidden.square().sum(1) + 1 + back.square().sum(1) * (x.square().sum(1) + 1)
    torch.testing.assert_close(record.sq_norms(), want, rtol=1e-10, atol=0)


def test_a_checkpointed_block_runs_as_often_as_without_watching():
    """Twice; once more in the first pass for each row that is sent back."""
    block, last, calls = (
        nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.LayerNorm(6)),
        nn.Linear(6, 3),
        [],
    )
    block[0].register_forward_hook(lambda *_: calls.append(1))
    model, x = nn.Sequential(block, last).double(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    norms = ExampleNorms(model)
    for ran in (4, 2):
        calls.clear()
        with norms.watch(5) as record:
            last(checkpoint(block, x, use_reentrant=False)).square().sum(1).mean().backward()
        assert len(calls) == ran
    want = one_by_one(model, lambda m, b: m(b[0]).square().sum(1).mean(), [x])
    torch.testing.assert_close(record.sq_norms(), want, rtol=1e-10, atol=0)


def test_the_default_device_is_not_asked():
    model, loss, batch = make_job("mlp")
    want = watched_norms(model, loss, batch).sq_norms()
    with torch.device("meta"):
        found = watched_norms(model, loss, batch).sq_norms()
    assert torch.equal(found, want)


def test_chosen_parameters_are_watched_alone():
    model, loss, batch = make_job("gpt")
    whole = watched_norms(model, loss, batch)
    names = norm_layer_names(model)
    assert len(names) == 10 and all("norm" in name for name in names)
    norms = ExampleNorms(model, parameters=names)
    with norms.watch(4) as record:
        loss(model, batch).backward()
    assert list(record.by_parameter) == names
    torch.testing.assert_close(record.sq_norms(), whole.sq_norms(names), rtol=1e-6, atol=0)
    assert (record.sq_norms() < whole.sq_norms()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_norms_are_taken_in_float32(dtype, autocast):
    """Against float32: 64 numbers of 2^-8 relative error each, and no overflow of squares in float16."""
    model, loss, batch = make_job("mlp")
    want = watched_norms(model, loss, batch).sq_norms()
    model.zero_grad()

    def low(model, batch):
        with torch.autocast("cpu", dtype, enabled=autocast):
            return F.cross_entropy(model(batch[0]).float(), batch[1])

    if not autocast:
        model, batch = model.to(dtype), cast(batch, dtype)
    record = watched_norms(model, low, batch)
    torch.testing.assert_close(record.sq_norms(), want, rtol=0.1, atol=0)
    assert all(part.dtype == torch.float32 for part in record.by_parameter.values())
    assert per_example_sq_norms(model, low, batch).checked


def test_nan_and_infinity_stay_with_their_example():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    x[2, 1], x[3, 0] = math.nan, math.inf
    record = watched_norms(model, lambda m, b: m(b[0]).sum(1).mean(), [x])
    assert record.sq_norms().isfinite().tolist() == [True, True, False, False, True]


def test_one_pass_at_a_time():
    model, loss, batch = make_job("mlp")
    norms = ExampleNorms(model)
    with pytest.raises(InputError, match="got two gradients in one watch"), norms.watch(6):
        value = loss(model, batch)
        value.backward(retain_graph=True)
        value.backward()
    with pytest.raises(InputError, match="watch must not be entered twice at once"), norms.watch(6), norms.watch(6):
        pass
    other, alone = ExampleNorms(model), ExampleNorms(make_job("mlp")[0])
    with pytest.raises(InputError, match="another watch .* the same parameters"), norms.watch(6), other.watch(6):
        pass
    with norms.watch(6), pytest.raises(InputError, match="no watched parameter"), alone.watch(6):  # another model's
        loss(model, batch).backward()
    with pytest.raises(InputError, match="no watched parameter got a gradient"), norms.watch(6):
        pass
    value = loss(model, batch)
    with pytest.raises(InputError, match="gave 6 examples.*and the forward pass inside"), norms.watch(6):
        value.backward()
    with pytest.raises(InputError, match="must begin with loss.backward"), norms.watch(6):
        torch.autograd.backward(loss(model, batch))
    with norms.watch(6) as record:
        loss(model, batch).backward()
    assert len(record.by_parameter) == 6


def test_compiled_models_are_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].compile()
    with pytest.raises(InputError, match="0 is compiled"):
        ExampleNorms(model)


def test_a_backward_pass_under_autocast_too_has_norms_of_float32():
    model, loss, batch = make_job("mlp")
    with ExampleNorms(model).watch(6) as record, torch.autocast("cpu", torch.bfloat16):
        loss(model, batch).backward()
    assert {norms.dtype for norms in record.by_parameter.values()} == {torch.float32}
    torch.testing.assert_close(record.sq_norms(), one_by_one(model, loss, batch), rtol=0.1, atol=1e-3)
