"""What a study says of its trials, against references that read like the definition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import BatchlabError, InputError
from batchlab.core.files import write_atomic
from batchlab.core.job import Target
from batchlab.core.jsonio import dumps
from batchlab.core.jsonl import append_line
from batchlab.core.study import Study, at_edge, chosen, contenders, row


def trial(number, status="reached", steps=100, *, rate=None, kind="search", batch_size=16, seed=0, **changes):
    reached = status == "reached"
    settings = {
        "id": f"batch {batch_size} {kind} #{number}",
        "kind": kind,
        "batch_size": batch_size,
        "number": number,
        "learning_rate": 2.0**number if rate is None else rate,
        "seed": seed,
        "status": status,
        "steps_to_target": steps if reached else None,
        "resolution": 3 if reached else None,
        "steps": steps,
        "examples": steps * batch_size,
        "seconds": steps / 100,
        "metric": 0.1,
        "evaluations": [[steps, 0.1]],
    }
    return settings | changes


def study_folder(path, trials, **meta):
    settings = {
        "schema": 1,
        "name": "toy",
        "target": {"metric": "loss", "value": 0.1, "direction": "min"},
        "spec": {"batch_sizes": [16, 64]},
        "summary": None,
    }
    write_atomic(path / "study.json", dumps(settings | meta))
    for each in trials:
        append_line(path / "trials.jsonl", each)
    return Study.open(path)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["reached", "not reached", "diverged", "interrupted"]),
            st.integers(1, 5),
            st.sampled_from(["search", "confirm"]),
        ),
        max_size=12,
    )
)
def test_contenders_are_those_that_reached_sorted_by_steps_and_number(table):
    trials = [trial(number, status, steps, kind=kind) for number, (status, steps, kind) in enumerate(table)]
    good = sorted(
        (steps, n) for n, (status, steps, kind) in enumerate(table) if (status, kind) == ("reached", "search")
    )
    found = contenders(reversed(trials))
    assert [(trial["steps_to_target"], trial["number"]) for trial in found] == good


def confirmed(rate, *steps):
    """Runs of a rate with fresh seeds; a negative number of steps did not reach the target."""
    return [
        trial(k, "reached" if s > 0 else "not reached", abs(s), kind="confirm", rate=rate, id=f"{rate} {k}")
        for k, s in enumerate(steps)
    ]


@pytest.mark.parametrize(
    ("fresh", "rate"),
    [
        ({}, 1.0),
        ({1.0: [30, 32, 34]}, 1.0),
        ({1.0: [30, 32, 34], 2.0: [28, 29, 99]}, 2.0),
        ({1.0: [30, -3, -3], 2.0: [60, 60, 60]}, 2.0),
        ({1.0: [-3, -3, -3], 2.0: [-3, -3, -3]}, 1.0),
        ({1.0: [30, 32, 34], 2.0: [5]}, 1.0),
        ({1.0: [30, 32, 34], 9.0: [1, 1, 1]}, 1.0),
    ],
    ids=["none yet", "one", "the better median", "failures are longest", "all fail", "fewer seeds", "no contender"],
)
def test_of_contenders_run_again_the_best_median_is_chosen(fresh, rate):
    search = [trial(0, steps=10, rate=1.0), trial(1, steps=12, rate=2.0), trial(2, "diverged", 3, rate=9.0)]
    trials = search + [t for each, steps in fresh.items() for t in confirmed(each, *steps)]
    found = chosen(trials)
    assert found["learning_rate"] == rate and found["kind"] == "search"
    assert chosen([t for t in trials if t["status"] != "reached" or t["kind"] != "search"]) is None


def test_best_is_of_one_batch_size_and_none_where_nothing_reached(tmp_path):
    study = study_folder(
        tmp_path,
        [
            trial(0, steps=90),
            trial(1, steps=80),
            trial(2, steps=80),
            trial(0, steps=10, batch_size=64),
            trial(0, "diverged", steps=3, batch_size=128),
            trial(3, steps=5, kind="confirm"),
        ],
    )
    assert study.best(16)["number"] == 1
    assert study.best(64)["steps_to_target"] == 10
    assert study.best(128) is None and study.best(32) is None


def test_rows_hold_fresh_seeds_of_the_best_only(tmp_path):
    fresh = [
        trial(0, steps=110, kind="confirm", rate=2.0, seed=1),
        trial(1, steps=130, kind="confirm", rate=2.0, seed=2, id="b"),
        trial(2, steps=120, kind="confirm", rate=2.0, seed=3, id="c", resolution=4),
        trial(3, steps=7, kind="confirm", rate=1.0, seed=4, id="of an earlier winner"),
        trial(4, "interrupted", steps=9, kind="confirm", rate=2.0, seed=5, id="d"),
    ]
    search = [trial(0, steps=105), trial(1, steps=100), trial(2, "not reached", 200), trial(3, "diverged", 4)]
    study = study_folder(tmp_path, search + fresh)
    first, second = study.rows()
    assert (first["batch_size"], first["learning_rate"], first["search_steps"]) == (16, 2.0, 100)
    assert (first["steps"], first["seeds"]) == ([110, 130, 120], [1, 2, 3])
    assert (first["median"], first["low"], first["high"]) == (120, 110, 130)
    assert (first["seconds"], first["examples"], first["resolution"]) == (1.2, 120 * 16, 4)
    assert (first["trials"], first["reached"], first["diverged"], first["at_edge"]) == (4, 2, 1, False)
    assert second["batch_size"] == 64 and second["trials"] == 0
    assert second["median"] is second["learning_rate"] is second["seconds"] is None and second["steps"] == []


def test_a_fresh_run_that_fails_counts_as_the_longest():
    confirm = {"kind": "confirm", "rate": 1.0}
    runs = [trial(1, "not reached", 50, seed=1, **confirm), trial(2, steps=90, seed=2, **confirm)]
    three = row(16, [trial(0), *runs, trial(3, steps=95, seed=3, **confirm)])
    assert three["steps"] == [None, 90, 95]
    assert (three["median"], three["low"], three["high"]) == (95, 90, None)
    assert row(16, [trial(0), *runs])["median"] is None


@pytest.mark.parametrize(("number", "side"), [(0, -1), (1, 0), (5, 0), (10, 1)])
def test_at_edge_is_the_outer_share_of_the_rates_tried(number, side):
    trials = [trial(n, "diverged" if n == 10 else "reached") for n in range(11)]
    trials.append(trial(30, "interrupted", rate=1e9))
    assert at_edge(trials, 2.0**number) == side
    assert at_edge(trials, 2.0**9.6) == 1 and at_edge(trials, 2.0**9.4) == 0


def test_trials_leave_out_a_torn_line_and_repeats(tmp_path):
    study = study_folder(tmp_path, [trial(0), trial(1), trial(0, steps=100)])
    with (tmp_path / "trials.jsonl").open("ab") as file:
        file.write(b'{"id": "batch 16 search #2", "kin')
    assert [each["number"] for each in study.trials()] == [0, 1]
    assert study.summary["status"] == "running" and study.summary["seconds"] == pytest.approx(2.0)
    assert study.summary["rows"] == study.rows()


def test_damage_in_the_middle_is_not_passed_over(tmp_path):
    study = study_folder(tmp_path, [trial(0)])
    with (tmp_path / "trials.jsonl").open("ab") as file:
        file.write(b"{cut\n")
    append_line(tmp_path / "trials.jsonl", trial(1))
    with pytest.raises(BatchlabError, match="damaged in line 2"):
        study.trials()


def test_study_reads_its_target_and_stored_summary(tmp_path):
    study = study_folder(tmp_path, [], summary={"status": "finished", "rows": []})
    assert study.name == "toy" and study.target == Target("loss", 0.1) and study.facts is None
    assert study.summary == {"status": "finished", "rows": []}
    assert study.trials() == [] and math.isclose(study.target.value, 0.1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a study folder: it has no study.json"),
        ("{", "is not valid JSON"),
        ("[]", "does not describe a study"),
        ('{"schema": 1}', "does not describe a study"),
        ('{"schema": 2, "spec": {}}', "has schema 2, from a newer batchlab; this one reads up to 1"),
    ],
)
def test_what_is_no_study_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "study.json").write_text(content)
    with pytest.raises(InputError, match=message):
        Study.open(tmp_path)
