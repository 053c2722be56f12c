"""The main road from end to end, and what it refuses before it measures anything."""

import math
import statistics

import pytest

from batchlab.core.errors import InputError
from batchlab.core.facts import Facts
from batchlab.core.plan import Plan
from batchlab.core.run import Run
from batchlab.core.study import Study
from batchlab.spine.study_chapters import findings
from batchlab.spine.tune import around, tune
from tests.spine.forked import in_ranks
from tests.spine.jobs import squared_error, toy_job


def test_it_probes_plans_trains_and_reports(tmp_path):
    heard = []
    run = tune(toy_job(), out=tmp_path / "r", budget=6.0, device="cpu", progress=lambda *said: heard.append(said))
    assert run.summary["status"] in ("reached", "not reached") and run.summary["steps"] > 0
    assert {phase for phase, _ in heard} >= {"memory and speed", "learning rate", "reference run", "train"}
    facts, plan = (
        noun.from_json((run.path / name).read_text()) for noun, name in ((Facts, "facts.json"), (Plan, "plan.json"))
    )
    assert plan == run.plan == Run.open(run.path).plan and facts == run.facts
    assert "<html" in (run.path / "report.html").read_text()


def test_verify_adds_the_sweep_and_the_plans_own_runs(tmp_path):
    run = tune(toy_job(), out=tmp_path / "r", budget=4.0, device="cpu", verify=True)
    study = Study.open(run.path / "sweep")
    assert study.summary["status"] == "finished" and study.target == run.plan.target
    assert [row["batch_size"] for row in study.rows()] == around(run.plan.batch_size, 256)
    assert "measured against predicted" in (run.path / "report.html").read_text().lower()
    own = study.plan_trials()
    assert len(own) == 3 == len({trial["seed"] for trial in own})
    assert {trial["batch_size"] for trial in own} == {run.plan.batch_size}
    said = {name: value for name, value, _ in findings(study)}.get("The plan's time over the sweep's best")
    met = [trial for trial in own if trial["steps_to_target"] is not None]
    assert (said is not None) == (len(met) > 1)
    if len(met) == 3:
        best = min(row["seconds"] for row in study.rows() if row["median"] is not None)
        assert said == f"{statistics.median(trial['seconds'] for trial in own) / best:.3g}"


def test_fewer_steps_than_the_target_needs_end_well(tmp_path):
    run = tune(toy_job(), out=tmp_path / "r", budget=3.0, device="cpu", max_steps=1)
    assert run.summary["status"] in ("not reached", "reached") and run.summary["steps"] == 1
    assert run.plan.steps == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.0}, "budget must be finite and > 0 seconds, got 0.0"),
        ({"budget": math.inf}, "budget must be finite and > 0 seconds, got inf"),
        ({"budget": math.nan}, "budget must be finite and > 0 seconds, got nan"),
        ({"budget": "60"}, "budget must be finite and > 0 seconds, got '60'"),
        ({"max_steps": 0}, "max_steps must be an integer of at least 1, got 0"),
        ({"max_steps": 1.5}, "max_steps must be an integer of at least 1, got 1.5"),
        ({"goal": "fast"}, r"goal must be one of \['balanced', 'cost', 'time'\], got 'fast'"),
    ],
)
def test_wrong_arguments_cost_nothing_and_write_nothing(tmp_path, arguments, message):
    asked = []

    def loss(module, batch):
        asked.append(None)
        return squared_error(module, batch)

    with pytest.raises(InputError, match=message):
        tune(toy_job(loss=loss), out=tmp_path / "r", **({"budget": 2.0, "device": "cpu"} | arguments))
    assert not asked and not (tmp_path / "r").exists()


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_measured(tmp_path):
    tune(toy_job(), out=tmp_path / "r", budget=2.0, device="cpu", max_steps=1)
    with pytest.raises(InputError, match=r"already holds a run: resume it with train, or name another folder"):
        tune(toy_job(), out=tmp_path / "r", device="cpu")


def test_a_file_in_the_folders_place_is_said_before_anything_is_measured(tmp_path):
    (tmp_path / "r").touch()
    with pytest.raises(InputError, match="out must name a folder"):
        tune(toy_job(), out=tmp_path / "r", device="cpu")


def _tune_on_a_rank(folder):
    tune(toy_job(), out=folder / "r", budget=6.0, device="cpu")


def test_ranks_tune_for_as_many_devices(tmp_path):
    assert in_ranks(2, tmp_path, _tune_on_a_rank, tmp_path) == [0, 0]
    run = Run.open(tmp_path / "r")
    assert run.plan.world_size == run.meta["world_size"] == 2
    assert run.plan.batch_size <= 2 * run.plan.accumulation * run.plan.micro_batch


@pytest.mark.parametrize(
    ("batch_size", "examples", "sizes"),
    [(64, 10**6, [8, 16, 32, 64, 128, 256, 512, 1024]), (1, 100, [1, 2, 4, 8, 16]), (64, 70, [8, 16, 32, 64])],
)
def test_the_sizes_around_a_plan(batch_size, examples, sizes):
    assert around(batch_size, examples) == sizes
