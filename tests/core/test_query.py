"""SQL over run folders: right numbers, torn lines left out, and no way out of the two tables."""

import json
import math

import pytest

from batchlab.core.errors import InputError
from batchlab.core.query import query
from batchlab.core.run import Run


def write(folder, losses, *, status="finished", torn=False, created="2030-01-01"):
    """A run folder with one step a loss, 64 examples each."""
    folder.mkdir(parents=True)
    plan = {
        "job": "digits",
        "goal": "time",
        "optimizer": "adamw",
        "batch_size": 64,
        "micro_batch": 32,
        "accumulation": 2,
        "world_size": 1,
        "steps": 9,
        "learning_rate": 0.1,
        "predicted_steps": {"value": "inf", "low": 1.0, "high": "inf", "method": "none", "coverage": 0.95},
    }
    meta = {"schema": 1, "name": folder.name, "created": created, "status": status, "seed": 3, "world_size": 1}
    (folder / "run.json").write_text(json.dumps(meta | {"plan": plan, "summary": None}))
    lines = [
        {"step": i, "position": 64 * i, "batch_size": 64, "lr": 0.1, "loss": loss, "grad_norm": 1.0, "seconds": 0.5}
        | {"noise_scale": {"value": 3.0, "low": 1.0, "high": "inf"}, "examples_per_second": 128.0, "skipped": i == 2}
        for i, loss in enumerate(losses, start=1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "steps.jsonl").write_text(text + ('{"step": 99, "pos' if torn else ""))


def test_overview_is_what_the_runs_say(tmp_path):
    write(tmp_path / "a", [3.0, 2.0, 1.0], torn=True)
    write(tmp_path / "deep/b", [], created="2029-01-01")
    b, a = query(tmp_path)
    assert (a["run"], b["run"]) == ("a", "deep/b")
    summary = Run.open(tmp_path / "a").summary
    assert (a["steps"], a["seconds"]) == (summary["steps"], summary["seconds"]) == (3, 1.5)
    assert (b["steps"], b["seconds"], b["predicted_steps"]) == (0, 0.0, math.inf)


def test_a_prediction_is_the_summarys_where_there_is_one(tmp_path):
    for name, told in (("a", None), ("b", 7.0)):
        write(tmp_path / name, [1.0])
        meta = json.loads((tmp_path / name / "run.json").read_text())
        (tmp_path / name / "run.json").write_text(json.dumps(meta | {"summary": {"predicted_steps": told}}))
    assert {row["run"]: row["predicted_steps"] for row in query(tmp_path)} == {"a": None, "b": 7.0}
    for name, planned in (("c", 64), ("d", 32)):
        write(tmp_path / name, [1.0], status="running")
        meta = json.loads((tmp_path / name / "run.json").read_text())
        meta["plan"]["reasons"] = {"predicted_steps": {"inputs": {"batch_size": planned, "optimizer": "adamw"}}}
        (tmp_path / name / "run.json").write_text(json.dumps(meta))
    told = {row["run"]: row["predicted_steps"] for row in query(tmp_path)}
    assert told["c"] == math.inf and told["d"] is None


def test_non_finite_numbers_are_numbers(tmp_path):
    write(tmp_path / "a", [1.0, "nan", "inf"])
    rows = query(tmp_path, "SELECT loss, noise_high FROM steps ORDER BY step")
    assert rows[0] == {"loss": 1.0, "noise_high": math.inf}
    assert math.isnan(rows[1]["loss"]) and rows[2]["loss"] == math.inf


def test_a_run_is_a_folder_of_one_run(tmp_path):
    write(tmp_path / "a", [1.0])
    assert [row["run"] for row in query(tmp_path / "a")] == [""]


def test_names_with_quotes_and_braces(tmp_path):
    write(tmp_path / "it's {a} [run]*", [1.0])
    (row,) = query(tmp_path)
    assert row["run"] == "it's {a} [run]*" and row["steps"] == 1


@pytest.mark.parametrize(
    "sql",
    [
        "COPY steps TO 'out.csv'",
        "SELECT * FROM read_text('/etc/hostname')",
        "ATTACH 'other.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SELEC",
    ],
)
def test_a_query_sees_the_two_tables_and_nothing_else(sql, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", [1.0])
    with pytest.raises(InputError, match=r"^DuckDB: [^\n]*$"):
        query(tmp_path, sql)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match=r"no run at or under .*nothing"):
        query(tmp_path / "nothing")
    write(tmp_path / "a", [1.0])
    with pytest.raises(InputError, match="two columns one name"):
        query(tmp_path, "SELECT 1 AS x, 2 AS x FROM steps")
