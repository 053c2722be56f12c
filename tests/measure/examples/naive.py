"""Models of every kind, and their per-example squared norms from `vmap(grad)` and from one backward pass an example."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from batchlab.measure.examples.example_norms import ExampleNorms

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
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, x.device, x.dtype)
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


def make_job(name):
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
    return bert(name.removeprefix("bert "))


def bert(attention):
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


def cast(batch, dtype):
    if isinstance(batch, dict):
        return {key: cast(value, dtype) for key, value in batch.items()}
    if isinstance(batch, list):
        return [cast(value, dtype) for value in batch]
    return batch.to(dtype) if batch.is_floating_point() else batch


def tensors_of(batch):
    return list(batch.values()) if isinstance(batch, dict) else batch


def like(batch, tensors):
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
        return functional_call(objective, parameters, (like(batch, [t[None] for t in tensors]),))

    found = vmap(grad(of), in_dims=(None, 0))(parameters, tensors_of(batch))
    return {k.removeprefix("model."): g.double().flatten(1).square().sum(1) for k, g in found.items()}


def by_loop(model, loss, batch):
    """The same from n backward passes: for what has no batching rule, as an LSTM of float64."""
    names, parameters = zip(*((k, p) for k, p in model.named_parameters() if p.requires_grad), strict=True)
    rows = []
    for i in range(len(tensors_of(batch)[0])):
        value = loss(model, like(batch, [t[i : i + 1] for t in tensors_of(batch)]))
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        rows.append([0.0 if g is None else g.double().square().sum().item() for g in gradients])
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64).T, strict=True))


def one_by_one(model, loss, batch):
    """|g_i|² over all parameters, from n backward passes."""
    return sum(by_loop(model, loss, batch).values())


class Called(nn.Module):
    """Parameters w [4, 4], v [4] and e [6, 4], and a function of them and the input."""

    def __init__(self, function):
        super().__init__()
        self.w, self.v, self.e = (nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((4, 4), (4,), (6, 4)))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def ids(x):
    return (x[..., 0].abs() * 10).long() % 6


def watched_norms(model, loss, batch, **options):
    with ExampleNorms(model, **options).watch(len(tensors_of(batch)[0])) as record:
        loss(model, batch).backward()
    return record
