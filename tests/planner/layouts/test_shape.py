"""Parameters counted exactly, against real modules on the meta device, and shapes read off configurations."""

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.planner.layouts import ModelShape
from tests.planner.layouts.models import Transformer, gpt, llama

SHAPES = [
    gpt(),
    gpt(tied=False, positions=0, mlp=128),
    gpt(qkv_bias=False, out_bias=False),
    gpt(kv_heads=1, heads=8),
    llama(),
    llama(tied=True, mlp=300, kv_heads=4),
    llama(heads=2, kv_heads=1, head_dim=48, qkv_bias=True),
]
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
}
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}


def counted(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_a_real_models_and_the_shape_is_read_back(shape):
    with torch.device("meta"):
        model = Transformer(shape)
    assert counted(model) == shape.parameters
    assert counted(model.layers[0]) == shape.layer_parameters
    assert ModelShape.of(model) == shape


def test_the_matrices_of_a_layer_are_its_parameters_without_vectors():
    for shape in SHAPES:
        layer = Transformer(shape).layers[0]
        assert shape.layer_matrices == sum(p.numel() for p in layer.parameters() if p.dim() == 2)


def hugging_face(name, **changes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**changes)
    model = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    with torch.device("meta"):
        return getattr(transformers, model)(config)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 8, "tie_word_embeddings": True}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Mistral", {}),
        ("Qwen2", {"num_key_value_heads": 4}),
        ("Qwen3", {"num_key_value_heads": 4, "head_dim": 64}),
        ("GPT2", {}),
        ("GPT2", {"n_inner": 1000, "tie_word_embeddings": False}),
        ("GPTNeoX", {}),
        ("GPTNeoX", {"attention_bias": False}),
    ],
)
def test_hugging_face_models_on_the_meta_device(name, changes):
    model = hugging_face(name, num_hidden_layers=3, **changes) if name != "GPT2" else hugging_face(name, **changes)
    shape = ModelShape.of(model)
    assert shape == ModelShape.from_config(model.config.to_dict())
    assert shape.parameters == counted(model)


def test_torchs_own_encoder_layers_are_read():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(100, 32)
            self.pos_embedding = nn.Parameter(torch.zeros(1, 64, 32))
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 96) for _ in range(5))
            self.norm = nn.LayerNorm(32)

    shape = ModelShape.of(Encoder())
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.mlp) == (5, 32, 4, 4, 96)
    assert (shape.positions, shape.tied, shape.gated, shape.qkv_bias) == (64, True, False, True)


def test_fused_projections_are_read():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.n_head = 4
            self.norm1, self.norm2 = nn.RMSNorm(64), nn.RMSNorm(64)
            self.qkv, self.proj = nn.Linear(64, 96, bias=False), nn.Linear(64, 64, bias=False)
            self.w1 = nn.Linear(64, 160, bias=False)
            self.w2 = nn.Linear(160, 64, bias=False)
            self.w3 = nn.Linear(64, 160, bias=False)

    model = nn.Module()
    model.words, model.norm, model.out = nn.Embedding(50, 64), nn.RMSNorm(64), nn.Linear(64, 50, bias=False)
    model.blocks = nn.Sequential(Block(), Block())
    shape = ModelShape.of(model)
    assert (shape.kv_heads, shape.mlp, shape.gated, shape.tied) == (1, 160, True, False)


def test_what_cannot_be_told_is_refused():
    def refused(module, text):
        with pytest.raises(InputError, match=text):
            ModelShape.of(module)

    refused(nn.Linear(2, 2), "the shape of Linear cannot be told: it has no embedding; build a ModelShape yourself")
    refused(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)), "it has no list of alike blocks")
    model = Transformer(gpt())
    model.extra = nn.Linear(3, 3)
    refused(model, r"it has 248,460 parameters and the shape read off it 248,448")
    for layer in model.layers:
        del layer.attention.num_heads
    refused(model, r"its blocks name no number of heads \(one of \['num_heads'")
    refused("model", "module must be a torch module, got str")
    odd = Transformer(gpt())
    for layer in odd.layers:
        layer.attention.num_heads = 5
    refused(odd, "its blocks are not an attention's matrices followed by an MLP's")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"model_type": "bert"}, r"model_type must be one of \['gpt2', 'gpt_neox', 'llama', 'mistral', .* got 'bert'"),
        ({}, "model_type must be one of .* got None"),
        ({"model_type": "llama", "num_hidden_layers": 2}, "config lacks the key 'hidden_size'"),
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            "config must be of a dense model, got num_local_experts = 8",
        ),
        ({"model_type": "bert"}, "write the sizes as one of these, or build a ModelShape in Python"),
        ({"model_type": ["llama"]}, r"model_type must be one of .* got \['llama'\]"),
        (LLAMA | {"num_local_experts": "8"}, "config's num_local_experts must be an integer of at least 1, got '8'"),
        (LLAMA | {"hidden_size": "4096"}, "config's hidden_size must be an integer of at least 1, got '4096'"),
        (LLAMA | {"num_hidden_layers": -1}, "config's num_hidden_layers must be an integer of at least 1, got -1"),
        (LLAMA | {"head_dim": "64"}, "config's head_dim must be an integer of at least 1, got '64'"),
        (
            LLAMA | {"num_key_value_heads": 8.0},
            "num_key_value_heads must be an integer of at least 1, got 8.0",
        ),
        (LLAMA | {"num_key_value_heads": 5}, "config's num_key_value_heads must divide num_attention_heads 32, got 5"),
        (LLAMA | {"num_attention_heads": 33}, "config's num_attention_heads must divide hidden_size 4096, got 33"),
        (GPT2 | {"n_embd": "768"}, "config's n_embd must be an integer of at least 1, got '768'"),
        (GPT2 | {"n_inner": "3072"}, "config's n_inner must be an integer of at least 1, got '3072'"),
        (GPT2 | {"n_head": 7}, "config's n_head must divide n_embd 768, got 7"),
        ([1], "config must be a mapping, as of model.config.to_dict(), got list"),
    ],
)
def test_bad_configurations(config, text):
    with pytest.raises(InputError, match=text.replace("()", r"\(\)")):
        ModelShape.from_config(config)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"layers": 0}, "layers must be an integer of at least 1, got 0"),
        ({"hidden": 64.5}, "hidden must be an integer of at least 1, got 64.5"),
        ({"mlp": True}, "mlp must be an integer of at least 1, got True"),
        ({"heads": 5}, "heads must divide hidden 64 where head_dim is not given, got 5"),
        ({"kv_heads": 3}, "kv_heads must divide heads 4, got 3"),
        ({"kv_heads": 0}, "kv_heads must be an integer of at least 1, got 0"),
        ({"positions": -1}, "positions must be an integer of at least 0, got -1"),
    ],
)
def test_bad_shapes(changes, text):
    with pytest.raises(InputError, match=text):
        llama(**changes)


def test_the_context_is_read_and_no_expert_or_one_is_none():
    assert ModelShape.from_config(LLAMA | {"num_experts": 0, "num_local_experts": 1}).context == 4096
    assert ModelShape.from_config(GPT2).context == ModelShape.from_config(GPT2).positions == 1024
    del (rest := dict(LLAMA))["max_position_embeddings"]
    assert ModelShape.from_config(rest).context is None


def test_the_papers_parameter_count():
    """Sheet 40: N = L(4h² + 3hf) + 2Vh of 13B, 30B and 65B; the exact count has the norms too."""
    for layers, hidden, heads, mlp in ((40, 5120, 40, 13824), (60, 6656, 52, 17920), (80, 8192, 64, 22016)):
        shape = ModelShape(layers=layers, hidden=hidden, heads=heads, mlp=mlp, vocabulary=128_000)
        n = layers * (4 * hidden**2 + 3 * hidden * mlp) + 2 * 128_000 * hidden
        assert shape.parameters == n + (2 * layers + 1) * hidden
        assert shape.model_flops(2048) == 6 * n + 12 * layers * hidden * 2048


def test_a_shape_goes_through_json():
    assert ModelShape.from_json(llama().to_json()) == llama()
