"""`layout` on the command line: what it heads its table with, what it notes, and whose fault a refusal is."""

import json
import shlex

import pytest

from batchlab.cli import main

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
WORDS = "layout config.json --device H100-80 --devices 8 --batch 64 --keep 3"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config.json"


def test_the_table_is_narrow_and_counts_layouts_once(place, capfd):
    place.write_text(json.dumps(LLAMA))
    assert main(shlex.split(WORDS)) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "6.74B parameters; 131,072 tokens an update"
    assert sum("layouts that fit" in line for line in lines) == 1
    assert max(len(line) for line in lines if not line.startswith("!")) <= 100


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ("--precision float32", "! Times and MFU are reckoned from H100-80's 989.4 TFLOP/s in bfloat16; "),
        ("--device V100-32 --sequence-length 512", "! Times and MFU hold for float16, of the same bytes: V100-32 has"),
        ("--batch 2097152", "! An update takes 4.29e+09 tokens, 2,097,152 sequences of 2,048: is the batch in tokens?"),
        ("--sequence-length 8192", "! Sequences of 8,192 tokens are beyond the 4,096 that the model was made for."),
    ],
)
def test_what_a_ranking_cannot_know_is_noted(place, options, note, capfd):
    place.write_text(json.dumps(LLAMA))
    assert main(shlex.split(WORDS)) == 0
    assert note not in capfd.readouterr().out
    assert main(shlex.split(f"{WORDS} {options}")) == 0
    assert note in capfd.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2, "sequence_length must be at most the 1024 learned positions of the model, got 2048"),
        (GPT2 | {"n_embd": "768"}, "config.json: config's n_embd must be an integer of at least 1, got '768'"),
        (LLAMA | {"num_local_experts": "8"}, "config.json: config's num_local_experts must be an integer of at least"),
        (LLAMA | {"model_type": "gemma2"}, "config.json: model_type must be one of"),
    ],
)
def test_a_refusal_names_file_and_key(place, config, message, capsys):
    place.write_text(json.dumps(config))
    assert main(shlex.split(WORDS)) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
