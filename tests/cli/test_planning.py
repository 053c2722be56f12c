"""The verbs that answer from rules alone, as users run them."""

import inspect
import json
import shlex

import pytest

from batchlab import planner
from batchlab.cli import main, planning
from batchlab.planner import Advice, Recipe, Rescaled, advise, read_recipe
from batchlab.planner import recipe as rescale
from tests.cli.command import batchlab

RECIPE = (
    'batch_size = 256\noptimizer = "adamw"\nlearning_rate = 3e-4\nsteps = 1000\nwarmup_steps = 20\nema_decay = 0.99\n'
)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize(("verb", "function"), [("rescale", planner.recipe), ("advise", planner.advise)])
def test_defaults_are_those_of_python(verb, function):
    ours, theirs = inspect.signature(getattr(planning, verb)).parameters, inspect.signature(function).parameters
    shared = set(ours) & set(theirs) - {"recipe"}
    assert len(shared) >= 6
    for name in shared:
        assert ours[name].default == theirs[name].default, name


def test_rescale_prints_the_table_and_writes_a_recipe_that_goes_on(place):
    done = batchlab("rescale recipe.toml --to 8192 --devices 64 --noise-scale 2000 --out new.toml", place)
    assert done.returncode == 0, done.stderr
    wanted = rescale(read_recipe(place / "recipe.toml"), 8192, devices=64, noise_scale=2000.0)
    assert done.stdout.startswith(wanted.table()) and "Recipe: new.toml" in done.stdout
    assert Recipe.from_toml((place / "new.toml").read_text()) == wanted.recipe
    again = batchlab("rescale new.toml --to 256 --devices 1 --noise-scale 2000 --json", place)
    back = Rescaled.from_json(again.stdout).recipe
    assert back.learning_rate == pytest.approx(3e-4) and back.total_examples == 256_000


def test_advise_is_the_python_advice(place):
    done = batchlab("advise --params 7e9 --tokens 300e9 --json", place)
    assert done.returncode == 0 and Advice.from_json(done.stdout) == advise(params=7e9, tokens=300e9)
    table = batchlab("advise --params 7e9 --tokens 300e9", place).stdout
    assert table.rstrip() == advise(params=7e9, tokens=300e9).table().rstrip() and "\x1b" not in table


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rescale nothing.toml --to 512", "nothing.toml"),
        ("rescale recipe.toml --to 0", "to_batch must be an integer of at least 1, got 0"),
        ("rescale recipe.toml", "Missing option '--to'"),
        ("rescale recipe.toml --to 512 --rule cubic", "cubic"),
        ("rescale recipe.toml --to 512 --betas third", "betas must be one of"),
        ("advise --params 7 --tokens 300", "are these thousands, millions, billions or sequences?"),
        ("advise --params 7e9 --tokens 300e9 --batch-tokens 512", "is it in sequences?"),
        ("advise --params 7e9 --tokens 300e9 --optimizer adamx", "adamx"),
        ("advise --params seven --tokens 300e9", "Invalid value for '--params'"),
    ],
)
def test_wrong_usage_is_one_line_and_two(place, line, message, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(shlex.split(line)) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1, said.err
    assert said.out == "" and sorted(p.name for p in place.iterdir()) == ["recipe.toml"]


def test_a_recipe_with_a_slip_is_refused_by_name(place):
    (place / "slip.toml").write_text(RECIPE.replace("ema_decay", "ema_deacy"))
    done = batchlab("rescale slip.toml --to 512", place)
    assert done.returncode == 2 and "ema_deacy" in done.stderr and "ema_decay" in done.stderr
    assert json.loads(batchlab("rescale recipe.toml --to 512 --json", place).stdout)["recipe"]["batch_size"] == 512
