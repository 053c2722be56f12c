"""The verbs that answer from rules alone, as users run them."""

import inspect
import json
import math
import re
import shlex
from textwrap import dedent

import pytest

from batchlab import planner
from batchlab.cli import main, planning
from batchlab.planner import Advice, Recipe, Rescaled, advise, read_recipe
from batchlab.planner import recipe as rescale
from batchlab.planner.hardware import hardware
from batchlab.planner.recipes.settings import KNOWN
from batchlab.rules.fit import Fit
from tests.cli.command import batchlab

RECIPE = (
    'batch_size = 256\noptimizer = "adamw"\nlearning_rate = 3e-4\nsteps = 1000\nwarmup_steps = 20\nema_decay = 0.99\n'
)


CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "intermediate_size": 13824,
    "vocab_size": 128000,
}
RUNS = "tokens,batch_tokens\n1e9,2e5\n1e10,4e5\n1e11,8e5\n"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "runs.csv").write_text(RUNS)
    return tmp_path


@pytest.mark.parametrize(
    ("verb", "function", "least"),
    [
        ("rescale", planner.recipe, 5),
        ("advise", planner.advise, 6),
        ("layout", planner.layout, 1),
        ("cost", planner.cost_table, 2),
    ],
)
def test_defaults_are_those_of_python(verb, function, least):
    ours, theirs = inspect.signature(getattr(planning, verb)).parameters, inspect.signature(function).parameters
    shared = set(ours) & set(theirs) - {"recipe", "devices", "mfu", "sequence_length", "keep"}
    assert len(shared) >= least
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


def test_layout_ranks_what_fits(place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    words = "layout config.json --device A100-80 --devices 64 --batch 2048"
    assert main([*shlex.split(words), "--json"]) == 0
    found = planner.Layouts.from_json(capfd.readouterr().out)
    cluster = planner.Cluster(64, hardware()["A100-80"])
    shape = planner.ModelShape.from_config(CONFIG)
    assert found == planner.layout(shape, cluster, global_batch=2048, sequence_length=2048, keep=10)
    assert main(shlex.split(words)) == 0
    assert found.best.name in capfd.readouterr().out


def test_cost_prices_every_cell_and_says_whose_price(place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    words = (
        "cost --params 1e9 --tokens 2e10 --device A100-80,H100-80 --devices 8,64 --batch 256..512 --strategy ddp,full"
    )
    assert main([*shlex.split(words), "--json"]) == 0
    rows = planner.CostTable.from_json(capfd.readouterr().out).rows
    assert len(rows) == 16 and {row.price.as_of for row in rows} == {hardware()["A100-80"].price_as_of}
    assert main([*shlex.split(words), "--price", "2.0", "--json"]) == 0
    mine = planner.CostTable.from_json(capfd.readouterr().out).rows
    assert all(row.dollars == pytest.approx(2.0 * row.device_hours) for row in mine)


def test_hardware_of_ones_own(place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    entry = dedent("""
        [device.mine]
        memory = "32 GiB"
        peak = "100 TFLOP/s"
        memory_bandwidth = "1 TB/s"
        link_bandwidth = "50 GB/s"
        power = "250 W"
        devices_per_node = 4
        source = "my own"
        as_of = "2026-01-01"
    """)
    (place / "mine.toml").write_text(entry)
    words = "cost --params 1e8 --tokens 1e9 --device mine --batch 64 --hardware mine.toml --json"
    assert main(shlex.split(words)) == 0
    assert planner.CostTable.from_json(capfd.readouterr().out).rows[0].dollars is None


def test_fit_of_one_law_and_of_all_that_the_runs_tell(place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    assert main(shlex.split("fit runs.csv --law power_law --set x=tokens --set y=batch_tokens --json")) == 0
    found = Fit.from_json(capfd.readouterr().out)
    assert found.constants["b"].value == pytest.approx(math.log10(2))
    rows = ["batch_examples,steps_to_target", *(f"{b},{100 * (1 + 64 / b)}" for b in (8, 16, 32, 64, 128, 256))]
    (place / "steps.csv").write_text("\n".join(rows))
    assert main(shlex.split("fit steps.csv")) == 0
    told = capfd.readouterr().out
    assert "critical_batch: " in told and "not fitted: chinchilla: " in told


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
        ("layout config.json --device A1000 --devices 64 --batch 2048", "device must be one of"),
        ("layout recipe.toml --device A100-80 --devices 64 --batch 2048", "recipe.toml is not valid JSON"),
        ("layout config.json --device T4 --devices 1 --batch 8", "least"),
        ("cost --params 1e9 --tokens 2e10 --device A100-80 --batch many", "batch_sizes must be integers"),
        ("cost --params 1e9 --tokens 2e10 --device A100-80 --batch 64 --strategy zero", "strategy"),
        ("cost --params 1e12 --tokens 2e10 --device T4 --batch 64", "no cell of the grid can be"),
        ("fit nothing.csv", "path must be a CSV file or a folder of runs"),
        ("fit runs.csv", "these runs tell no law; --law NAME says why not: power_law"),
        ("fit runs.csv --law power_law", "power_law needs the options x, y"),
        ("fit runs.csv --law gravity", "law must be one of power_law"),
        ("fit runs.csv --law power_law --set x", "--set must be NAME=VALUE, got 'x'"),
        ("fit runs.csv --set x=tokens", "--set is for one law"),
        ("advise --params seven --tokens 300e9", "Invalid value for '--params'"),
    ],
)
def test_wrong_usage_is_one_line_and_two(place, line, message, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(shlex.split(line)) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1, said.err
    assert said.out == "" and sorted(p.name for p in place.iterdir()) == ["config.json", "recipe.toml", "runs.csv"]


def test_a_recipe_with_a_slip_is_refused_by_name(place):
    (place / "slip.toml").write_text(RECIPE.replace("ema_decay", "ema_deacy"))
    done = batchlab("rescale slip.toml --to 512", place)
    assert done.returncode == 2 and "ema_deacy" in done.stderr and "ema_decay" in done.stderr
    assert json.loads(batchlab("rescale recipe.toml --to 512 --json", place).stdout)["recipe"]["batch_size"] == 512


def test_rescales_help_names_every_setting_of_a_recipe(place):
    told = set(re.findall(r"\w+", planning.rescale.__doc__))
    assert set(KNOWN) <= told and "JSON" in batchlab("rescale --help", place).stdout
    given = 'batch_size = 256\noptimizer = "adamw"\nlearning_rate = 3e-4\nsteps = 1000'
    assert all(line in planning.rescale.__doc__ for line in given.split("\n"))
    assert Recipe.from_toml(given).steps == 1000
