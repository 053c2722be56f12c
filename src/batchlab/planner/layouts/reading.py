"""Reads a `ModelShape` off a Hugging Face configuration or a torch module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from batchlab.core.checks import is_count
from batchlab.core.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from batchlab.planner.layouts.shape import ModelShape

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
GPT = ("gpt2", "gpt_neox")
HEAD_NAMES = ("num_heads", "n_head", "n_heads", "nhead", "heads", "num_attention_heads")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelShape` from a configuration; `InputError` by the configuration's own keys."""
    if not isinstance(config, Mapping):
        raise InputError(f"config must be a mapping, as of model.config.to_dict(), got {type(config).__name__}")
    for key in EXPERTS:
        if config.get(key) and _count(config, key) > 1:
            raise InputError(f"config must be of a dense model, got {key} = {config[key]}: experts are not counted")
    kind = config.get("model_type")
    if kind is None and "num_key_value_heads" in config:
        kind = "llama"
    if kind not in LLAMA_LIKE + GPT:
        raise InputError(
            f"model_type must be one of {sorted(LLAMA_LIKE + GPT)}, got {kind!r}: write the sizes as one of these, or "
            "build a ModelShape in Python"
        )
    read = _gpt2(config) if kind == "gpt2" else _gpt_neox(config) if kind == "gpt_neox" else _llama(config, str(kind))
    heads, hidden = ("n_head", "n_embd") if kind == "gpt2" else ("num_attention_heads", "hidden_size")
    if read.get("head_dim") is None and read["hidden"] % read["heads"]:
        raise InputError(f"config's {heads} must divide {hidden} {read['hidden']}, got {read['heads']}")
    if (kv_heads := read.get("kv_heads")) is not None and read["heads"] % kv_heads:
        raise InputError(f"config's num_key_value_heads must divide {heads} {read['heads']}, got {kv_heads}")
    return read


def _need(config: Mapping[str, Any], key: str) -> int:
    if config.get(key) is None:
        raise InputError(f"config lacks the key {key!r}")
    return _count(config, key)


def _may(config: Mapping[str, Any], key: str) -> int | None:
    return None if config.get(key) is None else _count(config, key)


def _count(config: Mapping[str, Any], key: str) -> int:
    if not is_count(config[key]):
        raise InputError(f"config's {key} must be an integer of at least 1, got {config[key]!r}")
    return int(config[key])


def _llama(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return _common(config) | {
        "kv_heads": _may(config, "num_key_value_heads"),
        "head_dim": _may(config, "head_dim"),
        "qkv_bias": bias or kind == "qwen2",
        "out_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "qk_norm": kind == "qwen3",
    }


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "layers": _need(config, "num_hidden_layers"),
        "hidden": _need(config, "hidden_size"),
        "heads": _need(config, "num_attention_heads"),
        "mlp": _need(config, "intermediate_size"),
        "vocabulary": _need(config, "vocab_size"),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "context": _may(config, "max_position_embeddings"),
    }


def _gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    hidden = _need(config, "n_embd")
    return {
        "layers": _need(config, "n_layer"),
        "hidden": hidden,
        "heads": _need(config, "n_head"),
        "mlp": _may(config, "n_inner") or 4 * hidden,
        "vocabulary": _need(config, "vocab_size"),
        "positions": _need(config, "n_positions"),
        "context": _need(config, "n_positions"),
        "tied": bool(config.get("tie_word_embeddings", True)),
        "gated": False,
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "norm_bias"), True),
    }


def _gpt_neox(config: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", True))
    return _common(config) | {
        "gated": False,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": True,
        "norm_bias": True,
    }


def read_module(module: nn.Module) -> ModelShape:
    """The shape of a module, checked against the count of its parameters."""
    from torch import nn

    from batchlab.planner.layouts.shape import ModelShape

    if not isinstance(module, nn.Module):
        raise InputError(f"module must be a torch module, got {type(module).__name__}")
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        shape = ModelShape(**read_config(config.to_dict()))
    else:
        shape = ModelShape(**_infer(module))
    counted = sum(parameter.numel() for parameter in module.parameters())
    if counted != shape.parameters:
        raise InputError(
            f"the shape of {type(module).__name__} cannot be told: it has {counted:,} parameters and the shape read "
            f"off it {shape.parameters:,}; build a ModelShape yourself"
        )
    return shape


def _untold(module: nn.Module, why: str) -> InputError:
    return InputError(f"the shape of {type(module).__name__} cannot be told: {why}; build a ModelShape yourself")


def _infer(module: nn.Module) -> dict[str, Any]:
    """Vocabulary from the largest embedding, layers from the largest list of alike blocks, widths from matrices."""
    from torch import nn

    tables = [child for child in module.modules() if isinstance(child, nn.Embedding)]
    if not tables:
        raise _untold(module, "it has no embedding")
    words = max(tables, key=lambda table: table.num_embeddings)
    stacks = [
        list(child)
        for child in module.modules()
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len({type(block) for block in child}) == 1
    ]
    stacks = [stack for stack in stacks if not isinstance(stack[0], (nn.Linear, nn.Embedding))]
    if not stacks:
        raise _untold(module, "it has no list of alike blocks")
    blocks = max(stacks, key=lambda stack: sum(p.numel() for block in stack for p in block.parameters()))
    inside = {id(child) for block in blocks for child in block.modules()}
    outputs = [
        child
        for child in module.modules()
        if isinstance(child, nn.Linear) and id(child) not in inside and child.out_features == words.num_embeddings
    ]
    learned = sum(table.num_embeddings for table in tables if table is not words)
    learned += sum(
        p.numel() // words.embedding_dim for name, p in module.named_parameters() if _is_position(name, p, words)
    )
    return {
        "layers": len(blocks),
        "vocabulary": words.num_embeddings,
        "positions": learned,
        "tied": not outputs or outputs[0].weight is words.weight,
        **_infer_block(module, blocks[0], words.embedding_dim),
    }


def _is_position(name: str, parameter: Any, words: nn.Embedding) -> bool:
    own = "." not in name and "pos" in name
    return bool(own and parameter.dim() >= 2 and parameter.shape[-1] == words.embedding_dim)


def _infer_block(module: nn.Module, block: nn.Module, hidden: int) -> dict[str, Any]:
    from torch import nn

    heads = next(
        (
            value
            for child in block.modules()
            for name in HEAD_NAMES
            if isinstance(value := getattr(child, name, None), int) and not isinstance(value, bool)
        ),
        None,
    )
    if heads is None:
        raise _untold(module, f"its blocks name no number of heads (one of {list(HEAD_NAMES)})")
    fused = [child for child in block.modules() if isinstance(child, nn.MultiheadAttention)]
    norms = [child for child in block.modules() if _is_norm(child, hidden)]
    matrices = [child for child in block.modules() if isinstance(child, nn.Linear)]
    readings = list(_readings(matrices, hidden, heads, 3 * hidden if fused else 0))
    if len(readings) != 1:
        raise _untold(module, "its blocks are not an attention's matrices followed by an MLP's")
    out, sizes = readings[0]
    return sizes | {
        "hidden": hidden,
        "heads": heads,
        "qkv_bias": fused[0].in_proj_bias is not None if fused else matrices[0].bias is not None,
        "out_bias": matrices[out].bias is not None,
        "mlp_bias": matrices[-1].bias is not None,
        "norm_bias": bool(norms) and getattr(norms[0], "bias", None) is not None,
        "norms": len(norms),
    }


def _readings(
    matrices: list[nn.Linear], hidden: int, heads: int, into_heads: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each way to take matrices[out] for the attention's output: those before make q, k, v, those after the MLP.

    into_heads: what a fused attention module makes of q, k, v by itself.
    """
    outs = [index for index, matrix in enumerate(matrices) if matrix.out_features == hidden]
    for out in outs[:-1]:
        down = matrices[outs[-1]]
        ups = sum(matrix.out_features for matrix in matrices[out + 1 :] if matrix is not down)
        width, keys = matrices[out].in_features, into_heads + sum(matrix.out_features for matrix in matrices[:out])
        if width % heads or ups not in (down.in_features, 2 * down.in_features):
            continue
        head_dim = width // heads
        kv_heads, rest = divmod(keys - width, 2 * head_dim)
        if kv_heads >= 1 and not rest and heads % kv_heads == 0:
            gated = ups == 2 * down.in_features
            yield out, {"mlp": down.in_features, "gated": gated, "head_dim": head_dim, "kv_heads": kv_heads}


def _is_norm(child: nn.Module, hidden: int) -> bool:
    from torch import nn

    weight = getattr(child, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and weight.numel() == hidden
