import contextlib
import copy
import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from batchlab.core.errors import InputError
from batchlab.measure.examples.example_norms import ExampleNorms, norm_layer_names
from batchlab.measure.examples.per_example import per_example_sq_norms
from batchlab.workloads.models import ByteTransformer

RTOL = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


class TiedGPT(nn.Module):
    """A decoder with learned positions from arange, attention masks, and one matrix at both ends."""

    def __init__(self, vocabulary=50, width=16, context=12, layers=2):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        block = nn.TransformerEncoderLayer(width, 2, 32, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, tokens):
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.positions(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, src_mask=mask)
        return self.out(self.norm(x))


class LSTMClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.lstm, self.out = nn.Embedding(20, 6), nn.LSTM(6, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, tokens):
        return self.out(self.lstm(self.tokens(tokens))[0][:, -1])


class Vision(nn.Module):
    """A class token, positions as a bare parameter, layer scale, and a cross-attention to the image's own patches."""

    def __init__(self, width=8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 9, width))
        self.scale, self.attention = nn.Parameter(torch.rand(width)), nn.MultiheadAttention(width, 2, batch_first=True)
        self.out = nn.Linear(width, 5)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions[:, : x.shape[1] + 1]
        x = x + self.scale * self.attention(x, x.tanh(), x.tanh(), need_weights=False)[0]
        return self.out(x[:, 0])


def cross_entropy(model, batch):
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def _job(name):
    """Model, loss and batch of float32 numbers."""
    if name == "mlp":
        model = nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
        return model, cross_entropy, [torch.randn(6, 7), torch.randint(3, (6,))]
    if name == "conv":
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True)]
        layers += [
            nn.Conv2d(8, 8, 3, stride=2, groups=4),
            nn.GroupNorm(4, 8),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(72, 4),
        ]
        return nn.Sequential(*layers), cross_entropy, [torch.randn(5, 3, 8, 8), torch.randint(4, (5,))]
    if name.startswith("gpt"):
        n = 12 if name == "gpt, as many tokens as examples" else 4
        tokens = torch.randint(50, (n, 13))
        return TiedGPT(), cross_entropy, [tokens[:, :-1], tokens[:, 1:]]
    if name == "vision":
        return Vision(), cross_entropy, [torch.randn(5, 3, 8, 8), torch.randint(5, (5,))]
    if name == "lstm":
        return LSTMClassifier(), cross_entropy, [torch.randint(20, (5, 9)), torch.randint(3, (5,))]
    return _bert(name.removeprefix("bert "))


def _bert(attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
    )
    model = transformers.BertForMaskedLM(config)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    ids, labels = torch.randint(1, 40, (2, 4, 10))

    def loss(model, batch):
        logits = model(input_ids=batch["ids"], attention_mask=batch.get("mask")).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    return model, loss, {"ids": ids, "labels": labels}


JOBS = ["mlp", "conv", "gpt", "gpt, as many tokens as examples", "vision", "bert eager", "bert sdpa", "lstm"]


def _cast(batch, dtype):
    if isinstance(batch, dict):
        return {key: _cast(value, dtype) for key, value in batch.items()}
    if isinstance(batch, list):
        return [_cast(value, dtype) for value in batch]
    return batch.to(dtype) if batch.is_floating_point() else batch


def _tensors(batch):
    return list(batch.values()) if isinstance(batch, dict) else batch


def _like(batch, tensors):
    return dict(zip(batch, tensors, strict=True)) if isinstance(batch, dict) else list(tensors)


class Objective(nn.Module):
    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch):
        return self.loss(self.model, batch)


def by_vmap(model, loss, batch):
    """|g_i|² by parameter from `vmap(grad)`."""
    objective = Objective(model, loss)
    parameters = {name: p.detach() for name, p in objective.named_parameters() if p.requires_grad}

    def of(parameters, tensors):
        return functional_call(objective, parameters, (_like(batch, [t[None] for t in tensors]),))

    found = vmap(grad(of), in_dims=(None, 0))(parameters, _tensors(batch))
    return {k.removeprefix("model."): g.double().flatten(1).square().sum(1) for k, g in found.items()}


def by_loop(model, loss, batch):
    """The same from n backward passes: for what has no batching rule, as an LSTM of float64."""
    names, parameters = zip(*((k, p) for k, p in model.named_parameters() if p.requires_grad), strict=True)
    rows = []
    for i in range(len(_tensors(batch)[0])):
        value = loss(model, _like(batch, [t[i : i + 1] for t in _tensors(batch)]))
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        rows.append([0.0 if g is None else g.double().square().sum().item() for g in gradients])
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64).T, strict=True))


def one_by_one(model, loss, batch):
    """|g_i|² over all parameters, from n backward passes."""
    return sum(by_loop(model, loss, batch).values())


@DTYPES
@pytest.mark.parametrize("name", JOBS)
def test_it_equals_vmap_of_grad(name, dtype):
    model, loss, batch = _job(name)
    model, batch = model.to(dtype), _cast(batch, dtype)
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
    model, loss, batch = _bert(attention)
    batch["mask"] = (torch.arange(10) < torch.tensor([10, 7, 9, 4])[:, None]).long()
    got, want = per_example_sq_norms(model.double(), loss, batch), one_by_one(model, loss, batch)
    torch.testing.assert_close(got.values, want, rtol=1e-10, atol=0)
    assert got.checked and not set(got.rules.values()) & {"functional", "loop"}


LAYERS = {
    "linear without leading dims": (lambda: nn.Linear(4, 3), (4,)),
    "linear with two": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "long and narrow: the gradient is the cheaper": (lambda: nn.Linear(4, 3), (40, 4)),
    "a gram in halves": (lambda: nn.Linear(260, 260), (128, 260)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2, groups=2), (4, 11)),
    "conv1d valid": (lambda: nn.Conv1d(4, 6, 3, padding="valid", stride=2), (4, 11)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 5, 6)),
    "conv2d reflect, uneven": (lambda: nn.Conv2d(4, 2, (3, 2), (2, 1), (1, 0), padding_mode="reflect"), (4, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 2), (1, 2, 1), 1, (2, 1, 1), 2), (2, 5, 6, 4)),
    "layer norm": (lambda: nn.LayerNorm((3, 4)), (5, 3, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), (5, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 3)),
    "instance norm by statistics": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(),
        (4, 3, 3),
    ),
    "batch norm by statistics": (lambda: nn.BatchNorm1d(4).eval(), (4, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_rules(name):
    make, shape = LAYERS[name]
    layer = make().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(7, *shape, dtype=torch.float64)

    def loss(model, batch):
        return model(batch[0]).sin().flatten(1).sum(1).mean()

    got = per_example_sq_norms(layer, loss, [x])
    torch.testing.assert_close(got.values, one_by_one(layer, loss, [x]), rtol=1e-10, atol=1e-12)
    assert not set(got.rules.values()) & {"functional", "loop"}
    small = per_example_sq_norms(layer, loss, [x], memory_bytes=1)
    torch.testing.assert_close(small.values, got.values, rtol=1e-12, atol=0)


class Called(nn.Module):
    """Parameters w [4, 4], v [4] and e [6, 4], and a function of them and the input."""

    def __init__(self, function):
        super().__init__()
        self.w, self.v, self.e = (nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((4, 4), (4,), (6, 4)))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def _ids(x):
    return (x[..., 0].abs() * 10).long() % 6


COVERED = {
    "the same matrix twice": lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w),
    "and once transposed": lambda m, x: F.linear(x, m.w).tanh() @ m.w + (x @ m.w.t()).cos() @ m.w.mT,
    "addmm of flat rows": lambda m, x: torch.addmm(m.v, x.reshape(-1, 4), m.w).view_as(x) * m.v,
    "an embedding at both ends": lambda m, x: F.linear(F.embedding(_ids(x), m.e) + x, m.e),
    "an embedding twice at both ends": lambda m, x: F.linear(
        F.embedding(_ids(x), m.e) * x + F.embedding(_ids(x).flip(1), m.e), m.e
    ),
    "two outputs and an embedding": lambda m, x: F.linear(F.embedding(_ids(x), m.e) * x, m.e) * F.linear(x, m.e),
    "padding": lambda m, x: F.embedding(_ids(x), m.e, padding_idx=2) * x,
    "positions": lambda m, x: F.linear(x, m.w) + F.embedding(torch.arange(x.shape[1]), m.e),
    "positions for a batch of one": lambda m, x: x + F.embedding(torch.arange(x.shape[1])[None], m.e),
    "positions, twice added": lambda m, x: (lambda p: (x + p).tanh() + p)(F.embedding(torch.arange(x.shape[1]), m.e)),
    "a slice": lambda m, x: (F.linear(x, m.w) + m.e[: x.shape[1]]).tanh() * m.v,
    "slices that lie apart": lambda m, x: F.linear(x, m.w[:1]) * F.linear(x.tanh(), m.w[1:3]).sum(-1, keepdim=True),
    "chunks": lambda m, x: (lambda a, b: F.linear(x, a) * F.linear(x.cos(), b))(*m.w.chunk(2)),
    "added, subtracted, multiplied": lambda m, x: (m.v - x).tanh() * m.v + (x - m.v).sin() + (m.v + x) * m.v,
    "split by name": lambda m, x: F.linear(x, m.w.split(split_size=2, dim=0)[1]) * F.linear(x, m.w.chunk(2, 0)[0]),
    "in place": lambda m, x: x.clone().add_(m.v).tanh(),
    "sequence first": lambda m, x: F.layer_norm(F.linear(x.transpose(0, 1), m.w, m.v), (4,), m.v).transpose(0, 1),
    "not contiguous": lambda m, x: F.linear(x.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2], m.w[:, ::2][:2]),
    "an output that is not used": lambda m, x: (F.linear(x, m.w), F.linear(x.tanh(), m.w))[1],
    "checkpointed": lambda m, x: checkpoint(lambda x: F.linear(x, m.w).tanh(), x, use_reentrant=False) * m.v,
    "no gradient for some": lambda m, x: F.linear(x, m.w) + F.linear(x, m.w.detach()),
}


@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize("name", COVERED)
def test_every_use_of_a_parameter_counts_with_the_terms_between_uses(name, length):
    """length 5 is as long as the batch: the two dimensions must not be taken for each other."""
    model, x = Called(COVERED[name]), torch.randn(5, length, 4, dtype=torch.float64)

    def loss(model, batch):
        return model(batch[0]).sin().flatten(1).sum(1).mean()

    want = one_by_one(model, loss, [x])
    if name == "not contiguous":  # a step in a slice has no rule
        assert "functional" in per_example_sq_norms(model, loss, [x]).rules.values()
    elif name == "sequence first" and length == 5:
        with pytest.raises(InputError, match="examples and positions are equally many"):
            _watched(model, loss, [x])
    else:
        torch.testing.assert_close(_watched(model, loss, [x]).sq_norms(), want, rtol=1e-10, atol=0)
    torch.testing.assert_close(per_example_sq_norms(model, loss, [x]).values, want, rtol=1e-10, atol=0)


def _watched(model, loss, batch, **options):
    with ExampleNorms(model, **options).watch(len(_tensors(batch)[0])) as record:
        loss(model, batch).backward()
    return record


UNCOVERED = {
    "einsum": lambda m, x: torch.einsum("ntd,pd->ntp", x, m.w),
    "a rule's use and another": lambda m, x: F.linear(x, m.w) + torch.einsum("ntd,pd->ntp", x, m.w),
    "computed weight": lambda m, x: F.linear(x, m.w / m.w.norm()),
    "slices that overlap": lambda m, x: F.linear(x, m.w[:3]).sum(-1, keepdim=True) * F.linear(x, m.w[1:]),
    "a slice and the whole": lambda m, x: F.linear(x, m.w[:1]) * F.linear(x, m.w),
    "scaled by frequency": lambda m, x: F.embedding(_ids(x), m.w[:6], scale_grad_by_freq=False) * 0 + x @ (m.w * 1),
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
        _watched(model, loss, [x])
    record = _watched(model, loss, [x], strict=False)
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
        _watched(model, lambda m, b: m(b[0]).square().mean(), [x])
    got = per_example_sq_norms(model, lambda m, b: m(b[0]).square().mean(), [x])
    torch.testing.assert_close(
        got.values, one_by_one(model, lambda m, b: m(b[0]).square().mean(), [x]), rtol=1e-10, atol=0
    )


def test_reentrant_checkpointing_is_refused():
    model = Called(lambda m, x: checkpoint(lambda x: F.linear(x, m.w), x * m.v, use_reentrant=True))
    for measure in (_watched, per_example_sq_norms):
        with pytest.raises(InputError, match="no call that has a rule used it|loss uses reentrant checkpointing"):
            measure(model, lambda m, b: m(b[0]).square().mean(), [torch.randn(5, 3, 4).double()])


def test_a_missing_use_is_noticed_at_any_size():
    """The seen use is 1,000 times the other; a projection of float64 numbers cannot overlook it."""
    model = Called(lambda m, x: F.linear(x, m.w) + 1e-3 * torch.einsum("ntd,pd->ntp", x, m.w))
    record = _watched(model, lambda m, b: m(b[0]).square().mean(), [torch.randn(5, 3, 4).double()], strict=False)
    assert record.uncovered == {"w": "its gradient is not the sum of its uses that were seen"}


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
        _watched(model, loss, [tokens])


def test_mixed_examples_are_noticed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))

    def loss(model, batch):
        hidden = model[0](batch[0])
        return model[1](hidden - hidden.mean(0)).square().mean()

    with pytest.raises(InputError, match="the gradient of one example reaches others at the linear of 0.weight"):
        _watched(model, loss, [torch.randn(5, 4)])
    with pytest.raises(InputError, match="loss must be the mean over independent examples"):
        per_example_sq_norms(model, loss, [torch.randn(5, 4)])


def test_a_loss_that_compares_examples_is_noticed():
    model, x = nn.Linear(4, 3), torch.randn(6, 4)

    def loss(model, batch):
        z = F.normalize(model(batch[0]))
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    with pytest.raises(InputError, match=r"\|g\|² of example \d is .* in the batch and .* alone: give units="):
        per_example_sq_norms(model, loss, [x])


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


@pytest.mark.parametrize("name", ["gpt", "conv", "vision", "bert sdpa", "lstm"])
def test_watching_changes_no_bit(name):
    model, loss, batch = _job(name)
    plain, n = copy.deepcopy(model), len(_tensors(batch)[0])
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
    model, loss, batch = _job("gpt")
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


def test_the_function_leaves_all_as_it_was():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.InstanceNorm1d(4, track_running_stats=True, affine=True))
    model[0].weight.grad = torch.ones(4, 4)
    before, kept, state = copy.deepcopy(model.state_dict()), model[0].weight.grad, torch.get_rng_state()
    got = per_example_sq_norms(model, lambda m, b: m(b[0]).square().mean() + m[0](b[0]).mean(), [torch.randn(3, 4, 4)])
    assert not got.checked and got.notes == ("not checked against single examples",)
    assert model[0].weight.grad is kept and kept.eq(1).all() and model[0].bias.grad is None and model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state()) or torch.get_rng_state().shape == state.shape


def test_active_dropout_is_part_of_the_watched_pass():
    """The masks are the graph's own: the norms of the pass that was run."""
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    torch.manual_seed(1)
    record = _watched(model, lambda m, b: m(b[0]).mean(), [x])
    torch.manual_seed(1)
    mask = F.dropout(torch.ones(6, 64, dtype=torch.float64), 0.5)
    hidden, back = model[0](x) * mask, model[2].weight * mask
    want = hidden.square().sum(1) + 1 + back.square().sum(1) * (x.square().sum(1) + 1)
    torch.testing.assert_close(record.sq_norms(), want, rtol=1e-10, atol=0)


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
    model, loss, batch = _job("conv")
    batch = [torch.cat([t, t[:1]]) for t in batch]
    whole = _watched(model, loss, batch).sq_norms()
    with ExampleNorms(model).watch(6, scale=6 / factor) as record:
        (factor * loss(model, [t[list(order)] for t in batch])).backward()
    torch.testing.assert_close(record.sq_norms(), whole[list(order)], rtol=1e-4, atol=0)


def test_chosen_parameters_are_watched_alone():
    model, loss, batch = _job("gpt")
    whole = _watched(model, loss, batch)
    names = norm_layer_names(model)
    assert len(names) == 10 and all("norm" in name for name in names)
    norms = ExampleNorms(model, parameters=names)
    with norms.watch(4) as record:
        loss(model, batch).backward()
    assert list(record.by_parameter) == names
    torch.testing.assert_close(record.sq_norms(), whole.sq_norms(names), rtol=1e-6, atol=0)
    assert (record.sq_norms() < whole.sq_norms()).all()


def test_the_mean_of_the_gradients_is_bounded_by_the_norms():
    """|g|² ≤ mean |g_i|², and tr(Σ) = n/(n-1)·(mean |g_i|² - |g|²) is that of the gradients themselves."""
    model, loss, batch = _job("mlp")
    model, batch = model.double(), _cast(batch, torch.float64)
    record = _watched(model, loss, batch)
    big = sum(p.grad.square().sum() for p in model.parameters())
    gradients = []
    for i in range(6):
        value = loss(model, [t[i : i + 1] for t in batch])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    trace = torch.stack(gradients).var(0).sum()
    torch.testing.assert_close((record.sq_norms().mean() - big) * 6 / 5, trace, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_norms_are_taken_in_float32(dtype, autocast):
    """Against float32: 64 numbers of 2^-8 relative error each, and no overflow of squares in float16."""
    model, loss, batch = _job("mlp")
    want = _watched(model, loss, batch).sq_norms()
    model.zero_grad()

    def low(model, batch):
        with torch.autocast("cpu", dtype, enabled=autocast):
            return F.cross_entropy(model(batch[0]).float(), batch[1])

    if not autocast:
        model, batch = model.to(dtype), _cast(batch, dtype)
    record = _watched(model, low, batch)
    torch.testing.assert_close(record.sq_norms(), want, rtol=0.1, atol=0)
    assert all(part.dtype == torch.float32 for part in record.by_parameter.values())
    assert per_example_sq_norms(model, low, batch).checked


def test_float32_sums_of_a_million_terms_keep_their_digits():
    model, x = nn.Linear(1024, 1024, bias=False), torch.randn(2, 600, 1024)
    record = _watched(model, lambda m, b: m(b[0]).square().mean(), [x])
    double = copy.deepcopy(model).double()
    want = one_by_one(double, lambda m, b: m(b[0]).square().mean(), [x.double()])
    torch.testing.assert_close(record.sq_norms(), want, rtol=1e-6, atol=0)


def test_nan_and_infinity_stay_with_their_example():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    x[2, 1], x[3, 0] = math.nan, math.inf
    record = _watched(model, lambda m, b: m(b[0]).sum(1).mean(), [x])
    assert record.sq_norms().isfinite().tolist() == [True, True, False, False, True]


def test_frozen_and_unused_parameters():
    model, loss, batch = _job("mlp")
    model[0].requires_grad_(False)
    model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    got = per_example_sq_norms(model, loss, batch)
    assert set(got.by_parameter) == {"2.weight", "2.bias", "4.weight", "4.bias"}
    torch.testing.assert_close(got.values, one_by_one(model, loss, batch), rtol=1e-5, atol=0)


def test_a_recurrent_layer_without_a_batching_rule_goes_one_by_one():
    model = LSTMClassifier()
    model.lstm = nn.GRU(6, 7, batch_first=True)
    _, loss, batch = _job("lstm")
    got = per_example_sq_norms(model, loss, batch)
    torch.testing.assert_close(got.values, one_by_one(model, loss, batch), rtol=1e-5, atol=0)
    assert got.rules["lstm.weight_ih_l0"] == "loop" and got.rules["out.weight"] in ("ghost", "instantiated")
    assert got.gradient_bytes == 4 * sum(p.numel() for p in model.lstm.parameters())
    assert got.notes[0].startswith("torch.func could not be used: RuntimeError: ")


@pytest.mark.parametrize("memory", [1, 3000, 10**6])
def test_the_fallback_holds_no_more_gradients_than_it_may(memory):
    model, loss, batch = _job("lstm")
    got, one = (
        per_example_sq_norms(model, loss, batch, memory_bytes=memory),
        4 * sum(p.numel() for p in model.lstm.parameters()),
    )
    assert got.gradient_bytes == one * max(1, min(5, memory // one)) and got.memory_bytes == memory
    torch.testing.assert_close(got.values, one_by_one(model, loss, batch), rtol=1e-5, atol=0)


def test_one_pass_at_a_time():
    model, loss, batch = _job("mlp")
    norms = ExampleNorms(model)
    with pytest.raises(InputError, match="got two gradients in one watch"), norms.watch(6):
        value = loss(model, batch)
        value.backward(retain_graph=True)
        value.backward()
    with pytest.raises(InputError, match="watch must not be entered twice at once"), norms.watch(6), norms.watch(6):
        pass
    other, alone = ExampleNorms(model), ExampleNorms(_job("mlp")[0])
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


def test_bad_input():
    model, loss, batch = _job("mlp")
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


def test_layers_that_mix_examples_or_draw_masks_are_named():
    _, loss, batch = _job("conv")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(InputError, match="1 normalises over the batch"):
        per_example_sq_norms(model, loss, batch)
    assert per_example_sq_norms(model.eval(), loss, batch).checked
    functional = Called(lambda m, x: F.batch_norm(x.mT, None, None, m.v, training=True))
    with pytest.raises(InputError, match="batch normalisation over the batch was called"):
        per_example_sq_norms(functional, lambda m, b: m(b[0]).mean(), [torch.randn(5, 3, 4).double()])
    model, loss, batch = _job("lstm")
    model.out = nn.Sequential(nn.Dropout(0.1), model.out)
    with pytest.raises(InputError, match=r"lstm.weight_ih_l0 must be differentiated .* but out.0 draws random numbers"):
        per_example_sq_norms(model, loss, batch)
    assert per_example_sq_norms(model.eval(), loss, batch).checked


def test_compiled_models_are_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].compile()
    with pytest.raises(InputError, match="0 is compiled"):
        ExampleNorms(model)


def test_the_doubtful_position_table_of_the_bundled_model():
    model = ByteTransformer(8, width=12, layers=1, heads=2).double()
    tokens = torch.randint(256, (8, 9))
    batch = [tokens[:, :-1], tokens[:, 1:]]
    torch.testing.assert_close(
        _watched(model, cross_entropy, batch).sq_norms(), one_by_one(model, cross_entropy, batch), rtol=1e-10, atol=0
    )
