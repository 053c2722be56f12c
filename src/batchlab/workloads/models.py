"""Small models of the ready jobs. None couples the examples of a batch, so that per-example gradients exist."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNet(nn.Module):
    """3x3 convolutions, each group-normalised, that halve the map until its edge is 4 at most; one hidden layer.

    Images (n, channels, size, size), float, or uint8 which is brought to [-1, 1]; logits (n, classes).
    8 channels a group. Group and not batch normalisation (Wu and He 2018): an example's gradient is its own.
    """

    def __init__(self, channels: int, size: int, classes: int, *, hidden: int = 64) -> None:
        super().__init__()
        layers, width, edge = _convolution(channels, 16, stride=1), 16, size
        while edge > 4:
            wider = min(2 * width, 64)
            layers += _convolution(width, wider, stride=2)
            width, edge = wider, (edge + 1) // 2
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(width * edge**2, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float() / 127.5 - 1.0
        logits: Tensor = self.head(self.features(images))
        return logits


def _convolution(inputs: int, outputs: int, *, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.GroupNorm(outputs // 8, outputs), nn.ReLU()]


def mlp(features: int, outputs: int, *, hidden: int = 64) -> nn.Sequential:
    """Two hidden layers with ReLU: (n, features) -> (n, outputs)."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


def autoencoder_of(features: int, code: int, *, hidden: int = 64) -> nn.Sequential:
    """(n, features) through (n, code) and back, a hidden layer with tanh on either side."""
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.Tanh(),
        nn.Linear(hidden, code),
        nn.Linear(code, hidden),
        nn.Tanh(),
        nn.Linear(hidden, features),
    )


class LstmClassifier(nn.Module):
    """Tokens (n, length), int64 below `tokens`, to logits (n, classes): the last state of one LSTM layer.

    The forget gate's bias is 1 at the start (Gers, Schmidhuber and Cummins 2000), so that the state is kept at first.
    """

    def __init__(self, tokens: int, classes: int, *, width: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.tokens, self.recurrent = nn.Embedding(tokens, width), nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)
        with torch.no_grad():
            self.recurrent.get_parameter("bias_ih_l0")[hidden : 2 * hidden] = 1.0
            self.recurrent.get_parameter("bias_hh_l0")[hidden : 2 * hidden] = 0.0

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.tokens(tokens))
        logits: Tensor = self.head(states[:, -1])
        return logits


class _Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feed_forward_in = nn.Linear(width, 4 * width, bias=False)
        self.feed_forward_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        split = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.feed_forward_in(self.feed_forward_norm(x)), approximate="tanh")
        out: Tensor = x + self.feed_forward_out(hidden)
        return out


class ByteTransformer(nn.Module):
    """A pre-norm decoder over bytes: tokens (n, up to context), int64 in [0, 256), to logits (n, length, 256).

    Learned positions, no dropout, biases in the norms only, an output matrix of its own. Matrices are drawn with
    deviation 1/√columns, and the two of a block that write to the residual stream are divided by √(2·layers) (as in
    GPT-2, Radford et al. 2019; its fixed 0.02 is meant for a width of 768 and learns more slowly at this one).
    """

    def __init__(self, context: int, *, width: int = 96, layers: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("attention_out.weight", "feed_forward_out.weight"))
                nn.init.normal_(weight, std=(weight.shape[1] * (2 * layers if residual else 1)) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.out(self.norm(self.blocks(x)))
        return logits
