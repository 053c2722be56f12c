"""A run that was cut off anywhere goes on as if it had not been."""

import dataclasses
import os
import random
import signal
import threading

import pytest

from batchlab.core import files
from batchlab.core.checkpoint import checkpoints
from batchlab.core.errors import (
    CheckpointError,
    InputError,
    Interrupted,
    StorageError,
)
from batchlab.core.job import Target
from batchlab.core.run import STEPS_FILE, Run
from batchlab.spine.train import train
from tests.spine.forked import in_child
from tests.spine.hard_run import HARD_PLAN, hard_job, lines, same, state
from tests.spine.jobs import squared_error, toy_job, toy_plan


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(hard_job(), HARD_PLAN, out=folder, device="cpu")
    return folder


def _kill_at_call(number):
    """A loss that kills its process, without warning, at its number-th call: inside an accumulation."""
    calls = []

    def loss(module, batch):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return squared_error(module, batch)

    return loss


def _train_killed(folder, where, number):
    loss = squared_error
    if where == "loss":
        loss = _kill_at_call(number)
    elif where == "time":
        threading.Timer(number / 1000, os.kill, (os.getpid(), signal.SIGKILL)).start()
    else:
        original, calls = getattr(files.os, where), []

        def dying(*arguments):
            calls.append(None)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        setattr(files.os, where, dying)
    train(hard_job(loss), HARD_PLAN, out=folder, device="cpu")


def _kills():
    """50 places: inside accumulations, at renames and fsyncs of checkpoints and run.json, and at any time."""
    draw = random.Random(0)
    yield from (("loss", draw.randint(1, 24 * 4)) for _ in range(20))
    yield from (("fsync", draw.randint(1, 20)) for _ in range(10))
    yield from (("replace", draw.randint(1, 10)) for _ in range(10))
    yield from (("time", draw.randint(1, 400)) for _ in range(10))


@pytest.mark.parametrize(("where", "number"), list(_kills()))
def test_kill_and_resume_is_bit_identical(tmp_path, uninterrupted, where, number):
    folder = tmp_path / "run"
    code = in_child(_train_killed, folder, where, number)
    assert code == -signal.SIGKILL or (where == "time" and code == 0)
    begun = (folder / "run.json").exists()
    train(hard_job(), HARD_PLAN, out=folder, resume=begun, device="cpu")
    assert lines(folder) == lines(uninterrupted)
    assert same(state(folder), state(uninterrupted))
    assert (folder / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_resumes_the_same(tmp_path, uninterrupted, number):
    folder = tmp_path / "my run"

    def ask(line):
        if line["step"] == 7:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        train(hard_job(), HARD_PLAN, out=folder, callbacks=[ask], device="cpu")
    assert caught.value.signum == number and signal.getsignal(number) is before
    assert f"or batchlab train JOB --out '{folder}' --resume" in str(caught.value)
    run = Run.open(folder)
    assert run.summary["status"] == "interrupted" and run.summary["steps"] == 7
    assert state(run.path)["learner"]["step"] == 7
    train(hard_job(), HARD_PLAN, out=folder, resume=True, device="cpu")
    assert lines(folder) == lines(uninterrupted) and same(state(folder), state(uninterrupted))


def test_a_user_handler_is_called_and_put_back(tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("mine"))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Interrupted):
            train(
                toy_job(),
                toy_plan(),
                out=tmp_path / "r",
                callbacks=[lambda _: signal.raise_signal(15) if not heard else None],
            )
        assert heard == ["mine"] and signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_truncated_checkpoint_and_a_torn_line_fall_back(tmp_path, uninterrupted):
    folder = tmp_path / "r"
    train(hard_job(), dataclasses.replace(HARD_PLAN, steps=14), out=folder, device="cpu")
    newest = checkpoints(folder / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    with (folder / "steps.jsonl").open("ab") as file:
        file.write(b'{"step": 15, "loss"')
    train(hard_job(), HARD_PLAN, out=folder, resume=True, device="cpu")
    assert lines(folder) == lines(uninterrupted)


def test_no_whole_checkpoint_is_said(tmp_path):
    train(toy_job(), toy_plan(steps=4), out=tmp_path / "r", device="cpu")
    for path in checkpoints(tmp_path / "r" / "checkpoints"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        train(toy_job(), toy_plan(steps=8), out=tmp_path / "r", resume=True, device="cpu")


def test_a_finished_run_resumed_stays_as_it_is(tmp_path):
    plan = toy_plan(steps=400, target=Target("loss", 0.5))
    first = train(toy_job(), plan, out=tmp_path / "r", device="cpu").summary
    assert train(toy_job(), plan, out=tmp_path / "r", resume=True, device="cpu").summary == first


@pytest.mark.parametrize("call", [1, 3, 8])
def test_a_full_disk_ends_the_run_and_keeps_what_was_written(tmp_path, monkeypatch, call, uninterrupted):
    folder, calls, fsync = tmp_path / "r", [], os.fsync

    def full(descriptor):
        calls.append(None)
        if len(calls) >= call + 4:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("batchlab.core.files.os.fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            train(hard_job(), HARD_PLAN, out=folder, device="cpu")
    train(hard_job(), HARD_PLAN, out=folder, resume=True, device="cpu")
    assert lines(folder) == lines(uninterrupted) and same(state(folder), state(uninterrupted))


def test_fewer_steps_than_were_made_are_refused_and_nothing_is_written(tmp_path):
    folder = tmp_path / "r"
    train(toy_job(), toy_plan(steps=6), out=folder, device="cpu")
    before = (folder / "run.json").read_text()
    with pytest.raises(
        InputError, match="^plan steps must be at least 6, for the run has seen 384 examples alr.*got 4$"
    ):
        train(toy_job(), toy_plan(steps=4), out=folder, resume=True, device="cpu")
    assert (folder / "run.json").read_text() == before


def test_a_finished_run_whose_last_batch_reached_beyond_is_resumed_as_it_is(tmp_path):
    settings = {"batch_settings": {"end": 16, "over": 10, "increment": 4}, "checkpoint_every": 1}
    plan = toy_plan(batch_size=4, micro_batch=4, accumulation=1, steps=5, batch_schedule="ramp", **settings)
    first = train(toy_job(), plan, out=tmp_path / "r", device="cpu")
    again = train(toy_job(), plan, out=tmp_path / "r", resume=True, device="cpu")
    assert again.summary == first.summary and list(again.steps())[-1]["position"] > plan.examples


def test_lines_that_are_gone_are_told_of_once(tmp_path):
    folder = tmp_path / "r"
    train(toy_job(), toy_plan(steps=6, checkpoint_every=2), out=folder, device="cpu")
    kept = (folder / STEPS_FILE).read_text().splitlines(keepends=True)[:2]
    (folder / STEPS_FILE).write_text("".join(kept))
    for steps, before in ((8, 6), (9, 8)):
        plan = dataclasses.replace(Run.open(folder).plan, steps=steps)
        run = train(toy_job(), plan, out=folder, resume=True, device="cpu")
        (lacking,) = [note for note in run.plan.notes if "lacks" in note]
        assert lacking.startswith(f"{STEPS_FILE} lacks 4 of the {before} updates before the checkpoint")
