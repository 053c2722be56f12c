"""A second call into a study's folder: after the end, an interruption, a kill or a full disk, and beside others."""

import multiprocessing
import os
import signal

import pytest
import torch

from batchlab.core.errors import InputError, Interrupted, StorageError
from batchlab.core.job import Target
from batchlab.core.study import Study
from batchlab.spine import sweep as sweep_module
from batchlab.spine.trial import run_trial
from tests.spine.forked import in_child
from tests.spine.sweep_jobs import TRIALS, linear_facts, linear_job, quick, searched, squared_error, steps_of
from tests.spine.sweep_jobs import finished as finished

FORK = multiprocessing.get_context("fork")


def test_a_second_call_runs_only_what_is_missing(tmp_path, monkeypatch):
    runs = []

    def counting(job, plan, **settings):
        runs.append(plan.batch_size)
        return run_trial(job, plan, **settings)

    monkeypatch.setattr(sweep_module, "run_trial", counting)
    first = quick(tmp_path, batch_sizes=[16], trials=2, seeds=1)
    assert len(runs) == 3
    quick(tmp_path, batch_sizes=[16], trials=2, seeds=1)
    assert len(runs) == 3
    wider = quick(tmp_path, batch_sizes=[64], trials=2, seeds=2)
    assert runs[3:] == [64] * 4 and [row["batch_size"] for row in wider.rows()] == [16, 64]
    assert wider.meta["created"] == first.meta["created"]
    quick(tmp_path, batch_sizes=[16, 64], trials=2, seeds=2)
    assert runs[7:] == [16]


def interrupted_at(call):
    """A loss that sends SIGINT to its own process at its `call`-th use."""
    count = 0

    def loss(module, batch):
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGINT)
        return squared_error(module, batch)

    return loss


@pytest.mark.parametrize("call", [1, 300])
def test_sigint_leaves_a_study_that_goes_on(finished, tmp_path, call):
    with pytest.raises(Interrupted, match="sweep into .* again to go on") as caught:
        quick(tmp_path, job=linear_job(loss=interrupted_at(call)))
    assert caught.value.signum == signal.SIGINT
    study = Study.open(tmp_path)
    assert study.summary["status"] == "interrupted"
    assert [t["status"] for t in study.trials()].count("interrupted") == 1
    whole = quick(tmp_path)
    assert whole.summary["status"] == "finished"
    ended = [t for t in whole.trials() if t["status"] != "interrupted"]
    assert sorted((t["batch_size"], t["learning_rate"], t["seed"]) for t in ended) == sorted(
        (t["batch_size"], t["learning_rate"], t["seed"]) for t in finished[0].trials()
    )


def test_an_error_in_the_users_code_puts_the_trial_back(finished, tmp_path):
    calls = []

    def loss(module, batch):
        calls.append(1)
        if len(calls) == 300:
            raise RuntimeError("the user's own")
        return squared_error(module, batch)

    with pytest.raises(RuntimeError, match="the user's own"):
        quick(tmp_path, job=linear_job(loss=loss))
    assert Study.open(tmp_path).summary["status"] == "interrupted"
    assert {t[:4] for t in steps_of(quick(tmp_path))} == {t[:4] for t in steps_of(finished[0])}


def _killed(out):
    calls = []

    def loss(module, batch):
        calls.append(1)
        if len(calls) == 400:
            os.kill(os.getpid(), signal.SIGKILL)
        return squared_error(module, batch)

    quick(out, job=linear_job(loss=loss))


def test_a_killed_workers_trial_is_run_by_the_next(finished, tmp_path):
    assert in_child(_killed, tmp_path) == -signal.SIGKILL
    half = Study.open(tmp_path)
    assert half.summary["status"] == "running" and half.trials()
    assert {t[:4] for t in steps_of(quick(tmp_path))} == {t[:4] for t in steps_of(finished[0])}


def _on_a_small_disk(out):
    import resource

    quick(out, batch_sizes=[4], trials=1, seeds=1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    room = max(file.stat().st_size for file in out.iterdir()) + 20_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    with pytest.raises(StorageError, match="the database of the trials refused|cannot write"):
        quick(out)


def test_a_full_disk_ends_it_with_an_error_and_keeps_what_was_written(tmp_path):
    assert in_child(_on_a_small_disk, tmp_path) == 0
    kept = Study.open(tmp_path).trials()
    assert len(kept) >= 2
    whole = quick(tmp_path)
    assert whole.summary["status"] == "finished" and whole.trials()[: len(kept)] == kept


def _worker(out):
    torch.set_num_threads(1)
    quick(out, seeds=3)


def test_two_workers_share_the_trials(tmp_path):
    workers = [FORK.Process(target=_worker, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    study = Study.open(tmp_path)
    assert study.summary["status"] == "finished"
    for row in study.rows():
        tried = searched(study, row["batch_size"])
        assert (len(tried) - TRIALS) in (0, 2, 4, 6)
        assert len({t["learning_rate"] for t in tried}) == len(tried)
        assert len(set(row["seeds"])) == 3


def test_machines_that_share_a_database_share_the_trials(finished, tmp_path, monkeypatch):
    storage = f"sqlite:///{tmp_path}/shared.db"
    one = quick(tmp_path / "one", storage=storage, batch_sizes=[16], trials=2)
    monkeypatch.setattr(sweep_module, "run_trial", None)
    other = quick(tmp_path / "other", storage=storage, batch_sizes=[16], trials=2)
    assert other.trials() == one.trials() and other.rows() == one.rows()
    assert not (tmp_path / "one" / "study.db").exists()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"job": linear_job(name="other")}, "job"),
        ({"job": linear_job(target=Target("loss", 0.7)), "facts": linear_facts(target=Target("loss", 0.7))}, "target"),
    ],
)
def test_a_study_of_something_else_is_not_added_to(finished, changes, name):
    study, _ = finished
    before = (study.path / "study.json").read_bytes()
    with pytest.raises(InputError, match=f"holds a study of another {name}"):
        quick(study.path, **changes)
    assert (study.path / "study.json").read_bytes() == before
