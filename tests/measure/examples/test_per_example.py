"""`per_example_sq_norms` equals the naive computation, whatever the model."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.examples.example_norms import ExampleNorms
from batchlab.measure.examples.per_example import per_example_sq_norms
from tests.measure.examples.naive import (
    DTYPES,
    JOBS,
    RTOL,
    LSTMClassifier,
    TiedGPT,
    bert,
    by_loop,
    by_vmap,
    cast,
    make_job,
    one_by_one,
    watched_norms,
)


@DTYPES
@pytest.mark.parametrize("name", JOBS)
def test_it_equals_vmap_of_grad(name, dtype):
    model, loss, batch = make_job(name)
    model, batch = model.to(dtype), cast(batch, dtype)
    got = per_example_sq_norms(model, loss, batch)
    want = by_vmap(model, loss, batch) if name != "lstm" or dtype == torch.float32 else by_loop(model, loss, batch)
    torch.testing.assert_close(got.values, sum(want.values()), rtol=RTOL[dtype], atol=0)
    assert got.values.dtype == torch.float64 and got.checked and got.by_parameter.keys() == want.keys()
    for key, square in got.by_parameter.items():  # a key bias has no gradient but rounding
        torch.testing.assert_close(square.double(), want[key], rtol=10 * RTOL[dtype], atol=1e-5 * RTOL[dtype])
    functional = {key for key, rule in got.rules.items() if rule in ("functional", "loop")}
    assert functional == ({key for key in want if "lstm" in key} if name == "lstm" else set())
    assert got.loss == pytest.approx(loss(model, batch).item(), rel=RTOL[dtype])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert_with_padded_examples(attention):
    """Its masks have no batching rule: against n backward passes."""
    model, loss, batch = bert(attention)
    batch["mask"] = (torch.arange(10) < torch.tensor([10, 7, 9, 4])[:, None]).long()
    got, want = per_example_sq_norms(model.double(), loss, batch), one_by_one(model, loss, batch)
    torch.testing.assert_close(got.values, want, rtol=1e-10, atol=0)
    assert got.checked and not set(got.rules.values()) & {"functional", "loop"}


@pytest.mark.parametrize("make", [LSTMClassifier, TiedGPT])
def test_a_mean_over_tokens_weighs_examples_by_their_tokens(make):
    model = make().double()
    tokens = torch.randint(1, 20, (5, 12))
    counts = torch.tensor([12, 3, 7, 1, 12])
    tokens[torch.arange(12) >= counts[:, None]] = 0

    def loss(model, batch):
        logits, mask = model(batch[0]), batch[0] != 0
        each = logits.square().sum(-1)
        each = each[:, None].expand_as(mask) if each.ndim == 1 else each
        return (each * mask).sum() / mask.sum()

    with pytest.raises(InputError, match="loss must be the mean over independent examples, but .* give units="):
        per_example_sq_norms(model, loss, [tokens])
    got = per_example_sq_norms(model, loss, [tokens], units=lambda batch: int((batch[0] != 0).sum()))
    weights = counts.double() * 5 / counts.sum()
    torch.testing.assert_close(got.values, one_by_one(model, loss, [tokens]) * weights**2, rtol=1e-10, atol=0)


def test_the_function_leaves_all_as_it_was():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.InstanceNorm1d(4, track_running_stats=True, affine=True))
    model[0].weight.grad = torch.ones(4, 4)
    x = torch.randn(3, 4, 4)
    before, kept, state = copy.deepcopy(model.state_dict()), model[0].weight.grad, torch.get_rng_state()
    got = per_example_sq_norms(model, lambda m, b: m(b[0]).square().mean() + m[0](b[0]).mean(), [x])
    assert not got.checked and got.notes == ("not checked against single examples",)
    assert model[0].weight.grad is kept and kept.eq(1).all() and model[0].bias.grad is None and model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_a_buffer_that_a_forward_pass_replaces_is_as_it_was():
    class Counting(nn.Linear):
        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x)

    model = Counting(4, 3)
    model.register_buffer("calls", torch.zeros(()))
    kept = model.calls
    per_example_sq_norms(model, lambda m, b: m(b[0]).square().mean(), [torch.randn(5, 4)])
    assert model.calls is kept and kept == 0


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=40)
def test_any_sizes(examples, positions, inputs, outputs, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.Linear(outputs, 2)).double()
    x = torch.randn(examples, positions, inputs, dtype=torch.float64)

    def loss(model, batch):
        return model(batch[0]).exp().flatten(1).sum(1).mean()

    got = per_example_sq_norms(model, loss, [x])
    torch.testing.assert_close(got.values, one_by_one(model, loss, [x]), rtol=1e-9, atol=1e-20)


@given(st.permutations(range(6)), st.floats(0.25, 4.0))
@settings(max_examples=10)
def test_order_and_scale(order, factor):
    model, loss, batch = make_job("conv")
    batch = [torch.cat([t, t[:1]]) for t in batch]
    whole = watched_norms(model, loss, batch).sq_norms()
    with ExampleNorms(model).watch(6, scale=6 / factor) as record:
        (factor * loss(model, [t[list(order)] for t in batch])).backward()
    torch.testing.assert_close(record.sq_norms(), whole[list(order)], rtol=1e-4, atol=0)


def test_the_mean_of_the_gradients_is_bounded_by_the_norms():
    """|g|² ≤ mean |g_i|², and tr(Σ) = n/(n-1)·(mean |g_i|² - |g|²) is that of the gradients themselves."""
    model, loss, batch = make_job("mlp")
    model, batch = model.double(), cast(batch, torch.float64)
    record = watched_norms(model, loss, batch)
    big = sum(p.grad.square().sum() for p in model.parameters())
    gradients = []
    for i in range(6):
        value = loss(model, [t[i : i + 1] for t in batch])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    trace = torch.stack(gradients).var(0).sum()
    torch.testing.assert_close((record.sq_norms().mean() - big) * 6 / 5, trace, rtol=1e-10, atol=0)


def test_float32_sums_of_a_million_terms_keep_their_digits():
    model, x = nn.Linear(1024, 1024, bias=False), torch.randn(2, 600, 1024)
    record = watched_norms(model, lambda m, b: m(b[0]).square().mean(), [x])
    double = copy.deepcopy(model).double()
    want = one_by_one(double, lambda m, b: m(b[0]).square().mean(), [x.double()])
    torch.testing.assert_close(record.sq_norms(), want, rtol=1e-6, atol=0)


def test_frozen_and_unused_parameters():
    model, loss, batch = make_job("mlp")
    model[0].requires_grad_(False)
    model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    got = per_example_sq_norms(model, loss, batch)
    assert set(got.by_parameter) == {"2.weight", "2.bias", "4.weight", "4.bias"}
    torch.testing.assert_close(got.values, one_by_one(model, loss, batch), rtol=1e-5, atol=0)


def test_a_recurrent_layer_without_a_batching_rule_goes_one_by_one():
    model = LSTMClassifier()
    model.lstm = nn.GRU(6, 7, batch_first=True)
    _, loss, batch = make_job("lstm")
    got = per_example_sq_norms(model, loss, batch)
    torch.testing.assert_close(got.values, one_by_one(model, loss, batch), rtol=1e-5, atol=0)
    assert got.rules["lstm.weight_ih_l0"] == "loop" and got.rules["out.weight"] in ("ghost", "instantiated")
    assert got.gradient_bytes == 4 * sum(p.numel() for p in model.lstm.parameters())
    assert got.notes[0].startswith("torch.func could not be used: RuntimeError: ")


@pytest.mark.parametrize("memory", [1, 3000, 10**6])
def test_the_fallback_holds_no_more_gradients_than_it_may(memory):
    model, loss, batch = make_job("lstm")
    got, one = (
        per_example_sq_norms(model, loss, batch, memory_bytes=memory),
        4 * sum(p.numel() for p in model.lstm.parameters()),
    )
    assert got.gradient_bytes == one * max(1, min(5, memory // one)) and got.memory_bytes == memory
    torch.testing.assert_close(got.values, one_by_one(model, loss, batch), rtol=1e-5, atol=0)


def test_bad_input():
    model, loss, batch = make_job("mlp")
    for wrong in (0, -1, True, 2.0):
        with pytest.raises(InputError, match=f"examples must be an integer of at least 1, got {wrong}"):
            per_example_sq_norms(model, loss, batch, examples=wrong)
        with pytest.raises(InputError, match="memory_bytes must be an integer of at least 1"):
            per_example_sq_norms(model, loss, batch, memory_bytes=wrong)
    with pytest.raises(InputError, match="scale must be finite, got nan"), ExampleNorms(model).watch(6, scale=math.nan):
        pass
    with pytest.raises(InputError, match="parameters must name parameters .* got 'no.such'"):
        ExampleNorms(model, parameters=["no.such"])
    with pytest.raises(InputError, match="batch holds no tensor that tells how many examples"):
        per_example_sq_norms(model, loss, {"x": 3})
    with pytest.raises(InputError, match="loss must return a scalar tensor"):
        per_example_sq_norms(model, lambda m, b: m(b[0]), batch)
    with pytest.raises(InputError, match="loss must return a scalar tensor"):
        per_example_sq_norms(model, lambda m, b: 1.0, batch)
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        per_example_sq_norms(nn.ReLU(), loss, batch)
    with pytest.raises(InputError, match="units must give counts"):
        per_example_sq_norms(model, loss, batch, units=lambda b: 0)
    with pytest.raises(InputError, match="complex parameters are not defined here, got weight"):
        per_example_sq_norms(nn.Linear(2, 2, dtype=torch.complex64), loss, batch)
