"""The report's part on tensors: what the lines hold, drawn and in a table."""

import json
import math

from batchlab.core.run import Run
from batchlab.spine.report import report
from batchlab.spine.tensor_chapter import tensors, tensors_of
from batchlab.spine.train import train
from batchlab.viz.tensors import update_ratios
from tests.spine.jobs import toy_job, toy_plan

LINES = [
    {"step": 1},
    {"step": 2, "tensors": {"w": {"update_ratio": 0.5, "trust_ratio": 2.0}, "b": {"update_ratio": "inf"}}},
    {"step": 4, "tensors": {"w": {"update_ratio": 0.25, "trust_ratio": 1.0}, "b": {"update_ratio": 0.75}}},
]


def test_lines_become_a_chart_and_a_table():
    rows = tensors_of(LINES)
    assert [step for step, _ in rows] == [2, 4] and math.isinf(rows[0][1]["b"]["update_ratio"])
    section = tensors(rows)
    table = section.blocks[0].table
    assert table.columns == ("Tensor", "Update ratio", "Trust ratio")
    assert [row[0] for row in table.rows] == ["b", "w"] and table.rows[0][2] == ""
    drawn = {trace.name: list(trace.y) for trace in section.blocks[0].figure.data}
    assert drawn == {"b": [0.75], "w": [0.5, 0.25]}
    assert tensors([]) is None


def test_many_tensors_are_grey_but_for_the_furthest():
    figure = update_ratios({f"t{i}": [(1, 10.0**-i), (2, 10.0**-i)] for i in range(7)})
    assert [trace.name for trace in figure.data] == ["other tensors"] * 3 + ["t0", "t1", "t2", "t3"]
    assert [trace.showlegend for trace in figure.data[:3]] == [True, False, False]
    assert update_ratios({"w": [(1, 0.0), (2, math.inf)]}).data == ()


def test_a_run_notes_them_where_it_evaluates(tmp_path):
    plan = toy_plan(
        16, micro_batch=16, optimizer="lamb", learning_rate=0.01, hyperparameters={}, steps=6, evaluate_every=3
    )
    run = train(toy_job(), plan, out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [bool(line.get("tensors")) for line in lines] == [False, False, True, False, False, True]
    noted = lines[-1]["tensors"]
    assert all(found["update_ratio"] > 0 for found in noted.values()) and any(
        "trust_ratio" in f for f in noted.values()
    )
    page = report(Run.open(run.path), tmp_path / "page.html").read_text()
    assert "How far an update moves each tensor" in page
