"""The verbs as users run them, in processes of their own, on a user's job file."""

import json
import re
import sys

import pytest

from batchlab.cli import main
from batchlab.core.plan import Plan
from batchlab.core.run import Run
from tests.cli.command import USER_JOB, batchlab
from tests.spine.facts_fixture import hand_facts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a job file, facts of it, a plan, and a finished run."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "train.py").write_text(USER_JOB)
    facts = hand_facts(examples=256, base_learning_rate=0.05, job="line", micro_batches=(8, 16, 32, 64))
    (folder / "facts.json").write_text(facts.to_json())
    planned = batchlab("plan train.py:job --facts facts.json --out plan.json --json", folder)
    assert planned.returncode == 0, planned.stderr
    (folder / "planned.json").write_text(planned.stdout)
    trained = batchlab("train train.py:job --plan plan.json --out runs/a --json", folder)
    assert trained.returncode == 0, trained.stderr
    (folder / "trained.json").write_text(trained.stdout)
    (folder / "trained.err").write_text(trained.stderr)
    plan = json.loads((folder / "plan.json").read_text())
    plan["target"]["value"] = -1.0
    (folder / "never.json").write_text(json.dumps(plan))
    return folder


def test_json_is_one_line_and_the_file_is_the_same_plan(place):
    text = (place / "planned.json").read_text()
    assert text.count("\n") == 1
    assert Plan.from_json(text) == Plan.from_json((place / "plan.json").read_bytes())


def test_what_the_job_prints_goes_to_stderr(place):
    assert "hello from the job" in (place / "trained.err").read_text()
    result = json.loads((place / "trained.json").read_text())
    assert result["run"] == "runs/a" and result["summary"] == Run.open(place / "runs/a").summary


def test_stderr_is_quiet_where_it_is_no_terminal(place):
    assert (place / "trained.err").read_text() == "hello from the job\n"


def test_tables_have_no_colours_in_a_pipe_and_explain_gives_reasons(place):
    done = batchlab("plan train.py:job --facts facts.json --explain", place)
    assert done.returncode == 0 and "\x1b" not in done.stdout
    for name in Plan.from_json((place / "plan.json").read_bytes()).reasons:
        assert name in done.stdout
    assert "picked" in done.stdout


def test_plan_takes_the_python_verbs_arguments(place):
    words = "plan train.py:as_function --facts facts.json --devices 4 --goal time --batch-size 128 --json"
    done = batchlab(words, place)
    plan = Plan.from_json(done.stdout)
    assert (plan.goal, plan.batch_size, plan.world_size) == ("time", 128, 4)


def test_an_existing_run_is_refused_and_named(place):
    done = batchlab("train train.py:job --plan plan.json --out runs/a", place)
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("batchlab: error: ") and "runs/a" in last and "--resume" in last


def test_a_target_never_reached_ends_well_and_says_so(place):
    words = "train train.py:job --plan never.json --out runs/never --max-steps 5 --json"
    done = batchlab(words, place)
    assert done.returncode == 0
    summary = json.loads(done.stdout)["summary"]
    assert (summary["status"], summary["steps"], summary["target_step"]) == ("not reached", 5, None)


def test_resume_goes_on_with_the_runs_own_plan(place):
    first = batchlab("train train.py:job --plan never.json --out runs/more --max-steps 3", place)
    assert first.returncode == 0, first.stderr
    more = batchlab("train train.py:job --out runs/more --resume --max-steps 6 --json", place)
    assert more.returncode == 0, more.stderr
    assert json.loads(more.stdout)["summary"]["steps"] == 6


def test_the_batch_and_the_rate_are_moved_by_name(place):
    given = "--batch-schedule decay_by_batch --schedule linear --max-steps 8"
    done = batchlab(f"train train.py:job --plan never.json --out runs/moved {given} --json", place)
    assert done.returncode == 0, done.stderr
    plan = Run.open(place / "runs/moved").plan
    assert (plan.batch_schedule, plan.schedule, plan.steps) == ("decay_by_batch", "linear", 8)
    assert any("those of a batch that stays" in note for note in plan.notes) == (plan.predicted_steps is not None)
    for name in ("batch_schedule", "schedule", "steps"):
        reason = plan.reasons[name]
        assert (reason.rule, reason.source, reason.value) == ("given by the user", "user", getattr(plan, name))
    given = "--schedule one_cycle --max-steps 3"  # which warms up by itself, whatever was planned
    done = batchlab(f"train train.py:job --plan never.json --out runs/cycle {given} --json", place)
    assert done.returncode == 0, done.stderr
    plan = Run.open(place / "runs/cycle").plan
    assert plan.warmup_examples == 0 and "warmup_examples" not in {
        name for name, reason in plan.reasons.items() if reason.source == "user"
    }


def test_settings_of_a_schedule_are_given_by_name(place):
    words = "train train.py:job --plan never.json --out runs/set --max-steps 4"
    ramp = "--batch-schedule ramp --batch-set end=64 --batch-set over=48 --schedule wsd --schedule-set decay_share=0.5"
    done = batchlab(f"{words} {ramp} --json", place)
    assert done.returncode == 0, done.stderr
    plan = Run.open(place / "runs/set").plan
    assert plan.batch_settings == {"end": 64, "over": 48} and plan.schedule_settings == {"decay_share": 0.5}
    assert len({line["batch_size"] for line in Run.open(place / "runs/set").steps()}) > 1
    for given, message in (
        ("--batch-schedule ramp", "end"),
        (
            "--batch-schedule ramp --batch-set end=64 --batch-set over=65",
            "within the run of 64 examples, 4 steps of 16",
        ),
        ("--batch-schedule ramp --batch-set end", "--batch-set must be NAME=VALUE, got 'end'"),
        ("--batch-set speed=3", "batch_schedule is \"fixed\", got {'speed': 3}"),
    ):
        done = batchlab(f"{words.replace('set', 'bad')} {given}", place)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
        assert not (place / "runs/bad").exists()


def test_report_writes_the_page_beside_the_run(place):
    done = batchlab("report runs/a --json", place)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"report": "runs/a/report.html"}
    assert (place / "runs/a/report.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_runs_lists_them_and_answers_sql(place):
    done = batchlab("runs runs --json", place)
    rows = {row["run"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["a"]["job"] == "line"
    assert rows["a"]["steps"] == Run.open(place / "runs/a").summary["steps"]
    counted = batchlab("""runs runs --json --sql "SELECT count(*) AS n FROM steps WHERE run = 'a'" """, place)
    assert json.loads(counted.stdout) == {"rows": [{"n": rows["a"]["steps"]}]}


BAD_INPUT = [
    ("tune nothing", "there is no job 'nothing'"),
    ("tune text:nothing", "nothing"),
    ("tune nothing.py:job", "nothing.py is not a file"),
    ("tune train.py:number", "train.py:number must be a batchlab.Job"),
    ("tune train.py:nothing", "train.py has no 'nothing'"),
    ("tune train.py:nothing_to_learn_from", "job train data set is empty"),
    ("tune train.py:not_a_number", "nan"),
    ("train train.py:not_a_number --plan nan.json", "nan"),
    ("plan train.py:job --facts facts.json --batch-size 257", "257"),
    ("plan train.py:job --facts train.py", "train.py is not valid JSON"),
    ("plan digits --facts facts.json", "line"),
    ("train digits --plan plan.json", "the plan is for the job 'line'"),
    ("tune digits --target price", "--target names a column of a table job"),
    ("tune table:data.csv --target price", "price"),
    ("tune images:one", "class"),
    ("sweep train.py:job --batch-sizes 5..7", "5..7"),
]


@pytest.mark.parametrize(("words", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_2_and_nothing_is_written(words, message, place, tmp_path, monkeypatch, capfd):
    for name in ("train.py", "facts.json", "plan.json"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    plan = json.loads((place / "plan.json").read_text())
    (tmp_path / "nan.json").write_text(json.dumps(plan | {"job": "nan"}))
    (tmp_path / "data.csv").write_text("rooms,size\n" + "3,50\n" * 50)
    (tmp_path / "one/cats").mkdir(parents=True)
    before = sorted(path for path in tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    code = main(words.split())
    said = capfd.readouterr()
    lines = [line for line in said.err.splitlines() if line != "hello from the job"]
    assert code == 2, said.err
    assert said.out == ""
    assert len(lines) == 1 and lines[0].startswith("batchlab: error: ") and message in lines[0]
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_defect_has_a_traceback_and_1(place):
    (place / "broken.py").write_text("raise RuntimeError('the job is broken')\n")
    done = batchlab("tune broken.py:job", place)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("Traceback") == 1 and "batchlab/cli" not in done.stderr
    assert done.stderr.splitlines()[-1] == "batchlab: error: RuntimeError: the job is broken, from broken.py:1"


def test_a_file_that_is_no_python_is_told_with_its_place(place):
    (place / "half.py").write_text("import torch\ndef job(:\n")
    done = batchlab("tune half.py:job", place)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "batchlab: error: SyntaxError: invalid syntax, in half.py:2"


RAISING = """
import dataclasses


class Data(list):
    def __getitem__(self, index):
        raise KeyError(f"no image {index}")


job = dataclasses.replace(job, train=Data(job.train))
"""


def test_what_raises_within_the_users_data_is_told_with_its_place(place):
    text = (place / "train.py").read_text() + RAISING
    (place / "at17.py").write_text(text)
    line = 1 + text[: text.index("raise KeyError")].count("\n")
    done = batchlab("probe at17.py:job --budget 1", place)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "batchlab/cli" not in done.stderr
    assert re.fullmatch(rf"batchlab: error: KeyError: 'no image \d+', from at17.py:{line}", said)


def test_a_run_is_resumed_by_its_own_seed(place):
    first = batchlab("train train.py:job --plan never.json --out runs/seeded --seed 3 --max-steps 3", place)
    assert first.returncode == 0, first.stderr
    more = batchlab("train train.py:job --out runs/seeded --resume --max-steps 5 --json", place)
    assert more.returncode == 0, more.stderr
    assert Run.open(place / "runs/seeded").meta["seed"] == 3


def test_only_the_first_rank_speaks(place):
    words = "plan train.py:job --facts facts.json --json"
    done = batchlab(words, place, TORCHELASTIC_RUN_ID="x", RANK="1", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    assert done.returncode == 0 and done.stdout == ""


def test_probe_only_measures_what_is_asked_for_and_keeps_it_in_the_run(place):
    done = batchlab("probe train.py:job --only noise,landscape --at runs/a --budget 1 --out found.json", place)
    assert done.returncode == 0, done.stderr
    assert "Noise scale" in done.stdout and "Width of the minimum" in done.stdout and "Kept in runs/a" in done.stdout
    assert (place / "found.json").read_text() == (place / "runs/a/findings.json").read_text()
    reported = batchlab("report runs/a", place)
    assert reported.returncode == 0 and "Loss landscape" in (place / "runs/a/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--only nois", "only must name some of noise, memory, curvature, energy, landscape, got ['nois']"),
        ("--at runs/a", "--at is for --only"),
        ("--only noise --at-least loss=1", "--at-least and --at-most are for all facts"),
        ("--only noise --at nowhere", "nowhere is not a run folder"),
    ],
)
def test_probe_only_names_what_is_wrong(place, words, message):
    done = batchlab(f"probe train.py:job {words}", place)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


MUTE = """
class Mute(Exception):
    def __str__(self):
        return self.message


"""


def test_an_exception_that_cannot_be_told_is_told_of(place):
    raising = RAISING.replace('raise KeyError(f"no image {index}")', "raise Mute")
    (place / "mute.py").write_text((place / "train.py").read_text() + MUTE + raising)
    done = batchlab("probe mute.py:job --budget 1", place)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "another exception" not in done.stderr
    assert "Mute" in said and "from mute.py:" in said
