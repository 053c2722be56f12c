"""What one layer keeps for its backward pass and what it moves through memory: presets, and a user's block measured.

For b sequences of s tokens on one of t tensor-parallel ranks a layer keeps

  s·b·(whole/(t if sequence parallel else 1) + split/t) + scores·a·s²·b/t   bytes,

with a heads. Korthikanti et al. 2022 (arXiv 2205.05198) count whole = 10·h, split = 24·h and scores = 5 bytes for GPT
in 2-byte numbers with dropout, an MLP of 4h and attention that keeps its scores: 34·h and 5·a·s².
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from batchlab.core.checks import check_count, check_not_negative, check_share
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.planner.layouts.shape import ModelShape

if TYPE_CHECKING:
    from torch import nn

MASK, STATISTIC = 1, 4
COMPOSITE_NORM_MOVED = 36


@dataclass(frozen=True)
class Block(JsonNoun):
    """One layer's bytes.

    whole: kept for each token, the same on every tensor-parallel rank (norms, inputs of column-parallel matrices);
    sequence parallelism divides it. split: kept for each token, divided over the ranks.
    scores: kept for each head and pair of tokens, divided over the ranks; 0 where attention is fused (flash).
    boundary: kept for each token where the layer is checkpointed, its input; sequence parallelism divides it.
    moved_whole, moved_split, moved_scores: read and written outside matrix products in one forward pass, likewise.
    backward, backward_scores: gradients alive at once in its backward pass, for each token, and for each head and pair
    of tokens; divided over the ranks. They count where a layer is recomputed, the larger of the two.
    attention_share: of attention's s² products, those that are done: 0.5 where a fused kernel skips the causal half.
    method: how it was got.

    >>> Block.gpt(ModelShape(layers=1, hidden=100, heads=1, mlp=400, vocabulary=1), flash=False, dropout=True)
    Block(keeps 1016/token whole and 2400/token split, 5/score, counted for a GPT block)
    """

    whole: float
    split: float
    scores: float
    boundary: float
    moved_whole: float
    moved_split: float
    moved_scores: float
    backward: float
    backward_scores: float
    attention_share: float
    method: str

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "method":
                check_not_negative(**{field.name: getattr(self, field.name)})
        check_share(attention_share=self.attention_share)

    def __repr__(self) -> str:
        kept = f"keeps {self.whole:.4g}/token whole and {self.split:.4g}/token split, {self.scores:.4g}/score"
        return f"Block({kept}, {self.method})"

    @classmethod
    def of(cls, shape: ModelShape, *, bytes_each: int = 2) -> Block:
        """The preset for a shape, with fused attention: Llama's where the MLP is gated, else GPT's, no dropout."""
        return (cls.llama if shape.gated else cls.gpt)(shape, bytes_each=bytes_each)

    @classmethod
    def llama(cls, shape: ModelShape, *, bytes_each: int = 2, flash: bool = True, fused_norm: bool = True) -> Block:
        """RMSNorm, rotary positions, gated MLP, no dropout.

        Kept: each norm's input and output; q, k, v and what attention makes of them; the gate before and after its
        activation, the up-projection and their product. bytes_each: of one activation.
        flash: attention keeps one float32 statistic a head and token, else its softmax, and keys and values that heads
        share repeated for each.
        fused_norm: else the norm runs as separate kernels in float32, as torch's own does where it has no fused one: it
        keeps its input and the normalised values in float32, and moves 36 bytes more for each of them.
        """
        check_count(bytes_each=bytes_each)
        h, n = shape.hidden, bytes_each
        norm = (2 * n if fused_norm else 2 * 4 + n) * h + STATISTIC
        norm_moved = (2 * n + (0 if fused_norm else COMPOSITE_NORM_MOVED)) * h
        inner = shape.heads * shape.head_width
        mlp_kept, mlp_moved = (4, 5) if shape.gated else (2, 2)
        return cls(
            whole=2 * norm,
            split=_attention(shape, n, flash) + n * mlp_kept * shape.mlp,
            scores=0 if flash else n,
            boundary=n * h,
            moved_whole=2 * norm_moved + 6 * n * h,
            moved_split=n * (2 * (inner + shape.kv_width * shape.head_width) + mlp_moved * shape.mlp),
            moved_scores=0 if flash else 8 * n,
            backward=(3 if shape.gated else 2) * n * shape.mlp,
            backward_scores=0 if flash else 2 * n,
            attention_share=0.5 if flash else 1.0,
            method="counted for a Llama block",
        )

    @classmethod
    def gpt(cls, shape: ModelShape, *, bytes_each: int = 2, flash: bool = True, dropout: bool = False) -> Block:
        """LayerNorm, MLP of two matrices with GELU. With dropout and kept scores, Korthikanti et al. 2022's count.

        dropout: masks of one byte after attention and MLP, and on kept scores; a fused attention keeps none. (On a CPU
        torch's masks are as wide as its numbers.) Theirs leaves out the norms' two float32 statistics, 16 bytes a token
        in all, and a fused attention's, which are counted here.
        """
        check_count(bytes_each=bytes_each)
        h, n = shape.hidden, bytes_each
        return cls(
            whole=2 * (2 * n * h + 2 * STATISTIC) + 2 * MASK * h * dropout,
            split=_attention(shape, n, flash) + 2 * n * shape.mlp,
            scores=0 if flash else n + (n + MASK) * dropout,
            boundary=n * h,
            moved_whole=(10 * n + 2 * (2 * n + MASK) * dropout) * h,
            moved_split=2 * n * shape.mlp,
            moved_scores=0 if flash else 8 * n + (2 * n + MASK) * dropout,
            backward=2 * n * shape.mlp,
            backward_scores=0 if flash else 2 * n,
            attention_share=0.5 if flash else 1.0,
            method="counted for a GPT block",
        )

    @classmethod
    def measured(
        cls, module: nn.Module, shape: ModelShape, *, sequence_length: int = 32, like: Block | None = None
    ) -> Block:
        """A user's block: what it keeps is measured, how that divides over ranks and what it moves is as in `like`.

        module: takes activations (b, s, h) of its parameters' dtype. It is run at (1, s), (1, 2s) and (2, s), which
        tells the bytes for each token from those for each pair, c₁·s + c₂·s². With one rank the division does not
        matter. Raises `InputError` where the bytes do not grow in proportion to the batch.
        """
        check_count(2, sequence_length=sequence_length)
        from torch import ones

        weight = next(module.parameters())
        like = like or cls.of(shape, bytes_each=weight.element_size())

        def kept(batch: int, length: int) -> float:
            return activation_bytes(module, ones(batch, length, shape.hidden, dtype=weight.dtype, device=weight.device))

        short, twice, double = kept(1, sequence_length), kept(1, 2 * sequence_length), kept(2, sequence_length)
        if not 1.9 * short <= double <= 2.1 * short:
            raise InputError(
                f"module must keep bytes in proportion to its batch, got {short:.0f} for one sequence and {double:.0f} "
                "for two"
            )
        pair = max(0.0, (twice - 2 * short) / (2 * sequence_length**2))
        token = double / (2 * sequence_length) - pair * sequence_length
        share = like.whole / (like.whole + like.split)
        return replace(
            like,
            whole=share * token,
            split=(1 - share) * token,
            scores=pair / shape.heads,
            method=f"measured on {type(module).__name__} at {sequence_length} tokens",
        )


def _attention(shape: ModelShape, bytes_each: int, flash: bool) -> int:
    """Bytes for each token of q, k, v and attention's output, and of a fused attention's statistics.

    Where scores are kept, shared keys and values were repeated for every head.
    """
    keys = shape.kv_width if flash else shape.heads
    statistics = STATISTIC * shape.heads if flash else 0
    return 2 * bytes_each * (shape.heads + keys) * shape.head_width + statistics


def activation_bytes(function: Callable[..., Any], *inputs: Any) -> int:
    """Bytes that a forward pass keeps for its backward pass: each storage once, parameters and buffers not.

    function: a module, or a function over one; then parameters that it uses are counted too. Tensors among the inputs
    that are floating are given a gradient, as a layer's input has inside a model, on copies.
    """
    import torch
    from torch import nn

    held = {}
    owned = [*function.parameters(), *function.buffers()] if isinstance(function, nn.Module) else []
    own = {tensor.untyped_storage().data_ptr() for tensor in owned}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            held[place] = tensor
        return tensor

    given = [
        x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*given)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    del output
    return kept
