"""Small real transformers: GPT's block and Llama's, attention fused or with its scores kept, tied or not."""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from batchlab.planner.layouts import ModelShape


class Attention(nn.Module):
    def __init__(self, shape: ModelShape, flash: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.kv, self.d = shape.heads, shape.kv_heads, shape.head_dim
        self.flash, self.dropout = flash, dropout
        self.q = nn.Linear(shape.hidden, self.num_heads * self.d, bias=shape.qkv_bias)
        self.k = nn.Linear(shape.hidden, self.kv * self.d, bias=shape.qkv_bias)
        self.v = nn.Linear(shape.hidden, self.kv * self.d, bias=shape.qkv_bias)
        self.o = nn.Linear(self.num_heads * self.d, shape.hidden, bias=shape.out_bias)
        self.register_buffer("mask", torch.ones(256, 256, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (matrix(x).view(b, s, -1, self.d).transpose(1, 2) for matrix in (self.q, self.k, self.v))
        if self.flash:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv != self.num_heads)
        else:
            k, v = (part.repeat_interleave(self.num_heads // self.kv, 1) for part in (k, v))
            scores = (q @ k.transpose(-1, -2) * self.d**-0.5).masked_fill(self.mask[:s, :s], float("-inf"))
            out = F.dropout(scores.softmax(-1), self.dropout) @ v
        return self.o(out.transpose(1, 2).reshape(b, s, -1))


class MLP(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden, shape.mlp, bias=shape.mlp_bias)
        self.gate = nn.Linear(shape.hidden, shape.mlp, bias=shape.mlp_bias) if shape.gated else None
        self.down = nn.Linear(shape.mlp, shape.hidden, bias=shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, shape: ModelShape, flash: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        norm = nn.LayerNorm if shape.norm_bias else nn.RMSNorm
        self.first, self.second = norm(shape.hidden), norm(shape.hidden)
        self.attention, self.mlp = Attention(shape, flash, dropout), MLP(shape)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attention(self.first(x)), self.dropout)
        return x + F.dropout(self.mlp(self.second(x)), self.dropout)


class Transformer(nn.Module):
    def __init__(self, shape: ModelShape, flash: bool = True, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.words = nn.Embedding(shape.vocabulary, shape.hidden)
        self.places = nn.Embedding(shape.positions, shape.hidden) if shape.positions else None
        self.layers = nn.ModuleList(Layer(shape, flash) for _ in range(shape.layers))
        self.norm = (nn.LayerNorm if shape.norm_bias else nn.RMSNorm)(shape.hidden)
        self.out = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        if shape.tied:
            self.out.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        if self.places is not None:
            x = x + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return self.out(self.norm(x))


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


class Living(TorchDispatchMode):
    """Counts the bytes of all storages that live, each once: those given, and whatever an operation touches."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.bytes = self.peak = 0
        for tensor in tensors:
            self._meet(tensor.untyped_storage())

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for value in tree_leaves((arguments, keywords, result)):
            if isinstance(value, Tensor):
                self._meet(value.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self.seen:
            self.seen.add(place)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._part, place, size)

    def _part(self, place: int, size: int) -> None:
        self.seen.discard(place)
        self.bytes -= size


def gpt(**changes: object) -> ModelShape:
    biases = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "norm_bias"), True)
    sizes = {"layers": 4, "hidden": 64, "heads": 4, "mlp": 256, "vocabulary": 500, "positions": 256, "tied": True}
    return ModelShape(**(sizes | {"gated": False} | biases | changes))


def llama(**changes: object) -> ModelShape:
    sizes = {"layers": 4, "hidden": 64, "heads": 4, "kv_heads": 2, "mlp": 176, "vocabulary": 500}
    return ModelShape(**(sizes | changes))
