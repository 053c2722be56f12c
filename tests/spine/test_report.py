"""The report of runs and studies, whole and partial: what it says, and that no name or message becomes markup."""

import dataclasses
import json
import math
import re

import pytest

from batchlab.core.errors import InputError, StorageError
from batchlab.core.facts import Estimate, NoisePoint
from batchlab.core.job import Target
from batchlab.core.plan import Reason
from batchlab.core.query import query
from batchlab.core.run import STEPS_FILE, Run, summarize
from batchlab.spine import headline
from batchlab.spine.report import STUDY_FOLDER, report, terminal_report
from batchlab.spine.train import train

from . import run_folders as made
from .jobs import toy_job, toy_plan

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`&amp;\u2028\u2029\x1b[31m"


def figures(path):
    text = path.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="page-data">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)["figures"]


def trace(figure, name):
    (found,) = (each for each in figure["data"] if each["name"] == name)
    return found


def words(path):
    """The page without its scripts and styles."""
    return re.sub(r"<(script|style)[^>]*>.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def hostile_run(folder):
    """A run whose every free text is hostile."""
    bad = Reason(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, HOSTILE)
    told = Estimate(10.0, 5.0, 20.0, HOSTILE)
    facts = made.facts(name=HOSTILE, metric=HOSTILE, notes=(HOSTILE,), noise_scale=told)
    plan = made.plan(
        name=HOSTILE,
        metric=HOSTILE,
        optimizer=HOSTILE,
        noise_scale=told,
        notes=(HOSTILE,),
        reasons={HOSTILE: bad},
    )
    lines = made.step_lines(40, metric=HOSTILE)
    summary = summarize(iter(lines), plan, "not reached")
    return made.write_run(
        folder,
        lines,
        plan=plan,
        facts=facts,
        summary=summary,
        name=HOSTILE,
        created=HOSTILE,
        git_commit=HOSTILE,
        error=HOSTILE,
        device=HOSTILE,
        versions={HOSTILE: HOSTILE},
        machine={HOSTILE: [HOSTILE]},
        job={"name": HOSTILE, "unit": HOSTILE, HOSTILE: HOSTILE, "units_per_example": 2},
    )


def hostile_study(folder):
    facts = made.facts(name=HOSTILE, metric=HOSTILE, notes=(HOSTILE,))
    lines = [line | {"status": line["status"] if line["kind"] == "confirm" else HOSTILE} for line in made.trials()]
    lines = [line | ({"status": "reached"} if line["steps_to_target"] else {}) for line in lines]
    return made.write_study(folder, lines, made_from=facts, name=HOSTILE, metric=HOSTILE, notes=(HOSTILE,))


def test_the_pictures_hold_the_run_s_numbers(tmp_path):
    run = made.reached_run(tmp_path / "run")
    path = report(run, tmp_path / "deep" / "report.html")
    assert path == tmp_path / "deep" / "report.html"
    drawn, lines = figures(path), list(run.steps())
    for axis, key in (("step", "step"), ("examples", "position")):
        line = trace(drawn[f"loss-{axis}"], "training, each step")
        assert line["x"] == [each[key] for each in lines]
        assert line["y"] == [each["loss"] for each in lines]
    checked = [each for each in lines if "valid" in each]
    assert trace(drawn["loss-step"], "validation")["y"] == [2.35] + [each["valid"]["loss"] for each in checked]
    assert trace(drawn["loss-seconds"], "validation")["x"][-1] == pytest.approx(138 * 7e-3)
    noise = [each for each in lines if each["noise_scale"]]
    line = trace(drawn["noise-scale-training"], "in this run")
    assert line["x"] == [each["position"] for each in noise]
    assert line["y"] == [each["noise_scale"]["value"] for each in noise]
    band = trace(drawn["noise-scale-training"], "its interval")["y"]
    assert band[: len(noise)] == [each["noise_scale"]["high"] for each in noise]
    assert trace(drawn["noise-scale-training"], "in the probe")["y"] == [30.0, 60.0, 100.0, 140.0]
    one = [row for row in run.plan.frontier if row.devices == 1]
    assert trace(drawn["frontier-cost"], "1 device")["x"] == [row.cost for row in one]
    assert trace(drawn["frontier-cost"], "1 device")["y"] == [row.time for row in one]
    sizes = run.facts.micro_batches
    assert trace(drawn["micro-batch-time"], "measured")["y"] == [p.seconds.value for p in sizes]
    assert trace(drawn["micro-batch-memory"], "measured")["y"] == [p.memory_bytes / 2**20 for p in sizes]
    trials = [t for t in run.facts.learning_rate_trials if math.isfinite(t.loss)]
    assert trace(drawn["learning-rate-trials"], "trials")["y"] == [t.loss for t in trials]
    assert set(trace(drawn["target-metric"], "met it")["x"]) == {138}


def test_the_page_says_what_to_do_and_what_came_of_it(tmp_path):
    shown = words(report(made.reached_run(tmp_path / "run"), tmp_path / "r.html"))
    for said in (
        "96 examples",
        "32 × 3",
        "0.004123",
        "Predicted steps to target",
        "95 % interval 88 to 171",
        "Met the target, accuracy of at least 0.97, after 138 steps: 1.15 times the 120 predicted, inside",
        "McCandlish et al. 2018",
        "Communication between devices was not measured",
        "The target was set from the reference run",
        "0123456789abcdef0123456789abcdef01234567",
        "2026-11-24 12:00 UTC",
    ):
        assert said in shown.replace("&#x27;", "'"), said


def test_a_verified_run_is_shown_against_its_own_sweep(tmp_path):
    run = made.reached_run(tmp_path / "run")
    before = report(run, tmp_path / "before.html")
    assert "--verify" in words(before) and "tradeoff" not in figures(before)
    study = made.write_study(run.path / STUDY_FOLDER, made_from=made.facts())
    path = report(run, tmp_path / "after.html")
    drawn = figures(path)["tradeoff"]
    rows = study.rows()
    sweep = trace(drawn, "sweep")
    assert sweep["y"] == [row["median"] for row in rows]
    assert sweep["error_y"]["array"] == [row["high"] - row["median"] for row in rows]
    fit = study.summary["tradeoff"]
    line = trace(drawn, "fit to the sweep")
    assert line["y"][0] == pytest.approx(fit["s_min"]["value"] + fit["e_min"]["value"] / 16)
    predicted = trace(drawn, "predicted")
    assert predicted["x"][0] == pytest.approx(16) and predicted["x"][-1] == pytest.approx(256)
    assert predicted["y"][0] == pytest.approx(150 * (1 + 96 / 16) / (1 + 96 / 32))
    assert (trace(drawn, "the plan's run")["x"], trace(drawn, "the plan's run")["y"]) == ([96], [138])
    shown = words(path)
    assert "within a factor of 2" in shown and "The plan&#x27;s time over the sweep&#x27;s best" in shown


def test_a_study_has_a_page_of_its_own(tmp_path):
    study = made.write_study(tmp_path / "study", made_from=made.facts(), notes=("a note of the sweep",))
    path = report(study, tmp_path / "s.html")
    assert {"tradeoff", "time-measured", "regimes", "tuned-rates", "rate-search"} == set(figures(path))
    assert "Measured critical batch size" in words(path) and "a note of the sweep" in words(path)


def test_a_study_says_where_more_batch_stops_helping(tmp_path):
    from batchlab.measure import critical_batch, perfect_scaling_limit

    study = made.write_study(tmp_path / "study")
    path = report(study, tmp_path / "s.html")
    found, rows = perfect_scaling_limit(study), study.rows()
    pairs = [(row["batch_size"], steps) for row in rows for steps in row["steps"]]
    shown, data = words(path), trace(figures(path)["regimes"], "perfect scaling")
    assert data["y"] == pytest.approx(list(found.perfect)) and data["x"] == list(found.batch_sizes)
    for name, estimate in (
        ("Perfect scaling until", found.perfect_until),
        ("Critical batch size B*", critical_batch(*zip(*pairs, strict=True)).size),
    ):
        assert name in shown and f"{float(f'{estimate.value:.3g}'):g}" in shown
    assert found.flat_from.defined or "not reached" in shown
    assert "diminishing returns" in shown


@pytest.mark.parametrize("lines", [[], list(made.trials(sizes=(16,)))[:2]])
def test_a_study_that_has_hardly_begun_says_so(tmp_path, lines):
    path = report(made.write_study(tmp_path / "study", lines, finished=False), tmp_path / "s.html")
    assert f"The sweep has not finished (running): {len(lines)} trial" in words(path)
    assert "Not known yet: study must hold at least 2 batch sizes that reached the goal, got 0." in words(path)


def test_a_run_without_a_step_says_what_is_missing(tmp_path):
    bare = dataclasses.replace(made.plan(), reasons={}, frontier=(), notes=(), predicted_steps=None, noise_scale=None)
    path = report(made.write_run(tmp_path / "run", [], plan=bare), tmp_path / "r.html")
    shown = words(path)
    for said in (
        "Still running",
        "No step has been recorded yet",
        "carries no frontier",
        "carries no reasons",
        "tune() does, and train(..., facts=facts) keeps",
        "It was not measured in this run",
    ):
        assert said in shown, said
    assert figures(path) == {}


def test_a_running_run_with_a_torn_last_line(tmp_path):
    run = made.write_run(tmp_path / "run", made.step_lines(30)[:23], plan=made.plan())
    with (run.path / STEPS_FILE).open("a") as file:
        file.write('{"step": 24, "posi')
    path = report(run, tmp_path / "r.html")
    assert "Still running, or ended without a word: 23 steps of 300 so far." in words(path)
    assert len(trace(figures(path)["loss-step"], "training, each step")["x"]) == 23


def test_skipped_steps_are_marked_and_not_drawn_as_loss(tmp_path):
    run = made.write_run(tmp_path / "run", made.step_lines(30, skipped=(5, 9)), plan=made.plan())
    path = report(run, tmp_path / "r.html")
    drawn = figures(path)["loss-step"]
    assert trace(drawn, "skipped: not finite")["x"] == [5, 9]
    line = trace(drawn, "training, each step")
    assert 5 not in line["x"] and len(line["x"]) == 28
    assert all(isinstance(value, float) for value in line["y"])
    assert "2 of 30 steps had a loss or gradient that is not finite" in words(path)


def test_unbounded_and_undefined_estimates(tmp_path):
    unbounded = Estimate(120.0, 20.0, math.inf, "law")
    undefined = Estimate(math.nan, -math.inf, math.inf, "too few steps")
    facts = made.facts(noise_scale=undefined, noise=(NoisePoint(1, 32, undefined),))
    plan = made.plan(predicted_steps=unbounded, noise_scale=undefined)
    lines = made.step_lines(40, reached=31)
    for line in lines:
        if line["noise_scale"]:
            line["noise_scale"] |= {"low": -math.inf, "high": math.inf}
    run = made.write_run(
        tmp_path / "run", lines, plan=plan, facts=facts, summary=summarize(iter(lines), plan, "reached")
    )
    path = report(run, tmp_path / "r.html")
    assert "no upper end, so it could not have missed" in words(path)
    assert "The plan knew of no noise scale; too few steps." in words(path)
    band = trace(figures(path)["noise-scale-training"], "its interval")
    assert all(isinstance(value, float) and value > 0 for value in band["y"])


def test_a_huge_run_is_thinned_with_its_spikes_kept(tmp_path):
    lines = made.step_lines(20_000, every=100)
    lines[12_345]["loss"] = 77.0
    path = report(made.write_run(tmp_path / "run", lines, plan=made.plan(steps=20_000)), tmp_path / "r.html")
    for figure in figures(path).values():
        for each in figure["data"]:
            assert len(each["x"]) <= 2 * 2000  # a band has two edges
    line = trace(figures(path)["loss-step"], "training, each step")
    assert len(line["x"]) <= 2000
    assert (line["x"][0], line["x"][-1], max(line["y"])) == (1, 20_000, 77.0)
    assert path.stat().st_size < 7e6


@pytest.mark.parametrize("make", [hostile_run, hostile_study])
def test_no_outside_text_becomes_markup(tmp_path, make):
    path = report(make(tmp_path / "it"), tmp_path / "r.html")
    text = path.read_text(encoding="utf-8")
    assert text.count("<script") == 3 + text.count('"<script') and "<img" not in words(path)
    assert words(path).count("alert(1)") > 5
    for figure in figures(path).values():
        assert "<script" not in json.dumps(figure)


@pytest.mark.parametrize("make", [hostile_run, hostile_study])
def test_the_terminal_gets_no_control_characters(tmp_path, make):
    from rich.console import Console

    console = Console(record=True, width=100, file=(tmp_path / "out").open("w"))
    console.print(terminal_report(make(tmp_path / "it")))
    shown = console.export_text()
    assert "\x1b" not in shown and "alert(1)" in shown


@pytest.mark.parametrize(
    "status, changes, tone, said",
    [
        ("reached", {"target_step": 131}, "good", "1.09 times the 120 predicted, inside"),
        ("reached", {"target_step": 181}, "bad", "1.51 times the 120 predicted, outside"),
        ("reached", {"target_step": 86}, "open", "0.717 times the 120 predicted, outside"),
        (
            "reached",
            {"target_step": 0},
            "open",
            "was met before any update: it is no test of the plan",
        ),
        ("not reached", {"final": {"accuracy": 0.5}}, "bad", "was not met in 300 steps; it ended at 0.5."),
        ("interrupted", {}, "open", "Interrupted after 300 steps of 300"),
        ("stopped", {"skipped_steps": 5}, "bad", "5 steps had a loss or gradient that is not finite"),
    ],
)
def test_verdicts(status, changes, tone, said):
    summary = {"status": status, "steps": 300, "target_step": None, "final": {}, "skipped_steps": 0} | changes
    verdict = headline.verdict(made.plan(), summary)
    assert said in verdict.text
    if changes.get("target_step") != 86:
        assert verdict.tone == tone


@pytest.mark.parametrize(
    ("predicted", "reached", "said", "range_"),
    [
        ((51.6, 43.4, 60.6), 43, "0.827 times the 52 predicted, inside", "95 % interval 43 to 61"),
        ((51.6, 43.4, 60.6), 61, "1.17 times the 52 predicted, inside", "95 % interval 43 to 61"),
        ((51.6, 43.4, 60.6), 62, "1.19 times the 52 predicted, just outside", "95 % interval 43 to 61"),
        ((14.53, 9.876, 20.2), 14, "0.966 times the 14.5 predicted, inside", "95 % interval 9.88 to 20"),
        ((14.53, 9.876, math.inf), 9, "0.621 times the 14.5 predicted, outside", "95 % interval 9.88 to unbounded"),
    ],
)
def test_what_is_told_of_a_prediction_is_so_of_the_figures_shown(predicted, reached, said, range_):
    plan = made.plan(predicted_steps=Estimate(*predicted, "S_min (1 + B_crit/B)"))
    summary = {"status": "reached", "steps": 300, "target_step": reached, "target_seconds": None, "seconds": 1.0}
    assert said in headline.verdict(plan, summary).text
    lines = {name: (value, remark) for name, value, remark in headline.outcome(plan, summary)}
    assert lines["Predicted steps to target"][1] == range_


def test_a_batch_that_moves_is_held_against_no_prediction(tmp_path):
    moving, fixed = made.reached_run(tmp_path / "m", batch_schedule="adaptive"), made.reached_run(tmp_path / "f")
    lines = {name: (value, remark) for name, value, remark in headline.of_run(moving)}
    assert lines["Predicted steps to target"] == ("unknown", "120 for a batch that stays at 96; this one moves")
    assert "Predicted time" not in lines and moving.summary["predicted_steps"] is None
    said = headline.verdict(moving.plan, moving.summary)
    assert said.tone == "open" and said.text.endswith("its batch moves, so no prediction can be held against it.")
    drawn = {run: figures(report(run, tmp_path / "r.html"))["target-metric"] for run in (moving, fixed)}
    names = {run: [trace.get("name") for trace in drawn[run]["data"]] for run in drawn}
    assert "predicted to meet it" in names[fixed] and "predicted to meet it" not in names[moving]
    assert {row["run"]: row["predicted_steps"] for row in query(tmp_path)} == {"m": None, "f": 120.0}


def test_tokens_are_told_by_their_measured_mean_where_they_vary(tmp_path):
    run = made.reached_run(tmp_path / "r")
    meta = json.loads((run.path / "run.json").read_text())
    meta["job"] |= {"unit": "token", "units_per_example": None}
    meta["facts"] |= {"unit": "token", "units_per_example": 6.5}
    (run.path / "run.json").write_text(json.dumps(meta))
    assert headline.of_run(Run.open(run.path))[0][1] == "96 examples, 624 tokens"


def test_a_rate_that_was_not_measured_has_no_chart(tmp_path):
    run = made.reached_run(tmp_path / "r")
    meta = json.loads((run.path / "run.json").read_text())
    meta["facts"]["learning_rate_trials"] = [{"learning_rate": 0.05, "loss": "nan"}]
    (run.path / "run.json").write_text(json.dumps(meta))
    page = report(Run.open(run.path), tmp_path / "r.html")
    assert "learning-rate-trials" not in figures(page)
    assert "No trial was run: 0.003 is a common default, and was not measured." in words(page)


def test_a_micro_batch_larger_than_the_batch_is_shown_as_it_is_run():
    lines = headline.settings(made.plan(micro_batch=1000, accumulation=1))
    assert lines[1][1] == "96 × 1"


def test_settings_are_counted_in_tokens_too_where_the_unit_is_one():
    lines = headline.settings(made.plan(), "token", 128)
    assert lines[0] == ("Batch size", "96 examples, 12,288 tokens", "in each step")


def test_a_run_that_was_trained(tmp_path):
    job = toy_job(target=Target("loss", 0.0, "min"))
    run = train(job, toy_plan(target=job.target), out=tmp_path / "run")
    drawn = figures(report(run, tmp_path / "r.html"))
    assert trace(drawn["loss-step"], "training, each step")["y"] == [line["loss"] for line in run.steps()]
    assert trace(drawn["loss-step"], "validation")["x"] == [0, 5, 10, 15, 20]
    assert "was not met in 20 steps" in words(tmp_path / "r.html")


@pytest.mark.parametrize("wrong", [None, "runs/a", {}])
def test_only_runs_and_studies_have_reports(tmp_path, wrong):
    with pytest.raises(InputError, match="report takes a Run or a Study, got"):
        report(wrong, tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_the_path_must_name_a_file(tmp_path):
    run = made.reached_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"path must name the file to write, got the folder .*report\.html"):
        report(run, tmp_path)


def test_a_refused_write_leaves_the_old_page(tmp_path, monkeypatch):
    run = made.reached_run(tmp_path / "run")
    path = tmp_path / "r.html"
    path.write_text("the old page")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(StorageError, match="cannot write .*r.html"):
        report(run, path)
    assert path.read_text() == "the old page"
