"""`ModelShape`: the sizes of a decoder-only transformer, and from them its parameters and the FLOPs of a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun

if TYPE_CHECKING:
    from torch import nn

COUNTS = ("layers", "hidden", "heads", "mlp", "vocabulary", "kv_heads", "head_dim", "positions", "norms", "context")


@dataclass(frozen=True)
class ModelShape(JsonNoun):
    """L layers of width h with a heads, an MLP of width f, a vocabulary of V tokens.

    layers: L. hidden: h. heads: a. mlp: f. vocabulary: V. kv_heads: heads of keys and values; a where it is None.
    head_dim: width of one head; h/a where it is None, and then a must divide h.
    gated: whether the MLP is gated, with three matrices (SwiGLU), not two. tied: whether the output matrix is the
    input embedding. positions: learned absolute positions, 0 for none (rotary).
    qkv_bias, out_bias, mlp_bias: which matrices have biases. norm_bias: LayerNorm with a bias, not RMSNorm.
    qk_norm: a norm of head_dim weights on queries and one on keys. norms: norms of width h in a layer.
    context: tokens of the longest sequence that it was made for, None where that is not known.
    Defaults are Llama's. One norm follows the last layer. Not for mixtures of experts or encoder-decoders.

    >>> llama_7b = ModelShape(layers=32, hidden=4096, heads=32, mlp=11008, vocabulary=32_000)
    >>> llama_7b.parameters
    6738415616
    """

    layers: int
    hidden: int
    heads: int
    mlp: int
    vocabulary: int
    kv_heads: int | None = None
    head_dim: int | None = None
    gated: bool = True
    tied: bool = False
    positions: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    norms: int = 2
    context: int | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "mlp", "vocabulary"):
            check_count(**{name: getattr(self, name)})
        check_count(0, positions=self.positions, norms=self.norms)
        if self.context is not None:
            check_count(context=self.context)
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim is None:
            if self.hidden % self.heads:
                raise InputError(
                    f"heads must divide hidden {self.hidden} where head_dim is not given, got {self.heads}"
                )
            object.__setattr__(self, "head_dim", self.hidden // self.heads)
        check_count(kv_heads=self.kv_width, head_dim=self.head_width)
        if self.heads % self.kv_width:
            raise InputError(f"kv_heads must divide heads {self.heads}, got {self.kv_heads}")
        for name in COUNTS:
            if (count := getattr(self, name)) is not None:
                object.__setattr__(self, name, int(count))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """The shape that a Hugging Face configuration describes: Llama, Mistral, Qwen 2 and 3, GPT-2, GPT-NeoX.

        config: the dictionary, as in a model's `config.json` or `model.config.to_dict()`. Raises `InputError` for
        other model types and for mixtures of experts: build the shape yourself then.

        >>> ModelShape.from_config({"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12,
        ...                         "vocab_size": 50257, "n_positions": 1024}).parameters
        124439808
        """
        from batchlab.planner.layouts.reading import read_config

        return cls(**read_config(config))

    @classmethod
    def of(cls, module: nn.Module) -> ModelShape:
        """The shape of a module, where it can be told; the count of its parameters must then agree exactly.

        It is told from the module's Hugging Face `config`, or from one list of alike blocks, each attention before
        MLP, with embeddings and output matrix outside. The module may live on the meta device. Raises `InputError`
        where it cannot be told or the counts differ: build the shape yourself then.
        """
        from batchlab.planner.layouts.reading import read_module

        return read_module(module)

    @property
    def kv_width(self) -> int:
        """Heads of keys and values, as a number."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head, as a number."""
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def layer_kv(self) -> int:
        """Parameters of a layer's key and value matrices: a rank of tensor parallelism holds whole heads of them."""
        return 2 * self.kv_width * self.head_width * (self.hidden + self.qkv_bias)

    @property
    def layer_split(self) -> int:
        """Parameters of a layer that tensor parallelism divides, keys and values apart: q, o, the MLP's matrices."""
        width, ups = self.heads * self.head_width, 2 if self.gated else 1
        attention = width * (self.hidden + self.qkv_bias) + width * self.hidden
        return attention + ups * self.mlp * (self.hidden + self.mlp_bias) + self.mlp * self.hidden

    @property
    def layer_whole(self) -> int:
        """Parameters of a layer that every rank of tensor parallelism holds: norms, biases of row-parallel matrices."""
        norms = self.norms * self.norm_parameters + 2 * self.head_width * self.qk_norm
        return norms + self.hidden * (self.out_bias + self.mlp_bias)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        return self.layer_split + self.layer_kv + self.layer_whole

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm of width h."""
        return self.hidden * (1 + self.norm_bias)

    @property
    def layer_matrices(self) -> int:
        """Entries of one layer's matrices, without biases and norms: what its FLOPs are counted from."""
        width, kv, ups = self.heads * self.head_width, self.kv_width * self.head_width, 2 if self.gated else 1
        return self.hidden * (2 * width + 2 * kv + (ups + 1) * self.mlp)

    @property
    def embedding(self) -> int:
        """Entries of one vocabulary matrix, V·h."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, each once: a tied matrix is one."""
        vocabularies = self.embedding * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + vocabularies + self.positions * self.hidden + self.norm_parameters

    def model_flops(self, sequence_length: int) -> float:
        """FLOPs of one token, forward and backward, as MFU counts them: 6·N + 12·L·a·d·s, with a·d = h as a rule.

        N counts the matrices and both vocabulary matrices (one where they are tied), as Hagemann et al. 2023 do: the
        embedding's look-up counts as if it were a product. Attention is counted in full, not halved for the causal
        mask, and recomputation not at all.
        """
        check_count(sequence_length=sequence_length)
        matrices = self.layers * self.layer_matrices + self.embedding * (1 if self.tied else 2)
        return 6.0 * matrices + 12.0 * self.layers * self.heads * self.head_width * sequence_length
