"""The report's part on batch size and learning rate: drawn from the lines, and not where neither moved."""

import dataclasses

import numpy as np
import pytest

from batchlab.core.plan import Reason
from batchlab.core.query import query
from batchlab.core.run import Run
from batchlab.spine.columns import columns
from batchlab.spine.course_chapter import course
from batchlab.spine.headline import sizes
from batchlab.spine.report import report
from batchlab.spine.train import train
from batchlab.viz.course import batch_course, rate_course
from tests.spine.jobs import toy_job, toy_plan


def lines(sizes, rates):
    seen = np.cumsum(sizes).tolist()
    return [
        {"step": step + 1, "position": at, "seconds": 0.1, "batch_size": size, "lr": rate, "loss": 1.0}
        for step, (at, size, rate) in enumerate(zip(seen, sizes, rates, strict=True))
    ]


def test_a_batch_that_moves_is_drawn_at_every_change():
    section = course(toy_plan(batch_schedule="norm_test"), columns(lines([16, 16, 32, 32, 64], [0.1] * 5)))
    batch, rate = section.blocks[0].charts
    (trace,) = batch.figure.data
    assert list(trace.x) == [16, 32, 64, 96, 160] and list(trace.y) == [16, 16, 32, 32, 64]
    assert list(rate.figure.data[0].y) == [0.1] * 5
    assert "2 changes, from 16 to 64 examples: 5 updates" in section.blocks[1].text
    assert [row[1] for row in batch.table.rows] == ["16", "16", "32", "32", "64"]


def test_a_batch_that_should_have_moved_and_did_not_is_told():
    section = course(toy_plan(batch_schedule="adaptive"), columns(lines([16] * 5, [0.1] * 5)))
    assert section.blocks[1].text == "It never moved: 16 examples in each of 5 updates."


def test_a_batch_that_its_maximum_held_is_told(tmp_path):
    capped = [line | {"capped": line["step"] > 3} for line in lines([16, 16, 32, 64, 64], [0.1] * 5)]
    plan = toy_plan(batch_schedule="norm_test", max_batch_size=64)
    said = "In 2 updates it would have been larger but for its maximum, max_batch_size 64"
    assert course(plan, columns(capped)).blocks[1].text.endswith(f"{said}.")
    reasons = {"max_batch_size": Reason("up to 16·B_crit", "paper", {}, 64)}
    planned = dataclasses.replace(plan, reasons=reasons)
    assert course(planned, columns(capped)).blocks[1].text.endswith(f"{said}: up to 16·B_crit.")
    run = train(toy_job(), dataclasses.replace(plan, batch_size=16), out=tmp_path / "run", device="cpu")
    held = sum(line.get("capped", False) for line in run.steps())
    assert 0 < held < run.summary["steps"]
    assert sizes(run)[1] == ("Held by its maximum", f"{held} of {run.summary['steps']} steps", "max_batch_size 64")
    (row,) = query(run.path, "SELECT count(*) FILTER (capped) AS held, count(*) AS steps FROM steps")
    assert row == {"held": held, "steps": run.summary["steps"]}


def test_nothing_is_shown_where_nothing_moved():
    assert course(toy_plan(), columns(lines([16] * 5, [0.1] * 5))) is None
    assert course(toy_plan(), columns([])) is None
    section = course(toy_plan(schedule="linear"), columns(lines([16] * 5, [0.5, 0.4, 0.3, 0.2, 0.1])))
    assert len(section.blocks) == 1


@pytest.mark.parametrize("steps", [1, 3000, 20_000])
def test_long_runs_are_thinned(steps):
    sizes = [16 + step % 7 for step in range(steps)]
    section = course(
        toy_plan(batch_schedule="adaptive"), columns(lines(sizes, [1 / (step + 1) for step in range(steps)]))
    )
    if steps == 1:
        assert section is None
        return
    batch, rate = section.blocks[0].charts
    assert max(len(chart.figure.data[0].x) for chart in (batch, rate)) <= 4000
    assert len(batch.table.rows) == 20


def test_axes():
    assert batch_course([1.0, 2.0], [16, 64]).layout.yaxis.type == "log"
    assert batch_course([1.0, 2.0], [16, 32]).layout.yaxis.type != "log"
    assert rate_course([1.0], [0.1]).layout.yaxis.title.text == "learning rate"


def test_it_is_on_the_page_of_a_run_whose_batch_moves(tmp_path):
    plan = toy_plan(batch_schedule="ramp", batch_settings={"end": 128, "over": 600, "increment": 32}, schedule="wsd")
    run = train(toy_job(), plan, out=tmp_path / "run", device="cpu")
    page = report(Run.open(run.path), tmp_path / "page.html").read_text()
    assert "Batch size and learning rate along training" in page and "batch-course" in page
    assert sizes(run) == [("Batch sizes", "64 to 128", "2 changes, now 128")]
    still = dataclasses.replace(plan, steps=1, batch_settings={"end": 128, "over": 64, "increment": 32})
    assert sizes(train(toy_job(), still, out=tmp_path / "still", device="cpu")) == [
        ("Batch sizes", "64", "it never moved in 1 step")
    ]
    assert sizes(train(toy_job(), toy_plan(steps=1), out=tmp_path / "fixed", device="cpu")) == []
