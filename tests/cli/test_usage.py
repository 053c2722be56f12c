"""What the command says of itself and of wrong usage, in this process: nothing is computed."""

import inspect
import json
import shlex
import subprocess
import sys

import pytest

import batchlab
from batchlab.cli import main, verbs
from batchlab.cli.app import command
from batchlab.cli.arguments import learning_target, run_folder
from batchlab.cli.ending import one_line
from batchlab.core.errors import InputError
from batchlab.core.job import Target
from tests.cli.command import environment
from tests.spine.facts_fixture import hand_job

VERBS = (
    "rescale",
    "advise",
    "layout",
    "cost",
    "fit",
    "tune",
    "probe",
    "plan",
    "train",
    "sweep",
    "report",
    "runs",
    "systems",
)
COMMANDS = command().commands


def test_the_verbs_are_all_there():
    assert set(COMMANDS) == set(VERBS)


@pytest.mark.parametrize("verb", ["tune", "probe", "plan", "train", "sweep"])
def test_defaults_are_those_of_the_python_verb(verb):
    ours = inspect.signature(getattr(verbs, verb)).parameters
    theirs = inspect.signature(getattr(batchlab, verb)).parameters
    shared = (set(ours) & set(theirs)) - {"job", "out", "facts", "plan", "batch_sizes"}
    for name in shared:
        assert getattr(ours[name].default, "value", ours[name].default) == theirs[name].default, name
    assert shared, "nothing was compared"


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_that_the_command_understands(verb):
    example = COMMANDS[verb].epilog.removeprefix("Example: ").split(";")[0]
    program, name, *arguments = shlex.split(example)
    assert (program, name) == ("batchlab", verb)
    COMMANDS[verb].make_context(verb, arguments)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb, capsys):
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr()
    assert "--json" in shown.out and "Example: batchlab " + verb in shown.out and shown.err == ""


def test_help_and_wrong_usage_load_nothing_heavy():
    code = """
import sys
from batchlab.cli import main
codes = [main(["tune", "--help"]), main(["plan", "--devices", "0", "digits"]), main(["nothing"]), main(["--version"])]
print(codes, sorted({"torch", "numpy", "sklearn", "duckdb", "optuna", "plotly"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 2, 2, 0] []"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tun"], "No such command 'tun'. Did you mean 'tune'?"),
        (["tune"], "Missing argument 'JOB'."),
        (["tune", "digits", "--goal", "fast"], "'fast' is not one of 'time', 'cost', 'balanced'"),
        (["tune", "digits", "--max-steps", "0"], "Invalid value for '--max-steps'"),
        (["tune", "digits", "--nothing"], "No such option: --nothing"),
        (["tune", "digits", "--at-least", "accuracy"], "--at-least must be METRIC=VALUE with a finite number"),
        (["tune", "digits", "--at-least", "a=1", "--at-most", "b=1"], "--at-least or --at-most, not both"),
        (["plan", "digits", "--facts", "nothing.json"], "cannot read the facts nothing.json: No such file"),
        (["train", "digits"], "--plan is missing"),
        (["train", "digits", "--resume"], "--resume needs --out"),
        (["train", "digits", "--plan", "nothing.json"], "cannot read the plan nothing.json"),
        (["report", "nothing"], "no such folder: nothing"),
        (["runs", "nothing"], "no run at or under nothing"),
        (["probe", "digits", "--out", "."], "--out must name a file, . is a folder"),
    ],
)
def test_wrong_usage_is_one_line_and_2(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith("batchlab: error: ") and message in said.err
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_arguments_is_the_help_and_2(capfd):
    assert main([]) == 2
    assert "Usage: batchlab" in "".join(capfd.readouterr())


def test_a_learning_target_says_its_direction():
    assert learning_target("accuracy=0.97", None) == Target("accuracy", 0.97, "max")
    assert learning_target(None, "loss=1e-1") == Target("loss", 0.1, "min")
    assert learning_target(None, None) is None
    for wrong in ("=1", "loss", "loss=", "loss=nan", "loss=inf", ""):
        with pytest.raises(InputError, match="METRIC=VALUE"):
            learning_target(None, wrong)


def test_a_run_folder_is_named_after_the_job_but_stays_where_it_belongs(monkeypatch):
    folder = run_folder(None, hand_job(name="../../a b/c"))
    assert folder.parent.as_posix() == "runs" and folder.name.startswith("a-b-c-")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(InputError, match="the same on every rank"):
        run_folder(None, hand_job())


def test_a_message_cannot_steer_the_terminal():
    assert one_line("a\n b\x1b[2Jc\u202ed") == r"a b\x1b[2Jc\u202ed"


def test_systems_as_json_is_one_line(capfd):
    assert main(["systems", "--json"]) == 0
    out = capfd.readouterr().out
    assert out.count("\n") == 1 and json.loads(out)["systems"][0]["arxiv"] == "1705.08741"


def test_systems_as_a_table(capfd):
    assert main(["systems"]) == 0
    said = capfd.readouterr()
    assert "1812.06162" in said.out and said.err == "" and "\x1b" not in said.out
