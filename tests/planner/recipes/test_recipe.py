"""A recipe's own arithmetic, the forms it is read from, and its two texts."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.planner import Recipe, read_recipe
from batchlab.planner.recipes.optimizers import _TRAITS, traits
from batchlab.planner.recipes.toml import read_toml, write_toml
from batchlab.rules.learning_rate import FAMILY
from batchlab.rules.optimizer_family import decay_kind
from tests.planner.recipes.strategies import recipes

BASE = {"batch_size": 256, "optimizer": "adamw", "learning_rate": 1e-3}


def of(**settings):
    return Recipe.of(**(BASE | settings))


@given(recipes(devices=lambda size: st.integers(1, size)))
def test_both_texts_give_it_back(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_toml(recipe.to_toml()).to_toml() == recipe.to_toml()


VALUES = st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@example(values={"a": '\x7f\t\\"\n\u2028é𝄞'})
@given(st.dictionaries(st.from_regex(r"[A-Za-z0-9_-]+", fullmatch=True), VALUES | st.lists(st.floats(-1e9, 1e9))))
def test_any_flat_toml_is_read_back_by_the_standard_library(values):
    comments = {name: f"a note\non {name}\x00" for name in values}
    assert read_toml(write_toml(values, comments=comments, head=["two\nlines"])) == values


def test_nothing_else_is_written():
    with pytest.raises(TypeError, match="cannot be written as TOML: NoneType None"):
        write_toml({"a": None})


@pytest.mark.parametrize(
    ("length", "total"),
    [
        ({"steps": 1000}, 256_000),
        ({"epochs": 90, "train_examples": 1_281_167}, 115_305_030),
        ({"epochs": 0.1, "train_examples": 30}, 3),
        ({"epochs": 0.15, "train_examples": 30}, 5),  # 4.5 exactly: up, though 0.15*30 is below it in binary
        ({"total_examples": 12_345}, 12_345),
        ({"total_examples": 3e9}, 3_000_000_000),
        ({"steps": None, "total_examples": 7}, 7),
    ],
)
def test_the_length_in_each_form(length, total):
    assert of(**length).total_examples == total


@pytest.mark.parametrize(
    ("warmup", "examples"),
    [
        ({}, 0),
        ({"warmup_steps": 10}, 2560),
        ({"warmup_share": 0.1}, 100),
        ({"warmup_share": 0}, 0),
        ({"warmup_share": 1}, 1000),
        ({"warmup_examples": 17}, 17),
        ({"warmup_epochs": 5, "train_examples": 100}, 500),
        ({"warmup_epochs": 0, "train_examples": 100}, 0),
    ],
)
def test_the_warm_up_in_each_form(warmup, examples):
    assert of(total_examples=1000, **warmup).warmup_examples == examples


def test_counts_that_follow():
    recipe = of(total_examples=1000, warmup_examples=257, train_examples=400, devices=3, micro_batch=50)
    assert (recipe.steps, recipe.warmup_steps, recipe.epochs) == (4, 2, 2.5)
    assert (recipe.share, recipe.accumulation) == (86, 2)
    assert of(total_examples=1024).steps == 4 and of(total_examples=1).steps == 1


@pytest.mark.parametrize(
    ("layout", "updates"),
    [
        ({}, 1),
        ({"micro_batch": 64}, 4),
        ({"micro_batch": 100}, 3),
        ({"micro_batch": 1000}, 1),
        ({"ghost_batch_size": 32}, 8),
        ({"ghost_batch_size": 1000}, 1),
        ({"micro_batch": 100, "ghost_batch_size": 32}, 4 + 4 + 2),
        ({"devices": 4, "ghost_batch_size": 32}, 2),
    ],
)
def test_updates_of_running_statistics_counted_by_hand(layout, updates):
    recipe = of(total_examples=1000, **layout)
    assert recipe.norm_updates == updates
    passes = torch.arange(recipe.share).split(recipe.micro_batch or recipe.share)
    assert sum(len(part.split(recipe.ghost_batch_size or recipe.share)) for part in passes) == updates


def test_half_life_of_the_average():
    recipe = of(total_examples=1000, ema_decay=0.5**0.1, ema_every=4)
    assert recipe.ema_half_life == pytest.approx(10 * 4 * 256, rel=1e-12)
    assert of(total_examples=1000).ema_half_life is None and of(steps=1, ema_decay=1.0).ema_half_life is None


@pytest.mark.parametrize("name", [name for name, known in _TRAITS.items() if known.defaults])
def test_defaults_are_torchs(name):
    """Of what a recipe holds, `takes` is all that torch's optimizer has, and `defaults` are its defaults."""
    make = {type_.lower(): type_ for type_ in dir(torch.optim)}[name]
    torchs = {key: p.default for key, p in inspect.signature(getattr(torch.optim, make)).parameters.items()}
    known = traits(name)
    assert {key: torchs[key] for key in known.takes} == known.defaults
    recipe = Recipe(8, 80, name, 0.1)
    assert all(getattr(recipe, key) == value for key, value in known.defaults.items())


def test_every_optimizer_with_a_rule_has_a_recipe():
    assert set(_TRAITS) <= set(FAMILY)
    for name in FAMILY:
        assert Recipe(8, 80, name, 0.1).optimizer == name
    assert Recipe(8, 80, "AdamW", 0.1) == Recipe(8, 80, "adamw", 0.1)


def test_numpys_numbers_are_numbers():
    mine = Recipe(np.int64(8), np.int32(80), "adam", np.float32(0.5), betas=np.array([0.5, 0.75]), eps=np.float64(1e-8))
    assert mine == Recipe(8, 80, "adam", 0.5, betas=(0.5, 0.75), eps=1e-8)
    assert type(mine.batch_size) is int and type(mine.learning_rate) is float and type(mine.betas[0]) is float
    assert Recipe.of(**(BASE | {"steps": np.int64(3), "batch_size": np.int64(2)})).total_examples == 6
    assert of(total_examples=100, warmup_share=np.float64(0.1)).warmup_examples == 10


def test_tokens_are_called_tokens():
    recipe = of(unit="tokens", batch_size=524_288, total_tokens=1e10, warmup_tokens=1e8)
    assert recipe.total_examples == 10**10 and recipe.settings()["warmup_tokens"] == 10**8
    assert "total_tokens = 10000000000\n" in recipe.to_toml() and "examples" not in recipe.to_toml()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give exactly one of steps, epochs, total_examples, got none"),
        ({"steps": 1, "epochs": 2}, "give exactly one of steps, epochs, total_examples, got steps and epochs"),
        ({"unit": "tokens"}, "give exactly one of steps, epochs, total_tokens, got none"),
        (
            {"steps": 1, "warmup_steps": 1, "warmup_share": 0.1},
            "give at most one of warmup_steps, warmup_epochs, warmup_share, warmup_examples, got warmup_steps and "
            "warmup_share",
        ),
        ({"epochs": 2}, "epochs needs train_examples, the size of the data set"),
        ({"epochs": 2, "unit": "tokens"}, "epochs needs train_tokens, the size of the data set"),
        ({"epochs": math.nan, "train_examples": 5}, "epochs must be finite and > 0, got nan"),
        ({"epochs": 0.01, "train_examples": 5}, "total_examples must be an integer of at least 1, got 0"),
        ({"steps": 1.5}, "steps must be an integer of at least 1, got 1.5"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"steps": 1, "warmup_share": 5}, r"warmup_share must lie in \[0, 1\], got 5"),
        ({"steps": 1, "warmup_epochs": -1}, "warmup_epochs must be finite and > 0, got -1"),
        ({"steps": 1, "warmup_steps": -1}, "warmup_steps must be an integer of at least 0, got -1"),
        ({"steps": 1, "lr": 0.1}, "a recipe has no setting 'lr': did you mean 'learning_rate'?"),
        ({"steps": 1, "wieght_decay": 0.1}, "a recipe has no setting 'wieght_decay': did you mean 'weight_decay'?"),
        ({"steps": 1, "total_exmples": 1}, "a recipe has no setting 'total_exmples': did you mean 'total_examples'?"),
        ({"total_tokens": 5}, "total_tokens is not in the recipe's unit, which is 'examples': give total_examples"),
        (
            {"unit": "tokens", "total_examples": 5},
            "total_examples is not in the recipe's unit, which is 'tokens': give total_tokens",
        ),
        ({"unit": "images", "steps": 1}, 'unit must be "examples" or "tokens", got \'images\''),
        (
            {"optimizer": None, "steps": 1},
            "a recipe needs batch_size, optimizer, learning_rate: optimizer is not given",
        ),
        ({"optimizer": {"name": "sgd"}, "steps": 1}, "optimizer must be a name, got {'name': 'sgd'}"),
        ({"optimizer": "adamx", "steps": 1}, "optimizer must be one of .*got 'adamx': no learning-rate rule for it"),
        ({"momentum": 0.9, "steps": 1}, "adamw takes no momentum, got 0.9"),
        ({"batch_size": 0, "steps": 1}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": True, "steps": 1}, "batch_size must be an integer of at least 1, got True"),
        ({"learning_rate": 0, "steps": 1}, "learning_rate must be finite and > 0, got 0"),
        ({"learning_rate": True, "steps": 1}, "learning_rate must be a number, got True"),
        ({"total_examples": 2**63}, r"total_examples must be below 2\^63, got 9223372036854775808"),
        ({"learning_rate": "1e-3", "steps": 1}, "learning_rate must be finite and > 0, got '1e-3'"),
        ({"betas": 0.9, "steps": 1}, r"betas must be two numbers in \[0, 1\) for adamw, got 0.9"),
        ({"betas": [0.9, 1.0], "steps": 1}, r"betas must be two numbers .*got \(0.9, 1.0\)"),
        ({"betas": [0.9, math.nan], "steps": 1}, r"betas must be two numbers .*got \(0.9, nan\)"),
        (
            {"betas": [0.9, 0.99, 0.999], "steps": 1},
            r"betas must be two numbers in \[0, 1\) for adamw, got \(0.9, 0.99",
        ),
        ({"optimizer": "came", "betas": [0.9, 0.99], "steps": 1}, "betas must be three numbers .* for came, got"),
        ({"optimizer": "adan", "betas": [0.9, 0.99], "steps": 1}, "betas must be three numbers .* for adan, got"),
        ({"optimizer": "soap", "betas": [0.9], "steps": 1}, "betas must be two or three numbers .* for soap, got"),
        ({"steps": 1, "foo": 1}, "a recipe has no setting 'foo': it has batch_size, optimizer, .*total_examples"),
        ({"steps": 1, "unit": "tokens", "foo": 1}, "no setting 'foo': it has batch_size, .*total_tokens"),
        ({"eps": -1e-8, "steps": 1}, "eps must be finite and >= 0, got -1e-08"),
        ({"weight_decay": math.inf, "steps": 1}, "weight_decay must be finite and >= 0, got inf"),
        ({"ema_decay": 1.1, "steps": 1}, r"ema_decay must lie in \[0, 1\], got 1.1"),
        ({"clip_norm": 0, "steps": 1}, "clip_norm must be finite and > 0, got 0"),
        ({"noise_scale": math.nan, "steps": 1}, "noise_scale must be > 0, got nan"),
        ({"devices": 257, "steps": 1}, "devices must be at most batch_size = 256, as every device needs .*got 257"),
        ({"micro_batch": 0.5, "steps": 1}, "micro_batch must be an integer of at least 1, got 0.5"),
        ({"schedule": "", "steps": 1}, "schedule must be a name, got ''"),
    ],
)
def test_what_is_wrong_is_named(settings, message):
    with pytest.raises(InputError, match=message):
        of(**settings)


def test_momentum_of_one_would_never_forget():
    with pytest.raises(InputError, match=r"momentum must lie in \[0, 1\), got 1"):
        Recipe(8, 80, "sgd", 0.1, momentum=1)


def test_files(tmp_path):
    recipe = of(steps=100, warmup_share=0.1, noise_scale=math.inf)
    for name, text in (("a.toml", recipe.to_toml()), ("a.json", recipe.to_json()), ("a.txt", recipe.to_toml())):
        (tmp_path / name).write_text(text)
        assert read_recipe(tmp_path / name) == recipe
    (tmp_path / "b.toml").write_text('batch_size = 8\noptimizer = "sgd"\nlearning_rate = 0.1\nstep = 3\n')
    with pytest.raises(InputError, match=r"b.toml: a recipe has no setting 'step': did you mean 'steps'\?"):
        read_recipe(tmp_path / "b.toml")
    (tmp_path / "c.toml").write_text("batch_size = \n")
    with pytest.raises(InputError, match="c.toml is not valid TOML: "):
        read_recipe(tmp_path / "c.toml")
    with pytest.raises(InputError, match=r"^cannot read the recipe [^ ]*none.toml: No such file or directory$"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(InputError, match="JSON: a recipe must be a table of settings, got list"):
        Recipe.from_json("[]")


def test_files_as_other_editors_leave_them(tmp_path):
    recipe = of(steps=100)
    (tmp_path / "a.JSON").write_text(recipe.to_json())
    (tmp_path / "b.toml").write_text(recipe.to_toml(), encoding="utf-8-sig")
    (tmp_path / "c.json").write_text(recipe.to_json(), encoding="utf-8-sig")
    assert all(read_recipe(tmp_path / name) == recipe for name in ("a.JSON", "b.toml", "c.json"))


def test_no_warm_up_needs_no_data_set():
    assert of(steps=10, warmup_epochs=0).warmup_examples == of(steps=10, warmup_epochs=0.0).warmup_examples == 0
    with pytest.raises(InputError, match="warmup_epochs needs train_examples"):
        of(steps=10, warmup_epochs=1)


def test_every_kind_of_decay_is_that_of_the_rules():
    assert {name: traits(name).decay for name in FAMILY} == {name: decay_kind(name) for name in FAMILY}
    for name in ("came", "adan", "ademamix"):
        assert Recipe(8, 80, name, 0.1, betas=(0.9, 0.99, 0.999)).betas == (0.9, 0.99, 0.999)
